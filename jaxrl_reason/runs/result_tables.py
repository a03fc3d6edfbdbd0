"""Tables of results in a document, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
import re

from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs import pictures
from jaxrl_reason.runs.results import Entry, read, table_of
from jaxrl_reason.runs.statistics import estimate
from jaxrl_reason.runs.summary import metrics_of, OTHER_PROMPTS, summarize, values_of


def markdown(entries: Sequence[Entry], metrics: Sequence[str], prefixes: tuple[str, ...]) -> str:
    """Returns a table of the entries of one comparison: a line per row, a column per metric, and the seeds below.

    With several training tables, the means are over tables, each the mean over seeds. Raises ValueError if the recipe has no
    entries, if a row has entries of several configurations of one training table, and if rows have different seeds.
    """
    by_table = _by_table(entries)
    recipe = _recipe(entries)
    several = len(by_table) > 1
    rows = _means_over_seeds(by_table) if several else next(iter(by_table.values()))
    found = summarize(rows, recipe, prefixes)
    heads = [name.replace("_", " ") for name in metrics]
    lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for row, values in found.items():
        names = [f"eval/{name}" for name in metrics]
        cells = [pictures.cell_with_interval(n, values.get(n), values["half_width"].get(n)) for n in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        if values["difference"]:
            cells = [pictures.cell_of_difference(n, values["difference"].get(n)) for n in names]
            if several:
                cells = [
                    c + _higher(values["seeds"].get(n, {}), found[recipe]["seeds"].get(n, {}))
                    for n, c in zip(names, cells)
                ]
            lines.append(f"| {row}, difference to {recipe} | {' | '.join(cells)} |")
    seeds = sorted({entry["seed"] for entry in entries})
    took = estimate([entry["seconds"] for entry in entries]).mean / 60
    note = "Means ± half-widths of 95 % intervals (Student's t over seeds); differences [95 % interval] are paired by seed."
    one = "One seed, so there is no interval."
    listed = f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    if several:
        listed = f"{len(by_table)} tables. {listed}"
        note = one = (
            "Means over the tables, each the mean over the seeds, ± half-widths of 95 % intervals (Student's t over tables). Differences "
            f"[95 % interval] are paired by table and seed, and followed by the number of tables on which the row is above {recipe}."
        )
    known = {row: x for row, values in found.items() if (x := values["difference"].get(OTHER_PROMPTS))}
    note = note if len(seeds) > 1 else one
    if known:
        texts = "; ".join(f"{row} {pictures.cell_of_difference(OTHER_PROMPTS, x)}" for row, x in known.items())
        note += f" Accuracy less that of {recipe}, with its 95 % interval for other seeds and other prompts: {texts}."
    return "\n".join([*lines, "", f"{listed} {note} {took:.1f} minutes per run of RL."])


def markdown_by_table(entries: Sequence[Entry], metrics: Sequence[str], prefixes: tuple[str, ...]) -> str:
    """Returns, for each metric, a line per training table, and a column per row: means over seeds with their intervals."""
    recipe = _recipe(entries)
    lines: list[str] = []
    for metric in metrics:
        name = f"eval/{metric}"
        found = {table: summarize(rows, recipe, prefixes) for table, rows in _by_table(entries).items()}
        rows = dict.fromkeys(row for of_table in found.values() for row in of_table)
        lines += ["", f"| {metric.replace('_', ' ')} | {' | '.join(rows)} |", f"|{'---|' * (len(rows) + 1)}"]
        for table, of_table in found.items():
            columns = [of_table.get(row, {"half_width": {}}) for row in rows]
            cells = [pictures.cell_with_interval(name, c.get(name), c["half_width"].get(name)) for c in columns]
            lines.append(f"| {table.rpartition('/')[2]} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def _recipe(entries: Iterable[Entry]) -> str:
    """Returns the row of the recipe; raises ValueError if there are no results of it."""
    for entry in entries:
        if entry["recipe"]:
            return entry["row"]
    raise ValueError("There are no results of the recipe, with which the other rows are compared; run it.")


def _by_table(entries: Iterable[Entry]) -> dict[str, dict[str, dict[int, Entry]]]:
    """Returns training table -> row -> seed -> entry; raises what `markdown` raises."""
    found: dict[str, dict[str, dict[int, Entry]]] = {}
    for entry in entries:
        found.setdefault(table_of(entry), {}).setdefault(entry["row"], {})[entry["seed"]] = entry
    for table, rows in found.items():
        of = f" of {table}" if table else ""
        for row, by_seed in rows.items():
            if len({entry["config"] for entry in by_seed.values()}) > 1:
                raise ValueError(f"The row {row!r}{of} has results of several configurations; run its old ones again.")
        if len({tuple(sorted(by_seed)) for by_seed in rows.values()}) != 1:
            raise ValueError(f"The rows {list(rows)}{of} have not the same seeds; run the missing ones.")
    if len({tuple(rows) for rows in found.values()}) != 1:
        raise ValueError(f"The tables {list(found)} have not the same rows; run the missing ones.")
    return found


def _means_over_seeds(by_table: Mapping[str, Mapping[str, Mapping[int, Entry]]]) -> dict[str, dict[str, Entry]]:
    """Returns row -> training table -> an entry whose first and last evaluations are the means over its seeds."""
    found: dict[str, dict[str, Entry]] = {}
    for table, rows in by_table.items():
        for row, entries in rows.items():
            ends = [{seed: entry["evaluations"][i] for seed, entry in entries.items()} for i in (0, -1)]
            means = [
                {
                    name: estimate(list(known.values())).mean
                    for name in metrics_of(lines)
                    if (known := values_of(lines, name))
                }
                for lines in ends
            ]
            found.setdefault(row, {})[table] = next(iter(entries.values())) | {"evaluations": means}
    return found


def _higher(values: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Returns ", 7 of 10": on how many of the common tables the values are higher than the others; "" without any."""
    common = [table for table in values if table in others]
    return f", {sum(values[t] > others[t] for t in common)} of {len(common)}" if common else ""


_TABLE = re.compile(r"(<!-- results( by table)?: (\S+): ([^>]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def with_tables(text: str, directory: pathlib.Path, prefixes: tuple[str, ...]) -> str:
    """Returns a document with its tables written anew, from the files of results in a directory.

    A table is between `<!-- results: NAME: METRIC, METRIC -->`, for NAME.jsonl, and `<!-- end of results -->`. "results by
    table" makes those of `markdown_by_table`. Raises ConfigError for a file that is missing or damaged, and ValueError
    for results that make no table.
    """

    def table(match: re.Match) -> str:
        path, write = directory / f"{match[3]}.jsonl", markdown_by_table if match[2] else markdown
        if not (entries := read(path)):
            raise ConfigError(f"The document names the results {match[3]!r}, and {path} has none.")
        metrics = [name.strip() for name in match[4].split(",")]
        return f"{match[1]}{write(entries, metrics, prefixes)}\n{match[5]}"

    return _TABLE.sub(table, text)
