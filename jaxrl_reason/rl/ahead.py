"""Compiles the large programs of a run in threads, before their first calls: at the same time, and while other programs run.

A call of a program that is being compiled waits for it, see `Programs`. JAX finds the compiled program by the shapes and
shardings of the arguments. If a description here did not match a call, the call would compile the program again.
"""

from collections.abc import Callable, Iterable
import concurrent.futures
import functools
import os
from typing import Any

import jax
import numpy as np

from jaxrl_reason.data import PromptBatch, SolutionBatch
from jaxrl_reason.models import sharding
from jaxrl_reason.rl.memory import release_freed_blocks
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Groups

_THREADS = min(4, os.cpu_count() or 1)


def compile_ahead(
    programs: Programs,
    *,
    prompts: PromptBatch,
    solutions: SolutionBatch | None = None,
    held_out: PromptBatch | None = None,
    rewards: Iterable[str] = (),
) -> None:
    """Begins to compile the programs that a run calls, and returns at once.

    The update is compiled ahead if it takes no log-probabilities of other programs: its arguments are then known.

    Args:
      prompts: a batch of the RL phase, for its shapes.
      solutions: a batch of the supervised phase; None: there are no more supervised steps.
      held_out: a batch of an evaluation; None: there is none.
      rewards: names of the rewards in `Groups`.
    """
    jobs: dict[str, Callable[[], jax.stages.Lowered]] = {}  # the longest first
    jitted, state, needs = programs.jitted, programs.abstract_state, programs.needs
    if solutions is not None:
        batch = _placed(solutions, programs.sharding, programs.config.supervised.batch_size)
        seed = _shape(np.int32, sharding.replicated(programs.sharding.mesh))
        jobs["supervised"] = lambda: jitted["supervised"].lower(state, batch, seed)
    weights = functools.cache(lambda: _rollout_weights(programs))

    def sampling(
        name: str, batch: PromptBatch, size: int, temperatures: tuple[int, ...], truncation: Any = ()
    ) -> jax.stages.Lowered:
        whole = sharding.replicated(programs.decoding.mesh)
        arrays = _placed((batch.tokens, batch.mask, batch.prompt_ids, batch.features), programs.decoding, size)
        scalars = (_shape(np.int32, whole), _shape(np.float32, whole, temperatures), _shape(np.int32, whole))
        cuts = (x if x is None else _shape(x.dtype, whole) for x in truncation)
        return jitted[name].lower(weights(), *arrays, *scalars, *cuts)

    P, G = programs.config.prompts_per_step // programs.config.sampling.parts, programs.config.group_size + needs.greedy
    rollout = functools.cache(lambda: sampling("rollout", prompts, P, (G,)))
    if programs.config.steps and not (
        needs.old_logprobs or needs.reference or needs.probe or needs.greedy or programs.config.sampling.parts > 1
    ):
        jobs["update"] = lambda: _lower_update(programs, rollout().out_info, prompts, rewards)
    if held_out is not None:
        jobs["evaluation"] = lambda: sampling("evaluation", held_out, len(held_out.rows), (), programs.truncation)
    if programs.config.steps:
        jobs["rollout"] = rollout
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
    for name, lower in jobs.items():
        programs.ahead[name] = pool.submit(_compile, lower)
    pool.shutdown(wait=False)


def _compile(lower: Callable[[], jax.stages.Lowered]) -> None:
    lower().compile()
    release_freed_blocks()


def _lower_update(programs: Programs, rollout: Any, prompts: PromptBatch, rewards: Iterable[str]) -> jax.stages.Lowered:
    jitted, state, config = programs.jitted, programs.abstract_state, programs.config
    by_prompt, whole = programs.sharding, sharding.replicated(programs.sharding.mesh)
    place = lambda x: _shape(x.dtype, by_prompt, x.shape)
    P = config.prompts_per_step
    columns = _placed({name: prompts.columns[name] for name in programs.needs.columns}, by_prompt, P)
    values: Any = {name: _shape(np.float32, by_prompt, (P, config.group_size)) for name in rewards}
    groups = Groups(jax.tree.map(place, rollout), values, columns)
    prepared = jitted["make_experience"].lower(groups, state.advantage_state, None, None).out_info
    batch = jax.tree.map(place, prepared.experience)
    return jitted["update"].lower(state, batch, _shape(np.float32, whole), _shape(np.int32, whole))


def _rollout_weights(programs: Programs) -> Any:
    """Returns the weights as rollouts read them, as shapes with shardings."""
    params = programs.abstract_state.params
    if not programs.moves_weights:
        return params
    moved = programs.jitted["reshard"].lower(params).compile()
    return jax.tree.map(lambda x, s: _shape(x.dtype, s, x.shape), moved.out_info, moved.output_shardings)


def _placed(tree: Any, rows: jax.sharding.NamedSharding, size: int) -> Any:
    """Returns the arrays that `Programs.place` makes of this process's rows of `size` rows, as shapes with shardings."""
    return jax.tree.map(lambda x: _shape(jax.dtypes.canonicalize_dtype(x.dtype), rows, (size, *x.shape[1:])), tree)


def _shape(dtype: Any, sharding: Any, shape: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
