"""Looks again at a step whose loss or gradient was not finite: python -m jaxrl_reason.replay --workdir=DIR [--step=N]

A run that stops over such steps saves the last one's weights and batch under DIR/replay/N. This computes the loss and its gradient again,
of the whole batch and of each prompt alone, and names the weights, prompts and completions at fault. It takes the devices of one machine:
--config.mesh.fsdp=-1 and the like, where these are others than the run's.
"""

from collections.abc import Iterable
import dataclasses
import math
import pathlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from jaxrl_reason import models, runs, train
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rl import auxiliary, hosts
from jaxrl_reason.rl.types import Experience
from jaxrl_reason.runs import checkpoints

SHOWN = 3  # prompts at fault whose completions are printed


@dataclasses.dataclass(frozen=True)
class Found:
    """What became of a prompt, or of the whole batch.

    Attributes:
      prompt: its place in the batch; None: all of them.
      loss, grad_norm: of it alone.
      weights: names of the weights whose gradient is not finite.
    """

    prompt: int | None
    loss: float
    grad_norm: float
    weights: tuple[str, ...]

    finite = property(lambda self: math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def examine(run: train.Run, params: models.Params, batch: Experience) -> list[Found]:
    """The loss and gradient of the whole batch, and then of each prompt alone, the others masked."""
    sharding = run.programs.sharding
    found = []
    for prompt in (None, *range(len(batch.mask))):
        part = batch
        if prompt is not None:
            alone = hosts.put(np.arange(len(batch.mask)) == prompt, sharding)
            part = batch._replace(mask=batch.mask & alone[:, None, None])
        grads, metrics, *_ = run.programs.gradient(params, part)
        norms = jax.device_get(_norms(grads))
        bad = tuple(name for name, norm in _named(norms) if not math.isfinite(norm))
        whole = float(np.sqrt(sum(np.square(np.float64(norm)) for _, norm in _named(norms))))
        found.append(Found(prompt, float(metrics["loss"]), whole, bad))
    return found


_norms = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel()), tree))


def _named(tree) -> Iterable[tuple[str, np.ndarray]]:
    """(name, leaf) of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def load(run: train.Run, step: int) -> tuple[models.Params, Experience, dict[str, np.ndarray]]:
    """What `train.save_for_replay` has written at a step: weights, batch, rewards by name.

    Raises:
      CheckpointError: they cannot be read.
    """
    directory = run.work.path / "replay" / str(step)
    params = checkpoints.load_params(directory / "params", run.programs.abstract_state.params)
    batch, rewards = checkpoints.load_batch(directory / "batch.npz")
    put = lambda x: hosts.put(x, run.programs.sharding)
    batch = jax.tree.map(put, batch)
    active = auxiliary.at_step(run.method.loss, batch.auxiliary, batch.mask, step - 1)
    return params, batch._replace(auxiliary=active), rewards


def report(run: train.Run, step: int, console: rich.console.Console) -> list[Found]:
    """Prints what `examine` finds out about a saved step, and returns it."""
    params, batch, rewards = load(run, step)
    bad = [name for name, x in _named(params) if not bool(jnp.isfinite(x).all())]
    if bad:
        console.print(f"Weights that hold numbers which are not finite: {', '.join(bad)}.", soft_wrap=True)
    whole, *prompts = examine(run, params, batch)
    console.print(f"Step {step}: loss {whole.loss:.4g}, gradient norm {whole.grad_norm:.4g}.")
    if whole.weights:
        console.print(f"Not finite in the gradient of {', '.join(whole.weights)}.", soft_wrap=True)
    faulty = [found for found in prompts if not found.finite]
    if not faulty:
        console.print(
            "Each prompt alone has a finite loss and gradient" + ("." if whole.finite else "; their sum overflows.")
        )
    table = rich.table.Table("prompt", "loss", "gradient norm", "largest |advantage|")
    largest = np.abs(batch.advantages).reshape(len(prompts), -1).max(axis=1)
    for found in sorted(prompts, key=lambda found: (found.finite, -np.nan_to_num(found.grad_norm, nan=np.inf)))[:10]:
        numbers = (found.loss, found.grad_norm, float(largest[found.prompt]))
        table.add_row(str(found.prompt), *(f"{x:.4g}" for x in numbers))
    console.print(table)
    for found in faulty[:SHOWN]:
        _print_prompt(run, batch, rewards, found.prompt, console)
    return [whole, *prompts]


def _print_prompt(run: train.Run, batch: Experience, rewards, p: int, console: rich.console.Console) -> None:
    short = lambda text: textwrap.shorten(
        repr(text), 200, placeholder="..."
    )  # repr: what a terminal would obey is escaped
    rollout = jax.device_get(jax.tree.map(lambda x: x[p], batch.rollout))
    (prompt,) = run.tokenizer.decode_batch([rollout.prompt_tokens[rollout.prompt_mask].tolist()])
    console.print(f"Prompt {p}: {short(prompt)}", soft_wrap=True)
    texts = run.tokenizer.decode_batch([t[m].tolist() for t, m in zip(rollout.tokens, rollout.mask)])
    for g, text in enumerate(texts):
        given = ", ".join(f"{name} {values[p, g]:.4g}" for name, values in rewards.items())
        advantage = float(np.asarray(batch.advantages)[p, g].max())
        console.print(f"  {g}: {given}, advantage {advantage:.4g}: {short(text)}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        texts = dict(argument.removeprefix("--").partition("=")[::2] for argument in argv)
        mesh = {name for name in texts if name.startswith("config.mesh.")}
        if not texts.get("workdir") or texts.keys() - {"workdir", "step"} - mesh:
            raise ConfigError(
                "Give --workdir=DIR, --step=N for another step than the last, and --config.mesh.NAME=SIZE for another mesh; not "
                f"{' '.join(argv)}."
            )
        workdir = pathlib.Path(texts["workdir"]).expanduser().resolve()
        config = runs.load_config(workdir, {name.removeprefix("config."): texts[name] for name in mesh})
        saved = runs.numbers_in(workdir / "replay")
        if not saved:
            raise ConfigError(
                f"{workdir} holds no step to replay: no run there has stopped over one that is not finite."
            )
        step = texts.get("step") or str(saved[0])
        if step not in map(str, saved):
            raise ConfigError(f"--step={step}: {workdir / 'replay'} holds {', '.join(map(str, saved))}.")
        report(train.setup(config, workdir), int(step), rich.console.Console(highlight=False, markup=False))
    except (RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
