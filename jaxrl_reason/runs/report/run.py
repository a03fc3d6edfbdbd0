"""The report of a run, read from the files of its work directory."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
import time
from types import TracebackType
from typing import Any, Self

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config
from jaxrl_reason.rl.requirements import requirements
from jaxrl_reason.runs import eval_settings, pictures
from jaxrl_reason.runs.progress import duration
from jaxrl_reason.runs.report.completions import Samples, Tail
from jaxrl_reason.runs.report.curves import Curves
from jaxrl_reason.runs.report.page import write_page
from jaxrl_reason.runs.results import leaves
from jaxrl_reason.runs.trackers import names
from jaxrl_reason.runs.watch import mismatch_limit, Watch
from jaxrl_reason.runs.workdir import read_recipe

SHARE = 0.01  # of the time of a run that its report may take


class Report:
    """report.html of a work directory; a context manager, which brings it up to date at its end.

    It reads the lines that were added to the files since the last time. A resumed run goes on with its report.
    Only an `enabled` report writes.

    Args:
      workdir: the directory.
      config: of the run.
      limit: of the difference of sampler and trainer, from `watch.mismatch_limit`.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, limit: float, *, enabled: bool = True):
        self.path, self._workdir, self._config, self._enabled = workdir / "report.html", workdir, config, enabled
        self._metrics, self._curves = Tail(workdir / "metrics.jsonl"), Curves()
        self._samples = {name: Samples(workdir / f"{name}.jsonl") for name in ("held_out", "samples")}
        self._warnings: list[dict[str, Any]] = []
        self._step = 0  # the last one
        self._watch = Watch(lambda text: self._warnings.append({"step": self._step, "text": text}), limit)
        self._written: tuple[float, float] | None = None  # when the last writing ended, and its seconds

    def write(self) -> None:
        """Writes report.html, unless that would take more than `SHARE` of the time. Raises OSError on failure."""
        begin = time.monotonic()
        if self._written is None or begin - self._written[0] >= self._written[1] / SHARE:
            self.finish()

    def finish(self) -> None:
        """Writes report.html in any case. Raises OSError on failure."""
        if not self._enabled:
            return
        begin = time.monotonic()
        for line, _, _ in self._metrics.lines():
            self._step = line["step"]
            self._curves.add(line)
            if self._step > 0:
                self._watch.look(line)
        write_page(self.path, self._content())
        end = time.monotonic()
        self._written = end, end - begin

    def _content(self) -> dict[str, Any]:
        c = self._config
        return {
            "title": names(self._workdir)[1],
            "subtitle": f"{c.method.get('name')}, step {self._step} of {c.steps}",
            "facts": list(self._facts()),
            "warnings": [*self._warnings, *self._changed_evaluation()],
            "charts": self._curves.charts() + self._before_rl(),
            "completions": {name: samples.chosen() for name, samples in self._samples.items()},
            "fields": _fields(c, read_recipe(self._workdir)),
        }

    def _changed_evaluation(self) -> list[dict[str, Any]]:
        """Returns a warning if the held-out curves join evaluations of different settings."""
        if not eval_settings.have_changed(self._workdir, self._config):
            return []
        text = "The settings of the evaluation have changed since step 0, so points of the held-out curves cannot be compared."
        return [{"step": self._step, "text": text}]

    def _facts(self) -> Iterator[tuple[str, str]]:
        c, curves = self._config, self._curves
        yield "Model", c.model.path or f"{c.model.layers} layers of width {c.model.width}, from random weights"
        yield "Data", c.data.train
        yield (
            "Batch",
            f"{c.prompts_per_step} prompts x {c.group_size} completions of at most {c.max_completion_length} tokens",
        )
        yield "Seed", str(c.seed)
        if seconds := curves.total("perf/step_seconds"):
            yield "Time of RL", duration(seconds)
        over_all = "dynamic_sampling/reward"  # "reward" is the mean over the groups that are kept
        name = "reward" if curves.last(over_all) is None else over_all
        if (last := curves.last(name)) is not None:
            yield "Reward", f"{curves.first(name):.3g} → {last:.3g}"
        alike = eval_settings.are_those_of(self._workdir, c)
        for name, label in (("eval/accuracy", "Held-out accuracy"), ("eval/r2", "Held-out R2")):
            if (last := curves.last(name)) is not None:
                before = f"{pictures.cell(name, curves.first(name))} → " if alike and curves.begins(name) == 0 else ""
                yield label, f"{before}{pictures.cell(name, last)}"

    def _before_rl(self) -> list[dict[str, Any]]:
        """Returns the charts of the phases before RL. Their files are read anew: they end before the report begins."""
        charts = []
        for phase, title in (("supervised", "Supervised start"), ("reward_model", "Reward model")):
            curves = Curves()
            for line, _, _ in Tail(self._workdir / phase / "metrics.jsonl").lines():
                curves.add({name: x for name, x in line.items() if not name.startswith("perf/")})
            charts += [chart | {"title": f"{title}: {chart['title']}", "main": False} for chart in curves.charts()]
        return charts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif self._written is not None:
            with contextlib.suppress(OSError, ValueError):  # the error that ends the run is the one to show
                self.finish()


def report_of(workdir: pathlib.Path, config: Config) -> pathlib.Path:
    """Writes the report of an existing run and returns its path. Raises MetricsError for damaged files, and OSError."""
    report = Report(workdir, config, mismatch_limit(config, requirements(config, config_lib.make_method(config))))
    report.finish()
    return report.path


def _fields(config: Config, recipe: tuple[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Returns the fields of a configuration: names, values as text, and the values of the recipe and of the defaults.

    The value of a recipe or of the defaults is null if it is the same.
    """
    own, defaults = (dict(leaves(json.loads(json.dumps(config_lib.to_dict(c))))) for c in (config, Config()))
    name, values = recipe or ("", {})
    given = dict(leaves(values)) if recipe else own
    text = lambda fields, key: json.dumps(fields[key], ensure_ascii=False) if key in fields else "not set"
    rows = []
    for key in dict.fromkeys([*own, *given]):
        value, of_recipe, default = (text(fields, key) for fields in (own, given, defaults))
        rows.append([key, value, of_recipe if of_recipe != value else None, default if default != value else None])
    return {"recipe": name, "rows": rows}
