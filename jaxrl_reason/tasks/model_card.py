"""The model card of an exported model: README.md with base model, licence, recipe, held-out metrics and versions.

It names no path of this machine: of a local file, it has the name only.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from jaxrl_reason import config as config_lib
from jaxrl_reason import methods
from jaxrl_reason.config import Config
from jaxrl_reason.config.validate import PATHS
from jaxrl_reason.data import hub
from jaxrl_reason.models.formats.source import REVISION
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rewards import model_files
from jaxrl_reason.runs import read_metrics, results
from jaxrl_reason.runs.workdir import model_source

_MACHINE = ("compilation_cache", "data.data_dir", "mesh", "log", "checkpoint")  # say nothing about the model
_LICENSE = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Exported:
    """The exported part of a run."""

    name: str  # of the repository or the directory
    workdir: pathlib.Path
    config: Config
    checkpoint: int | None  # None: the reward model
    adapters: bool = False  # whether only the adapters


def model_card(x: Exported) -> str:
    """Returns the content of README.md."""
    from huggingface_hub import ModelCardData  # costs a second

    judge, base = x.checkpoint is None, _base(x)
    if x.checkpoint is None:
        made, tags = "trained on preference pairs with jaxrl_reason", ["reward-model", *_methods(x.config)]
    elif x.checkpoint <= x.config.supervised.steps:
        taught = x.checkpoint > 0 or x.config.supervised.start_from
        made = (
            "trained on worked solutions with jaxrl_reason" if taught else "made with jaxrl_reason before any training,"
        )
        tags = []
    else:
        made = "trained by reinforcement learning with jaxrl_reason"
        tags = ["reinforcement-learning", *_methods(x.config)]
    facts: dict[str, Any] = {name: value for name, value in base.items() if name != "shown"}
    data = ModelCardData(
        **facts,
        library_name="peft" if x.adapters else "transformers",
        pipeline_tag="text-classification" if judge else "text-generation",
        tags=["jaxrl_reason", *tags],
    )
    what = "A reward model" if judge else "Adapters (LoRA)" if x.adapters else "A language model"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {x.name}",
        f"{what}, {made} from {base['shown']}.",
        f"## Method\n\n{_description(x.config)}" if "reinforcement-learning" in tags else "",
        f"## Held-out metrics\n\n{_held_out(x)}",
        "## Recipe\n\nFields of the configuration that differ from their defaults, without those of checkpoints, logs and devices; of local files, the name only.\n\n"
        f"```json\n{json.dumps(recipe(x.config), indent=2, ensure_ascii=False)}\n```",
        "## Versions\n\nOf the export:\n\n" + "\n".join(f"- {k} {v}" for k, v in results.versions().items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def recipe(config: Config) -> dict[str, Any]:
    """Returns the fields of a configuration that differ from their defaults, with names for local paths."""
    fields, defaults = (dict(results.leaves(config_lib.to_dict(c))) for c in (config, Config()))
    without = tuple(f"{name}." for name in _MACHINE)
    chosen = {
        name: value
        for name, value in fields.items()
        if value != defaults.get(name) and not f"{name}.".startswith(without)
    }
    for name in PATHS:
        if name in chosen:
            value = chosen[name]
            chosen[name] = [public(str(x)) for x in value] if isinstance(value, list) else public(str(value))
    return chosen


def public(text: str) -> str:
    """Returns the last part of a local path; the text if it is another name, such as an id of the hub.

    Example:
      >>> public("/home/me/rewards.py:brevity")
      'rewards.py:brevity'
    """
    if config_lib.remote(text) or (hub.is_address(text) and not pathlib.Path(text).exists()):
        return text
    return text.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _methods(config: Config) -> list[str]:
    return str(config.method["name"]).split("+")


def _description(config: Config) -> str:
    known = methods.names()
    lines = [f"- `{name}`" + (f": {methods.summary(name)}" if name in known else "") for name in _methods(config)]
    return "\n".join(lines)


def _base(x: Exported) -> dict[str, str]:
    """Returns the fields of the card that come from the base model; "shown" are words for it."""
    path, source = x.config.model.path, model_source(x.workdir) or {}
    if not path:
        return {"shown": "random weights"}
    revision, card = source.get(REVISION), None
    if revision:
        name = hub.name_of(path)
        card = hub.cached(name, "README.md", revision)
        facts = {"base_model": name, "shown": f"[{name}](https://huggingface.co/{name}) (revision {revision})"}
    else:
        card = pathlib.Path(path).expanduser() / "README.md"
        facts = {"shown": f"a local model, {public(path)}"}
    return facts | _license(card)


def _license(card: pathlib.Path | None) -> dict[str, str]:
    """Returns the fields on the licence in the head of a model card; none if there is no card or no licence."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(card.read_text(encoding="utf-8")).data.to_dict() if card and card.is_file() else {}
    except Exception:  # a stranger's YAML: many classes
        return {}
    return {name: str(found[name]) for name in _LICENSE if isinstance(found.get(name), str)}


