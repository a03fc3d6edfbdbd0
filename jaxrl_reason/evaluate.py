"""Held-out evaluation: sample several completions a prompt, judge them, average."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxrl_reason import metrics
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards.scorer import Scorer
from jaxrl_reason.rollout import Rollout


def evaluate(
    generate: Callable[[PromptBatch], Rollout], batches: Sequence[PromptBatch], scorer: Scorer
) -> dict[str, float]:
    """Accuracy, unbiased pass@k, length and truncation over held-out prompts.

    Args:
      generate: samples G completions for the prompts of a batch, with keys that do not change between evaluations: two
        policies are compared on the same noise.
      batches: from `data.eval_prompts`; rows of weight 0 count for nothing.
      scorer: its verdict decides what is right. A completion without a verdict (missing reward) counts as wrong.

    Returns:
      `eval/accuracy` (mean over all completions), `eval/pass@G`, `eval/mean_length` (tokens, end token included),
      `eval/clipped_ratio` (share without an end token) and `eval/prompts`.
    """
    right, lengths, truncated = [], [], []
    for batch in batches:
        rollout = generate(batch)
        rewards, _ = scorer(rollout, batch)
        verdicts, mask, cut = jax.device_get((rewards[scorer.verdict] > 0.5, rollout.mask, rollout.truncated))
        real = batch.weight > 0
        right.append(verdicts[real])
        lengths.append(mask[real].sum(axis=-1))
        truncated.append(cut[real])
    right, lengths, truncated = map(np.concatenate, (right, lengths, truncated))
    samples = right.shape[1]
    return {
        "eval/accuracy": float(right.mean()),
        f"eval/pass@{samples}": float(metrics.pass_at_k(samples, right.sum(axis=1), samples).mean()),
        "eval/mean_length": float(lengths.mean()),
        "eval/clipped_ratio": float(truncated.mean()),
        "eval/prompts": len(right),
    }
