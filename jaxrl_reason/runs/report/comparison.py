"""The report of a comparison: curves of its rows with their intervals, and tables of the results."""

from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any

from jaxrl_reason.runs import pictures, summary
from jaxrl_reason.runs.report.curves import rounded
from jaxrl_reason.runs.report.page import write_page
from jaxrl_reason.runs.statistics import Estimate


def write_comparison(
    path: pathlib.Path,
    rows: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Mapping[int, Estimate]]],
    metrics: Sequence[str],
    places: Mapping[str, Mapping[int, str]],
    *,
    title: str,
) -> None:
    """Writes comparison.html. Raises OSError on failure.

    Args:
      path: of the file.
      rows: row -> metrics, as in comparison.json.
      curves: metric -> row -> step -> mean over seeds.
      metrics: names of the metrics in the tables.
      places: row -> seed -> the report of the run, relative to `path`; empty if there is none.
      title: of the page.
    """
    seeds = sorted({int(seed) for row in rows.values() for seed in row.get("runs", ())})
    note = "Means over seeds, with their 95 % intervals (Student's t) as bands." if len(seeds) > 1 else _ONE_SEED
    content = {
        "title": title,
        "subtitle": f"{len(rows)} rows, seeds {', '.join(map(str, seeds))}. {note} {pictures.unit_note(metrics)}".strip(),
        "facts": [],
        "charts": [_chart(name, of_rows) for name, of_rows in curves.items()],
        "tables": list(_tables(rows, metrics, places)),
    }
    write_page(path, content)


_ONE_SEED = "One seed, so there are no intervals: a difference can be noise."


def _chart(metric: str, of_rows: Mapping[str, Mapping[int, Estimate]]) -> dict[str, Any]:
    curves = []
    for row, points in of_rows.items():
        curve: dict[str, Any] = {
            "name": row,
            "steps": list(points),
            "values": rounded([p.mean for p in points.values()]),
        }
        if any(p.half_width is not None for p in points.values()):
            ends = lambda sign: rounded([p.mean + sign * (p.half_width or 0.0) for p in points.values()])
            curve |= {"low": ends(-1), "high": ends(1)}
        curves.append(curve)
    unit = "%" if pictures.is_share(metric) else ""
    return {"title": _label(metric), "unit": unit, "log": False, "main": True, "curves": curves}


def _tables(
    rows: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], places: Mapping[str, Mapping[int, str]]
) -> Iterator[dict[str, Any]]:
    head, headings = ["", *map(_label, metrics)], summary.headings(rows)
    cells = lambda row: [pictures.cell_with_interval(n, row.get(n), row.get("half_width", {}).get(n)) for n in metrics]
    note = "The last evaluation: mean over seeds ± half-width of the 95 % interval."
    yield {
        "title": "Results",
        "note": note,
        "head": head,
        "rows": [[headings[name], *cells(row)] for name, row in rows.items()],
    }
    compared = summary.compared(rows, metrics)
    differences = [
        [headings[name], *(pictures.cell_of_difference(n, row["difference"].get(n)) for n in compared)]
        for name, row in rows.items()
        if row.get("difference")
    ]
    if differences:
        recipe = next((name for name, row in rows.items() if "runs" in row and not row["difference"]), "the recipe")
        note = f"To {recipe}, paired by seed, with the 95 % interval. An interval without 0 is a difference beyond noise of seeds."
        note += f" {summary.OTHER_PROMPTS_NOTE}" if len(compared) > len(metrics) else ""
        yield {"title": "Differences", "note": note, "head": ["", *map(_label, compared)], "rows": differences}
    fields = list(dict.fromkeys(name for row in rows.values() for name in row.get("differs", {})))
    if fields:
        values = lambda row: ["" if n not in row["differs"] else json.dumps(row["differs"][n]) for n in fields]
        own = [[name, *values(row)] for name, row in rows.items() if "differs" in row]
        yield {"title": "Fields that differ", "note": "", "head": ["", *fields], "rows": own}
    runs = [
        [name, seed, f"{run['seconds'] / 60:.1f}", {"text": "report", "link": link} if link else "elsewhere"]
        for name, row in rows.items()
        for seed, run in row.get("runs", {}).items()
        for link in [places.get(name, {}).get(int(seed))]
    ]
    yield {"title": "Runs", "note": "", "head": ["", "seed", "minutes of RL", "report"], "rows": runs}


def _label(metric: str) -> str:
    return metric.removeprefix("eval/").replace("_", " ")
