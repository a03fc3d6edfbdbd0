"""Predictions on held-out rows, and their metrics."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxrl_reason import metrics
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.tasks.regression.vocabulary import Digits


def predict(
    generate: Callable[[PromptBatch], Rollout], batches: Sequence[PromptBatch], digits: Digits
) -> tuple[np.ndarray, np.ndarray]:
    """Samples and decodes.

    Args:
      generate: samples K completions per prompt of a batch.
      batches: from `eval_batches`; rows of weight 0 are left out.
      digits: decodes completions.

    Returns:
      Predictions f32[N, K] and targets f32[N], in z-scores.
    """
    decode = jax.jit(digits.decode)
    samples, targets = [], []
    for batch in batches:
        real = batch.weight > 0
        samples.append(hosts.to_host(decode(generate(batch).tokens))[real])
        targets.append(batch.columns["z"][real])
    return np.concatenate(samples), np.concatenate(targets)


def prediction_metrics(samples: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Computes regression scores of the mean and the median of the samples, and their spread.

    Args:
      samples: f32[N, K], in z-scores.
      targets: f32[N], in z-scores.

    Returns:
      `rmse`, `r2`, `spearman` of the mean; `median_rmse`, ... of the median; `spread`, the mean over rows of the standard deviation
      of the samples; `sample_rmse`, of single samples; `prompts`. All in z-scores.
    """
    samples, targets = samples.astype(np.float64), targets.astype(np.float64)  # a float32 sum can overflow
    mean, median = samples.mean(axis=1), np.median(samples, axis=1)
    return {
        **metrics.regression_scores(mean, targets),
        **{f"median_{name}": x for name, x in metrics.regression_scores(median, targets).items()},
        "spread": float(samples.std(axis=1).mean()),
        "sample_rmse": float(np.sqrt(np.square(samples - targets[:, None]).mean())),
        "prompts": len(targets),
    }
