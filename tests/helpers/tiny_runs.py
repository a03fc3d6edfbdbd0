"""Runs that are small enough for tests: twenty rows, a model of width 16, programs that compile in seconds."""

from collections.abc import Callable
import dataclasses
import json

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Log, Model, Supervised, to_dict
from jaxrl_reason.rl.programs import Programs

ROWS = [{"question": f"Write {i}.", "solution": f"#### {i}", "answer": str(i), "row": i} for i in range(20)]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path, config: Config, baselines=None):
    """Writes a recipe file for `config`, and `get_baselines()` if there are baselines. Returns the path."""
    lines = [
        "from jaxrl_reason.config import from_dict",
        "def get_config():",
        f"    return from_dict({to_dict(config)!r})",
    ]
    if baselines is not None:
        lines += ["def get_baselines():", f"    return {baselines!r}"]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny(rows, **changes) -> Config:
    """Returns a short run on a JSONL file with the fields `changes`. update__epochs=2 sets update.epochs."""
    config = Config(
        steps=2,
        prompts_per_step=4,
        group_size=4,
        max_prompt_length=16,
        max_completion_length=6,
        model=Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16),
        data=Data(train=str(rows), train_split="all", eval_split="all", vocab_size=300),
        supervised=Supervised(steps=0, batch_size=4),
        checkpoint=Checkpoint(every=100),
        eval=Eval(every=0, prompts=4, samples=2),
        log=Log(progress=False, tensorboard=False, samples_every=0),
    )
    return change(config, **changes)


def change(config: Config, **changes) -> Config:
    """Sets fields in place. Two underscores join a section and its field."""
    for name, value in changes.items():
        *sections, field = name.split("__")
        at = config
        for section in sections:
            at = getattr(at, section)
        if not hasattr(at, field):
            raise AttributeError(name)
        setattr(at, field, value)
    return config


def with_program(programs: Programs, name: str, wrap: Callable) -> Programs:
    """Returns the programs with `jitted[name]` replaced by `wrap(jitted[name])`."""
    return dataclasses.replace(programs, jitted={**programs.jitted, name: wrap(programs.jitted[name])})
