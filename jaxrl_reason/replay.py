"""Finds the cause of a step whose loss or gradient was not finite.

A run that stops after such steps saves the weights and the batch of the last one under DIR/replay/N. This command
computes the loss and its gradient again, of the whole batch and of each prompt alone, and names the weights, prompts
and completions that are not finite. It runs on the devices of one machine: use --config.mesh.fsdp=-1 if the run had
other devices.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import sys
import textwrap
from typing import Any, NamedTuple

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
from jaxrl_reason.runs import checkpoints, command

SHOWN = 3  # number of faulty prompts whose completions are printed


@dataclasses.dataclass(frozen=True)
class Found:
    """The loss and gradient of one prompt, or of the whole batch."""

    prompt: int | None  # its index in the batch; None for the whole batch
    loss: float
    grad_norm: float
    weights: tuple[str, ...]  # names of the weights whose gradient is not finite

    finite = property(lambda self: math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def examine(run: train.Run, params: models.Params, batch: Experience) -> list[Found]:
    """Computes the loss and gradient of the whole batch, and then of each prompt with all others masked."""
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


def _named(tree: Any) -> Iterable[tuple[str, np.ndarray]]:
    """Yields (name, leaf) for every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


class Saved(NamedTuple):
    """A step that a run has saved: number, weights before its update, data of its update, rewards f32[P,G] by name."""

    step: int
    params: models.Params
    batch: Experience
    rewards: dict[str, np.ndarray]


def load(run: train.Run, step: int) -> Saved:
    """Reads a step that a run has saved for replay; raises CheckpointError for an unreadable one."""
    directory = run.work.path / "replay" / str(step)
    params = checkpoints.load_params(directory / "params", run.programs.abstract_state.params)
    batch, rewards = checkpoints.load_batch(directory / "batch.npz")
    batch = jax.tree.map(lambda x: hosts.put(x, run.programs.sharding), batch)
    active = auxiliary.at_step(run.method.loss, batch.auxiliary, batch.mask, step - 1)
    return Saved(step, params, batch._replace(auxiliary=active), rewards)


def report(run: train.Run, saved: Saved, console: rich.console.Console) -> list[Found]:
    """Prints the results of `examine` for a saved step, and returns them."""
    step, params, batch, rewards = saved
    bad = [name for name, x in _named(params) if not bool(jnp.isfinite(x).all())]
    if bad:
        console.print(f"Weights that are not finite: {', '.join(bad)}.", soft_wrap=True)
    whole, *prompts = examine(run, params, batch)
    console.print(f"Step {step}: loss {whole.loss:.4g}, gradient norm {whole.grad_norm:.4g}.")
    if whole.weights:
        console.print(f"Not finite in the gradient of {', '.join(whole.weights)}.", soft_wrap=True)
    if all(found.finite for found in prompts):
        end = "." if whole.finite else "; their sum overflows."
        console.print(f"Each prompt alone has a finite loss and gradient{end}")
    table = rich.table.Table("prompt", "loss", "gradient norm", "largest |advantage|")
    largest = np.abs(batch.advantages).reshape(len(prompts), -1).max(axis=1)
    order = lambda p: (prompts[p].finite, -np.nan_to_num(prompts[p].grad_norm, nan=np.inf))
    for p in sorted(range(len(prompts)), key=order)[:10]:
        table.add_row(str(p), *(f"{x:.4g}" for x in (prompts[p].loss, prompts[p].grad_norm, float(largest[p]))))
    console.print(table)
    for p in [p for p, found in enumerate(prompts) if not found.finite][:SHOWN]:
        _print_prompt(run, batch, rewards, p, console)
    return [whole, *prompts]


def _print_prompt(
    run: train.Run, batch: Experience, rewards: Mapping[str, np.ndarray], p: int, console: rich.console.Console
) -> None:
    """Prints a prompt of a batch and its completions with their rewards and advantages."""
    # repr escapes characters that a terminal would obey.
    short = lambda text: textwrap.shorten(repr(text), 200, placeholder="...")
    rollout = jax.device_get(jax.tree.map(lambda x: x[p], batch.rollout))
    (prompt,) = run.tokenizer.decode_batch([rollout.prompt_tokens[rollout.prompt_mask].tolist()], skip_special=False)
    console.print(f"Prompt {p}: {short(prompt)}", soft_wrap=True)
    texts = run.tokenizer.completions([t[m].tolist() for t, m in zip(rollout.tokens, rollout.mask)])
    for g, text in enumerate(texts):
        given = ", ".join(f"{name} {values[p, g]:.4g}" for name, values in rewards.items())
        advantage = float(np.asarray(batch.advantages)[p, g].max())
        console.print(f"  {g}: {given}, advantage {advantage:.4g}: {short(text)}", soft_wrap=True)


COMMAND = command.Command(
    "replay",
    __doc__,
    (
        command.WORKDIR,
        command.Flag("step", "N", "a number under DIR/replay; the last by default", command.number),
        command.RECIPE,
        command.Flag("config.mesh.", "NAME=SIZE", "another size of the mesh, such as --config.mesh.fsdp=-1"),
    ),
    "--workdir=/tmp/quickstart",
    errors=(RewardError,),
)


def prepare(arguments: command.Arguments) -> tuple[train.Run, Saved]:
    """Sets the run up and reads the saved step; raises ConfigError or CheckpointError without a readable one."""
    workdir = arguments.workdir
    command.load_recipe(arguments)
    config = runs.load_config(workdir, arguments.fields)
    saved = runs.numbers_in(workdir / "replay")
    if not saved:
        raise ConfigError(f"{workdir} holds no step to replay: no run there has stopped at a step that is not finite.")
    step = saved[0] if arguments.step is None else arguments.step
    if step not in saved:
        raise ConfigError(f"--step={step}: {workdir / 'replay'} holds {', '.join(map(str, saved))}.")
    run = train.setup(config, workdir, begin=False)
    return run, load(run, step)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    return command.run(COMMAND, argv, prepare, lambda prepared: report(*prepared, console))


if __name__ == "__main__":
    sys.exit(main())
