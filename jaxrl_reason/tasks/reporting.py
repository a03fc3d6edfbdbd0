"""The results of an evaluation for people: tables on the screen, pictures, and lines of files."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np
from rich.table import Column, Table

from jaxrl_reason import data
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data.tables import TargetScaler
from jaxrl_reason.methods import Method
from jaxrl_reason.runs import results
from jaxrl_reason.runs.files import finite, write_json, write_text
from jaxrl_reason.runs.pictures import AS_IT_IS, cell, is_share
from jaxrl_reason.tasks import evaluation
from jaxrl_reason.tasks.task import Judged

Intervals = Mapping[str, tuple[float, float]]  # name of a metric -> low and high
BASELINES = (
    "pointwise/",
    "squared_error_head/",
    "least_squares/",
    "best_possible/",
)  # prefixes of the metrics of other approaches


def headlines(method: Method) -> tuple[str, ...]:
    """Returns the prefixes of the held-out metrics that a summary of a run shows; metrics.jsonl has all metrics."""
    shown = ["accuracy", "pass@", "mean_length", "r2", "median_r2", "greedy_r2", "rmse", "spearman", "spread"]
    if "values" in method.signals:
        shown += ["h_accuracy", "value_density", "high_value", "low_value"]
    if method.loss.find("self_reward"):
        shown += ["self_reward", "logprob_auc", "best_of", "maj@", "weighted_vote"]
    if "answer_confidence" in method.signals:
        shown += ["distinct_correct_answers", "entropy"]
    return tuple(shown)


def results_directory(
    chosen: pathlib.Path | None, folder: pathlib.Path, record: Mapping[str, Any], name: str = "evaluation"
) -> pathlib.Path:
    """Makes and returns the directory for the results of an evaluation; it holds no results of another one.

    It is `chosen`, if that is not None. Otherwise it is the first of FOLDER/NAME, FOLDER/NAME-2, ... that is free, or holds
    the same evaluation: an equal `record`, up to the command line and the results. Raises ConfigError if `chosen` is a
    file, holds another evaluation, or has files that this one would replace and no evaluation.json; OSError if it cannot
    be made.
    """
    if chosen is None:
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        chosen = next(path for name in names if not _holds_other(path := folder / name, record))
    elif chosen.exists() and not chosen.is_dir():
        raise ConfigError(f"--out={chosen} is a file; name a directory.")
    elif _holds_other(chosen, record):
        raise ConfigError(f"--out={chosen} holds another evaluation; name another directory, or remove this one.")
    elif file := _unexplained(chosen, record):
        raise ConfigError(
            f"--out={chosen} has {file} without evaluation.json, so it may not be of this evaluation; name another directory, "
            "or remove the file."
        )
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"{chosen} cannot be made: {e.strerror}. Name another directory with --out.") from e
    return chosen


def _unexplained(directory: pathlib.Path, record: Mapping[str, Any]) -> str:
    """Returns a file with the name of a result in a folder without evaluation.json; "" if there is none.

    A killed evaluation leaves an empty file there at most: evaluation.json is written before the first result.
    """
    for label in ("", *record.get("sets", ())):
        if not (directory / label / "evaluation.json").exists():
            for name in ("completions.jsonl", "predictions.jsonl", "evaluation.png"):
                path = directory / label / name
                if path.exists() and path.stat().st_size:
                    return str(path.relative_to(directory))
    return ""


def holds(directory: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Returns whether a directory holds this evaluation, finished or begun."""
    return (directory / "evaluation.json").exists() and not _holds_other(directory, record)