def _held_out(x: Exported) -> str:
    """Returns tables of the evaluations of a checkpoint, or of the last evaluation of its training."""
    if x.checkpoint is None:
        return _table(read_json(x.workdir / "reward_model" / model_files.DESCRIPTION).get("held_out", {}))
    tables = []
    for file in sorted(x.workdir.glob("evaluation*/evaluation.json")):
        found = read_json(file)
        for record in found.get("sets", {"": found}).values():
            if record.get("checkpoint") == x.checkpoint and isinstance(record.get("metrics"), dict):
                title = f"{public(record['data']['name'])}, {record['data']['split']}: {_sampling(record)}"
                tables.append(f"{title}\n\n{_table(record['metrics'], record.get('intervals', {}))}")
    return "\n\n".join(tables) or _in_training(x)


def _in_training(x: Exported) -> str:
    assert x.checkpoint is not None
    file, step = x.workdir / "metrics.jsonl", x.checkpoint - x.config.supervised.steps
    lines = [line for line in (read_metrics(file) if file.exists() else ()) if line["step"] <= step]
    measured = [line for line in lines if any(name.startswith("eval/") for name in line)]
    if not measured:
        return "None were measured."
    found = {name.removeprefix("eval/"): x for name, x in measured[-1].items() if name.startswith("eval/")}
    c = x.config
    title = f"{public(c.data.eval or c.data.train)}, {c.data.eval_split}, after RL step {measured[-1]['step']} of the training"
    return f"{title}: {_sampling(vars(c.eval))}\n\n{_table(found)}"


def _sampling(settings: Mapping[str, Any]) -> str:
    """Returns the settings of an evaluation as text."""
    samples, top_k, top_p = settings["samples"], settings.get("top_k", 0), settings.get("top_p", 1.0)
    parts = [f"{samples} sample{'s' if samples > 1 else ''} per prompt", f"temperature {settings['temperature']:g}"]
    parts += [f"top-k {top_k}"] if top_k else []
    return ", ".join([*parts, f"top-p {top_p:g}"] if top_p < 1 else parts)


def _table(metrics: Mapping[str, Any], intervals: Mapping[str, Sequence[float]] | None = None) -> str:
    """Returns a table of metrics, with their `intervals`, or with NAME_low to NAME_high of the metrics."""
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in metrics.items():
        if name in ends or not isinstance(value, (int, float)):
            continue
        interval: Sequence[Any] = (intervals or {}).get(name) or [
            metrics.get(f"{name}_{end}") for end in ("low", "high")
        ]
        shown = "" if None in interval else f"{interval[0]:.4g} to {interval[1]:.4g}"
        rows.append(f"| {name} | {value:.4g} | {shown} |")
    return "\n".join(rows)
