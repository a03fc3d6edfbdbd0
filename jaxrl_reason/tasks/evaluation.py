"""Held-out completions and what they say: sampled and judged by `gather`, summed up by `evaluate` and `figures`."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason import data, metrics
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.numeric import extract_answer, parse_number
from jaxrl_reason.rewards.scorer import each, RewardScorer
from jaxrl_reason.rl import experience, hosts
from jaxrl_reason.rl.types import Rollout

AnswersOf = Callable[[list[list[str]], Sequence[Mapping[str, Any]]], list[list[Hashable | None]]]


class Evaluated(NamedTuple):
    """N held-out prompts with K completions each, on the host.

    Attributes:
      rows: the N rows of the data.
      numbers: int[N], the positions of these rows in the data.
      right: bool[N, K], the verdicts; a completion without one (missing reward) counts as wrong.
      lengths: int[N, K] in tokens, end token included.
      truncated: bool[N, K], no end token within the budget.
      logprobs: f32[N, K], of whole completions under the law that sampled them.
      rewards: name -> f32[N, K], NaN where missing.
      total: f32[N, K], their weighted sum; NaN where all are missing.
      texts: N lists of K completions; None where nothing was decoded.
      answers: N lists of K final answers, None for a completion without one; None where nothing was decoded.
      self_rewards: f32[N, K] of LaSeR, NaN where truncated; None where the policy gives none.
      values: f32[N], what the questions are worth, or None.
    """

    rows: list[dict[str, Any]]
    numbers: np.ndarray
    right: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    logprobs: np.ndarray
    rewards: dict[str, np.ndarray]
    total: np.ndarray
    texts: list[list[str]] | None
    answers: list[list[Hashable | None]] | None
    self_rewards: np.ndarray | None = None
    values: np.ndarray | None = None


def final_answer(completion: str, row: Mapping[str, Any]) -> Hashable | None:
    """What a completion votes for: its final answer as an exact number, or as text where it is none ("3/4" is "0.75")."""
    del row  # for answers that only mean something together with the question
    text = extract_answer(completion)
    number = None if text is None else parse_number(text)
    return text if number is None else number


def gather(
    generate: Callable[[PromptBatch], Rollout],
    batches: Sequence[PromptBatch],
    scorer: RewardScorer,
    tokenizer: data.Tokenizer | None = None,
    *,
    answers_of: AnswersOf | None = None,
    verdict: str = "",
    self_reward: Callable[[Rollout], np.ndarray] | None = None,
    values: np.ndarray | None = None,
) -> Evaluated:
    """Samples and judges.

    Args:
      generate: samples K completions for the prompts of a batch, with keys that do not change between evaluations: two
        policies are compared on the same noise.
      batches: from `data.eval_prompts`; rows of weight 0 count for nothing.
      scorer: its rewards.
      tokenizer: decodes the completions; without one there are no texts and no answers, nor on other processes than the first, which
        alone is asked what they say.
      answers_of: (completions [P][K], rows) -> their final answers, equal and hashed alike where two are the same, or None; without
        it what `final_answer` finds.
      verdict: the reward whose value > 0.5 means right; empty: the scorer's verdict.
      self_reward: LaSeR's self-rewards f32[P, K] of a rollout, or None.
      values: of all rows of the data, from `data.values.held_out_values`, or None.
    """
    tokenizer = tokenizer if hosts.first() else None
    parts, rows, texts = [], [], []
    for batch in batches:
        rollout = generate(batch)
        rewards, _ = scorer(rollout, batch.take(hosts.places_of(rollout.tokens)))
        tokens, mask, truncated, logprobs, rewards = jax.tree.map(
            hosts.whole, (rollout.tokens, rollout.mask, rollout.truncated, rollout.logprobs, rewards)
        )
        part = dict(
            numbers=batch.prompt_ids,
            lengths=mask.sum(axis=-1),
            truncated=truncated,
            logprobs=np.where(mask, logprobs, 0.0).sum(axis=-1),
            rewards=rewards,
        )
        if self_reward is not None:
            part["self_rewards"] = self_reward(rollout)
        real = batch.weight > 0
        parts.append(jax.tree.map(lambda x: x[real], part))
        rows += [row for row, counts in zip(batch.rows, real) if counts]
        if tokenizer is not None:
            ids = [[t[live].tolist() for t, live in zip(*group)] for group in zip(tokens[real], mask[real])]
            texts += [tokenizer.decode_batch(group) for group in ids]
    together = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    find = answers_of or each(final_answer)
    answers = hosts.agree(lambda: find(texts, rows) if texts else None, RewardError)
    return Evaluated(
        rows=rows,
        right=together["rewards"][verdict or scorer.verdict] > 0.5,
        total=np.asarray(experience.total_reward(together["rewards"], scorer.weights)),
        texts=None if tokenizer is None else texts,
        answers=None if tokenizer is None else answers,
        values=None if values is None else values[together["numbers"]],
        **together,
    )


def evaluate(found: Evaluated, temperature: float) -> dict[str, float]:
    """The evaluation of a run in progress.

    Args:
      found: from `gather`.
      temperature: that sampled.

    Returns:
      `eval/accuracy` (mean over all completions), `eval/pass@K`, `eval/mean_length` (tokens, end token included),
      `eval/clipped_ratio` (share without an end token), `eval/prompts`, with a tokenizer `eval/maj@K` (share of prompts whose
      most frequent answer is right), `eval/entropy` as in `figures`, and what `method_metrics` adds.
    """
    prompts, samples = found.right.shape
    majority = {}
    if found.answers is not None:
        majority[f"eval/maj@{samples}"] = _majority_accuracy(found.answers, found.right, samples)
    return {
        "eval/accuracy": float(found.right.mean()),
        f"eval/pass@{samples}": float(metrics.pass_at_k(samples, found.right.sum(axis=1), samples).mean()),
        "eval/mean_length": float(found.lengths.mean()),
        "eval/clipped_ratio": float(found.truncated.mean()),
        "eval/prompts": prompts,
        **majority,
        **{f"eval/{name}": value for name, value in (_entropy(found, temperature) | method_metrics(found)).items()},
    }


def method_metrics(found: Evaluated) -> dict[str, float]:
    """What the methods set out to improve, as far as the data and the rollout show it; {} where they show nothing.

    Where questions have values (RLEV, arXiv 2510.20187): `h_accuracy`, `value_density`, accuracy
    on the fifth of the prompts of highest and of lowest value, and the mean length in each fifth, 1 being the lowest.
    Where completions are decoded (ProGRPO, arXiv 2602.05281): how many distinct final answers, and distinct completions, are
    right, per prompt.
    """
    out = self_reward_metrics(found)
    if found.values is not None:
        values = found.values
        accuracy, lengths = found.right.mean(axis=1), found.lengths.mean(axis=1)
        by_value = metrics.mean_by_quantile(accuracy, values)
        out |= {
            "h_accuracy": metrics.human_aligned_accuracy(accuracy, values),
            "value_density": metrics.value_density(accuracy, values, lengths),
            "high_value_accuracy": float(by_value[-1]),
            "low_value_accuracy": float(by_value[0]),
        }
        for fifth, length in enumerate(metrics.mean_by_quantile(lengths, values), start=1):
            out[f"mean_length_value_fifth_{fifth}"] = float(length)
    for name, things in (("answers", found.answers), ("completions", found.texts)):
        if things is not None:
            right = [{x for x, ok in zip(*group) if ok and x is not None} for group in zip(things, found.right)]
            out[f"distinct_right_{name}"] = float(np.mean([len(distinct) for distinct in right]))
    return out


def self_reward_metrics(found: Evaluated) -> dict[str, float]:
    """LaSeR, arXiv 2510.14943: how well self-rewards tell right from wrong, and what choosing by them gives; {} without them.

    `self_reward_f1` (harmonic mean of the accuracies on right and on wrong completions), `self_reward_calibration_error`,
    `best_of_K_accuracy` (the completion of highest self-reward) and, with answers, `weighted_vote`, to be compared with `maj@K`. A
    truncated completion has none: it is never chosen and its vote weighs 0.
    """
    if found.self_rewards is None:
        return {}
    known = ~np.isnan(found.self_rewards)
    scores = np.where(known, found.self_rewards, -np.inf)
    best = scores.argmax(axis=1)
    samples = found.right.shape[1]
    out = {
        "self_reward_f1": metrics.self_verification_f1(scores[known], found.right[known]),
        "self_reward_calibration_error": metrics.calibration_error(scores[known], found.right[known]),
        f"best_of_{samples}_accuracy": float(found.right[np.arange(len(best)), best].mean()),
    }
    if found.answers is not None:
        weights = np.clip(scores, 0.0, 1.0)
        chosen = [metrics.majority_vote(group, w) for group, w in zip(found.answers, weights)]
        won = [i is not None and ok[i] for i, ok in zip(chosen, found.right)]
        out["weighted_vote"] = float(np.mean(won))
    return out


def figures(found: Evaluated, temperature: float) -> dict[str, float]:
    """Every number of an evaluation whose completions are decoded; NaN where there is nothing to average.

    Returns:
      `accuracy` (the same as `avg@K`) with the 95 % interval `accuracy_low`, `accuracy_high` over prompts; for k = 1, 2, 4, ..., K
      the unbiased `pass@k` and, over the first k samples, `maj@k`, the share of prompts whose most frequent final answer is
      right; rewards; lengths, of right and of wrong completions too; `clipped_ratio`; `answered_ratio`, the share of completions
      with a final answer; `entropy` in nats a token, estimated from the sampled tokens (not at temperature 0); `prompts`; and
      what `method_metrics` adds.
    """
    right, lengths = found.right, found.lengths
    prompts, samples = right.shape
    low, high = metrics.bootstrap_interval(right.mean(axis=1))
    out = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        f"avg@{samples}": float(right.mean()),
        **{f"pass@{k}": float(metrics.pass_at_k(samples, right.sum(axis=1), k).mean()) for k in powers(samples)},
        **{f"maj@{k}": _majority_accuracy(found.answers, right, k) for k in powers(samples)},
        "reward": _mean(found.total),
        **{f"rewards/{name}": _mean(values) for name, values in found.rewards.items()},
        "mean_length": float(lengths.mean()),
        "mean_length_right": _mean(lengths[right]),
        "mean_length_wrong": _mean(lengths[~right]),
        "clipped_ratio": float(found.truncated.mean()),
        "answered_ratio": float(np.mean([[answer is not None for answer in group] for group in found.answers])),
    }
    return out | _entropy(found, temperature) | {"prompts": prompts} | method_metrics(found)


def _entropy(found: Evaluated, temperature: float) -> dict[str, float]:
    """Nats a token, estimated from the tokens that were sampled; {} where none were."""
    if temperature == 0:
        return {}
    return {"entropy": float(-found.logprobs.sum(dtype=np.float64) / found.lengths.sum())}


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples`."""
    return [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]


def _majority_accuracy(answers: Sequence[Sequence[Hashable | None]], right: np.ndarray, k: int) -> float:
    chosen = [metrics.majority_vote(group[:k]) for group in answers]
    return float(np.mean([position is not None and ok[position] for position, ok in zip(chosen, right)]))


def _mean(x: np.ndarray) -> float:
    known = x[~np.isnan(x)]
    return float(known.mean()) if known.size else math.nan
