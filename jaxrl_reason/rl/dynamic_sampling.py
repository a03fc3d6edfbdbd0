"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): draws prompt batches until the groups that inform fill one batch."""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.models import sharding
from jaxrl_reason.rl import experience, hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Groups


def collect(
    programs: Programs, sample: Callable[[int], tuple[Groups, dict[str, float]]], max_batches: int
) -> tuple[Groups, dict[str, float], int]:
    """Fills one batch with informative groups.

    Args:
      programs: of the run.
      sample: i -> the scored groups of the i-th prompt batch from here, and metrics of the host.
      max_batches: the largest number of prompt batches; if they are too few, the rest of the batch is masked.

    Returns:
      The groups, the metrics over everything that was sampled, and the number of prompt batches.
    """
    size = programs.config.prompts_per_step
    groups, metrics = sample(0)
    buffer = _empty_like(programs.sharding)(groups)
    filled = hosts.put(np.int32(0), sharding.replicated(programs.sharding.mesh))
    shares, means, drawn = [], [], [metrics]
    while True:
        means.append(programs.sampled_means(groups))
        buffer, filled, share = programs.fill(buffer, filled, groups)
        count, share = jax.device_get((filled, share))
        shares.append(float(share))
        if count == size or len(shares) == max_batches:
            break
        groups, metrics = sample(len(shares))
        drawn.append(metrics)
    sampled = jax.device_get(means)
    metrics = mean_metrics(drawn) | {
        "dynamic_sampling/batches": len(shares),
        "dynamic_sampling/groups": int(count),
        "dynamic_sampling/kept_ratio": sum(shares) / len(shares),
        # `reward` is the mean over the groups that are kept, each with correct and incorrect completions. These are the means over all groups.
        **{f"dynamic_sampling/{name}": _mean_of_known([float(m[name]) for m in sampled]) for name in sampled[0]},
    }
    return buffer, metrics, len(shares)


def _mean_of_known(values: Sequence[float]) -> float:
    """Returns the mean of the values that are not NaN, as that of a batch without any reward is; NaN if all are."""
    known = [x for x in values if not math.isnan(x)]
    return statistics.fmean(known) if known else math.nan


def mean_metrics(several: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of every metric; a missing one counts as 0."""
    names = dict.fromkeys(itertools.chain(*several))
    return {name: sum(m.get(name, 0.0) for m in several) / len(several) for name in names}


@functools.cache
def _empty_like(sharding: jax.sharding.Sharding) -> Callable[[Groups], Groups]:
    """Returns a compiled `experience.empty_like`. It copies: `fill` donates its buffer, which may share no array with the groups."""
    return jax.jit(lambda groups: jax.tree.map(jnp.copy, experience.empty_like(groups)), out_shardings=sharding)