def _holds_other(directory: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Returns whether a directory, or the folder of a set in it, holds results of another evaluation, or is a file."""
    file = directory / "evaluation.json"
    if any(_holds_other(directory / label, found) for label, found in record.get("sets", {}).items()):
        return True
    if not file.exists():
        return directory.exists() and not directory.is_dir()
    try:
        return _identity(json.loads(file.read_bytes())) != _identity(json.loads(json.dumps(record)))
    except (ValueError, TypeError, KeyError, AttributeError):  # of an earlier version, or not ours
        return True


# Sections and fields that change no result. The fingerprint of the data tells other data in data.data_dir.
_NO_RESULT = (
    *("steps.", "mesh.", "checkpoint.", "log.", "compilation_cache."),
    *("reward.workers.", "data.data_dir."),
)


def _identity(record: Mapping[str, Any]) -> Any:
    """Returns the part of a record that decides the results of an evaluation."""
    if "sets" in record:
        return {label: _identity(found) for label, found in record["sets"].items()}
    config = {name: value for name, value in results.leaves(record["config"]) if not f"{name}.".startswith(_NO_RESULT)}
    read = [record.get(name) or None for name in ("weights", "changed", "reward_files")]
    return [record["checkpoint"], *read, record["data"], config]


def write_results(
    directory: pathlib.Path, judged: Judged, metrics: Mapping[str, float], record: Mapping[str, Any], title: str
) -> list[str]:
    """Writes an evaluation's lines, its picture and, as evaluation.json, `record`. Returns the names of the files.

    evaluation.json has its numbers last: if they are there, the other files belong to the same evaluation. `title` is
    that of the picture.
    """
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in judged.lines())
    write_text(directory / judged.file, "".join(lines))
    judged.draw(metrics, directory / "evaluation.png", title)
    write_json(directory / "evaluation.json", record)
    return ["evaluation.json", "evaluation.png", judged.file]


def completion_lines(
    found: evaluation.Evaluated,
    template: data.PromptTemplate | data.ChatTemplate,
    pieces: Callable[[list[int]], list[str]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the lines of completions.jsonl and of held_out.jsonl, one per decoded completion.

    `template` renders the prompts. `pieces` returns the text of each token; with it, lines also have the tokens and their
    log-probabilities, if `found` has them.
    """
    if found.answers is None or found.texts is None:
        raise ValueError("These completions are not decoded, so they cannot be written.")
    for n, k in np.ndindex(*found.correct.shape):
        answer = found.answers[n][k]
        record = {
            "row": int(found.positions[n]),
            "sample": k,
            "prompt": template.render_prompt(found.rows[n]),
            "completion": found.texts[n][k],
            "answer": None if answer is None else str(answer),
            "correct": bool(found.correct[n, k]),
            "rewards": {name: finite(values[n, k]) for name, values in found.rewards.items()},
            "total": finite(found.total[n, k]),
            "length": int(found.lengths[n, k]),
            "truncated": bool(found.truncated[n, k]),
            "logprob": finite(found.logprobs[n, k]),
        }
        if found.self_rewards is not None:
            record["self_reward"] = finite(found.self_rewards[n, k])
        if pieces and found.sampled is not None:
            ids, logprobs = found.sampled[n][k]
            record["tokens"] = pieces(ids.tolist())
            record["logprobs"] = [finite(round(float(x), 3)) for x in logprobs]
        yield record


def prediction_lines(
    samples: np.ndarray, z: np.ndarray, targets: np.ndarray, scale: TargetScaler
) -> Iterator[dict[str, Any]]:
    """Yields the lines of predictions.jsonl, one per row of the table.

    `samples` f32[N, K] and `z` f32[N] are predictions and targets as z-scores. `targets` float64[M], M >= N, are in
    their own unit, to which `scale` converts.
    """
    for i, (drawn, z_score) in enumerate(zip(samples, z)):
        yield {
            "row": i,
            "target": float(targets[i]),
            "mean": finite(scale.from_z(float(drawn.mean()))),
            "median": finite(scale.from_z(float(np.median(drawn)))),
            "target_z": float(z_score),
            "samples_z": [finite(x) for x in drawn],
        }


def metric_tables(metrics: Mapping[str, float], intervals: Intervals, title: str) -> list[Table]:
    """Returns tables for the screen: metrics, and pass@k next to maj@k. Shares are in percent, NaN is a dash."""
    columns = [Column("95 % interval", justify="right")] if intervals else []
    main = Table("", Column(justify="right"), *columns, title=title)
    curve = Table("k", "pass@k", "95 % interval", "maj@k", "95 % interval")
    for name, value in metrics.items():
        kind, _, k = name.partition("@")
        if kind == "pass":
            both = [
                f(x)
                for x in (name, f"maj@{k}")
                for f in (lambda x: _cell(x, metrics[x]), lambda x: _range(intervals, x))
            ]
            curve.add_row(k, *both)
        elif kind != "maj" and name not in ("accuracy_low", "accuracy_high"):
            of_what = "accuracy" if kind == "avg" else name
            main.add_row(name.replace("_", " "), _cell(name, value), *[_range(intervals, of_what) for _ in columns])
    return [main, curve] if curve.row_count else [main]


def _range(intervals: Intervals, name: str) -> str:
    """Returns an interval in percent, or "" if there is none."""
    return "{:.1f} to {:.1f} %".format(*(100 * x for x in intervals[name])) if name in intervals else ""


def table_of_sets(record: Mapping[str, Any], title: str) -> Table:
    """Returns the table of an evaluation of several sets, from its record, with the intervals below the shares."""
    headings = [f"{kind}\n95 % interval" for kind in ("avg@k", "pass@k", "maj@k")]
    table = Table("set", "prompts", "k", *headings, title=title)
    both = lambda value, found, name: f"{_cell('avg@k', value)}\n{_range(found, name).removesuffix(' %')}"
    for label, found in record["sets"].items():
        k, metrics, intervals = found["samples"], found["metrics"], found["intervals"]
        names = ("accuracy", f"pass@{k}", f"maj@{k}")
        table.add_row(label, str(found["prompts"]), str(k), *(both(metrics[x], intervals, x) for x in names))
    mean = record["all"]
    known = {} if mean["low"] is None else {"mean": (mean["low"], mean["high"])}
    table.add_section()
    table.add_row("mean", "", "", both(mean["mean"], known, "mean"))
    return table


def plot_sets(record: Mapping[str, Any], path: pathlib.Path, title: str) -> None:
    """Draws the accuracy of each set with its interval, and pass@k of all samples."""
    from matplotlib.figure import Figure  # costs a fifth of a second; needed only at the end

    sets = record["sets"]
    figure = Figure(figsize=(2 + 1.2 * len(sets), 4), layout="constrained")
    figure.suptitle(title, **AS_IT_IS)
    axes, at = figure.subplots(), np.arange(len(sets))
    accuracy = np.array([100 * found["metrics"]["accuracy"] for found in sets.values()])
    low, high = 100 * np.array([found["intervals"]["accuracy"] for found in sets.values()]).T
    axes.bar(at, accuracy, yerr=[accuracy - low, high - accuracy], capsize=4, label="avg@k, 95 % interval")
    best = [100 * found["metrics"][f"pass@{found['samples']}"] for found in sets.values()]
    axes.plot(at, best, "_", color="tab:orange", markersize=24, label="pass@k")
    axes.set_xticks(at, [f"{label}\nk = {found['samples']}" for label, found in sets.items()], **AS_IT_IS)
    axes.set(ylabel="%")
    axes.legend(loc="best")
    figure.savefig(path, dpi=120, format="png")


def _cell(name: str, value: float) -> str:
    """Formats a metric as `pictures.cell` does; but an int has no places, and a number below 10 has three."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 and not is_share(name) else cell(name, value)


def plot_completions(found: evaluation.Evaluated, metrics: Mapping[str, float], path: pathlib.Path, title: str) -> None:
    """Draws pass@k and maj@k over k, from `evaluation.all_metrics`, and the number of prompts by their accuracy."""
    samples = found.correct.shape[1]
    ks = evaluation.powers(samples)
    with _two_plots(path, title) as (curves, histogram):
        for kind in ("pass", "maj"):
            curves.plot(ks, [100 * metrics[f"{kind}@{k}"] for k in ks], "o-", label=f"{kind}@k")
        low, high = (100 * metrics[f"accuracy_{end}"] for end in ("low", "high"))
        curves.axhspan(low, high, alpha=0.2, color="tab:gray", label="accuracy, 95 % interval")
        curves.set_xscale("log", base=2)
        curves.set_xticks(ks, [str(k) for k in ks])
        curves.set(xlabel="k, completions per prompt", ylabel="%")
        curves.legend(loc="best")
        counts = np.bincount(found.correct.sum(axis=1), minlength=samples + 1)
        histogram.bar(100 * np.arange(samples + 1) / samples, counts, width=80 / (samples + 1))
        histogram.set(xlabel=f"accuracy of a prompt over {samples} completions (%)", ylabel="prompts")


def plot_predictions(samples: np.ndarray, targets: np.ndarray, path: pathlib.Path, title: str) -> None:
    """Draws mean and standard deviation of z-scores [N, K] over the targets [N], and a histogram of the errors."""
    samples = samples.astype(np.float64)  # squares of numbers of the wide alphabets overflow float32
    mean = samples.mean(axis=1)
    errors = mean - targets
    with _two_plots(path, title) as (scatter, histogram):
        scatter.errorbar(targets, mean, yerr=samples.std(axis=1), fmt="o", ms=2, lw=0.5, alpha=0.5)
        scatter.axline((0, 0), slope=1, color="tab:gray", lw=1)
        scatter.set(xlabel="target (z-score)", ylabel=f"mean of {samples.shape[1]} samples (z-score)")
        histogram.hist(errors[np.isfinite(errors)], bins=40)
        histogram.set(xlabel="error of the mean (z-score)", ylabel="rows")


@contextlib.contextmanager
def _two_plots(path: pathlib.Path, title: str) -> Iterator[Any]:
    """Yields the axes of two plots side by side, and then writes the picture."""
    from matplotlib.figure import Figure  # costs a fifth of a second; needed only at the end

    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot, which needs global state and a display
    figure.suptitle(title, **AS_IT_IS)
    axes = figure.subplots(1, 2)
    yield axes
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
