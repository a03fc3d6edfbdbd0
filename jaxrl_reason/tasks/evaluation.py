"""Held-out completions: `sample_and_judge` collects them, `per_prompt`, `summary_metrics` and `all_metrics` average them."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import data, metrics
from jaxrl_reason.config import Config
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.answers import extract_answer
from jaxrl_reason.rewards.latex import normalised
from jaxrl_reason.rewards.math import MAX_ANSWER_LENGTH
from jaxrl_reason.rewards.numeric import choice, parse_number
from jaxrl_reason.rewards.scorer import each, RewardScorer
from jaxrl_reason.rl import experience, hosts
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.tasks.journal import Journal

Answers = list[list[Hashable | None]]
AnswersOf = Callable[[list[list[str]], Sequence[Mapping[str, Any]]], Answers]


class Sampled(NamedTuple):
    """The tokens of a completion."""

    ids: np.ndarray  # int[T], end token included
    logprobs: np.ndarray  # f32[T], under the distribution that sampled them


class Evaluated(NamedTuple):
    """N held-out prompts with K completions each, on the host."""

    rows: list[dict[str, Any]]  # the N rows of the data
    positions: np.ndarray  # int[N], positions of the rows in the data
    correct: np.ndarray  # bool[N, K], the verdicts; a completion with a missing reward is incorrect
    lengths: np.ndarray  # int[N, K] in tokens, end token included
    truncated: np.ndarray  # bool[N, K], no end token within the budget
    logprobs: np.ndarray  # f32[N, K], of whole completions under the distribution that sampled them
    rewards: dict[str, np.ndarray]  # name -> f32[N, K], NaN if missing
    total: np.ndarray  # f32[N, K], their weighted sum; NaN if all are missing
    texts: list[list[str]] | None  # N lists of K completions; None if nothing was decoded
    answers: Answers | None  # their final answers, None for a completion without one; None if nothing was decoded
    self_rewards: np.ndarray | None = None  # f32[N, K] of LaSeR, NaN if truncated; None if the policy has none
    values: np.ndarray | None = None  # f32[N], human values of the problems, or None
    sampled: list[list[Sampled]] | None = None  # N lists of K; None if nothing was decoded, or with a journal
    unjudged: np.ndarray | None = None  # bool[N, K], the verdict is missing; None: it is known


def batch_size(config: Config, mesh: jax.sharding.Mesh, rows: int) -> int:
    """Returns the number of held-out prompts per batch in the evaluate command, for data with so many `rows`.

    A batch has about as many completions as a batch of training, which is known to fit into memory. The devices of the
    mesh share it evenly, for scoring and for sampling.
    """
    decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
    ways = math.lcm(sharding.num_shards(mesh), sharding.num_shards(decoding))
    at_once = min(config.prompts_per_step * config.group_size // config.eval.samples, config.eval.prompts, rows)
    return max(-(-at_once // ways), 1) * ways


def final_answer(completion: str, row: Mapping[str, Any]) -> Hashable | None:
    """Returns the final answer of a completion in one spelling, None if there is none.

    It is an exact number ("3/4" equals "0.75"), the letter of a choice ("(C)" equals "C"), or text as `latex.normalised`.
    """
    del row  # for rewards whose answers depend on the problem
    text = extract_answer(completion)
    if text is None:
        return None
    number = parse_number(text)
    if number is not None or len(text) > MAX_ANSWER_LENGTH:
        return text if number is None else number
    return choice(text, with_text=True) or normalised(text) or text


def sample_and_judge(
    generate: Callable[[PromptBatch], Rollout],
    batches: Sequence[PromptBatch],
    scorer: RewardScorer,
    tokenizer: data.Tokenizer | None = None,
    *,
    skip_special: bool = False,
    answers_of: AnswersOf | None = None,
    verdict: str = "",
    self_reward: Callable[[Rollout], np.ndarray] | None = None,
    journal: Journal | None = None,
    lines_of: Callable[[Evaluated], Iterable[Mapping[str, Any]]] | None = None,
) -> list[Evaluated]:
    """Samples completions of held-out prompts and judges them; returns one part per batch, for `join`.

    Args:
      generate: samples K completions per prompt of a batch. Its keys are the same in every evaluation, so that two
        policies are compared on the same noise.
      batches: from `data.eval_prompts`; rows of weight 0 are left out.
      tokenizer: decodes completions, on the first process only; None: there are no texts and no answers.
      skip_special: leaves special tokens out of the texts, as the rewards read them.
      answers_of: (completions [P][K], rows) -> final answers, equal and hashed alike if two are the same, or None; by
        default `final_answer` of each completion. If the verdict compares with one reference, all correct completions of a
        prompt have the same answer.
      verdict: the reward whose value > 0.5 means correct; empty: the scorer's verdict.
      self_reward: computes LaSeR's self-rewards f32[P, K] of a rollout, or None.
      journal: holds the batches that are judged already, and takes the lines (`lines_of`) of the others; None: no file.
        The other processes return the new parts only.
    """
    tokenizer, verdict = tokenizer if hosts.is_first() else None, verdict or scorer.verdict
    find = answers_of or each(final_answer)
    united = _united if scorer.has_one_answer(verdict) else lambda answers, correct: answers
    parts = [] if journal is None else _judged_before(journal, batches, find, united, verdict)
    scorer = scorer.over(sum(int((batch.weight > 0).sum()) for batch in batches))
    for batch in batches[journal.done if journal else 0 :]:
        rollout = generate(batch)
        scores, _ = scorer(rollout, batch.take(hosts.local_rows_of(rollout.tokens)))
        tokens, mask, truncated, logprobs, scores = jax.tree.map(
            hosts.to_host, (rollout.tokens, rollout.mask, rollout.truncated, rollout.logprobs, scores)
        )
        real, rows = batch.weight > 0, _real_rows(batch)
        texts, sampled = None, None
        if tokenizer is not None:
            arrays = tokens[real], logprobs[real], mask[real]
            sampled = [[Sampled(t[live], x[live]) for t, x, live in zip(*group)] for group in zip(*arrays)]
            texts = [tokenizer.completions([x.ids.tolist() for x in group], skip_special) for group in sampled]
        answers = _agreed_answers(find, texts, rows)
        rewards = {name: np.asarray(values)[real] for name, values in scores.items()}
        correct = rewards[verdict] > 0.5
        part = Evaluated(
            rows=rows,
            positions=batch.prompt_ids[real],
            correct=correct,
            lengths=mask.sum(axis=-1)[real],
            truncated=truncated[real],
            logprobs=np.where(mask, logprobs, 0.0).sum(axis=-1)[real],
            rewards=rewards,
            total=np.asarray(experience.total_reward(jax.tree.map(jnp.asarray, rewards), scorer.weights)),
            texts=texts,
            answers=united(answers, correct),
            self_rewards=None if self_reward is None else self_reward(rollout)[real],
            sampled=sampled if journal is None else None,
            unjudged=np.isnan(rewards[verdict]),
        )
        if journal is not None and lines_of is not None:
            journal.append(lines_of(part) if hosts.is_first() else ())
        parts.append(part)
    return parts


def _united(answers: Answers | None, correct: np.ndarray) -> Answers | None:
    """Returns the answers, with those of a prompt's correct completions replaced by one of them: 50 % and 50 are one.

    It is the first that no incorrect completion has, if there is one: 50 % is spelled as 0.5.
    """
    if answers is None:
        return None
    united = []
    for group, oks in zip(answers, correct):
        wrong = {a for a, ok in zip(group, oks) if not ok}
        right = sorted((a in wrong, i) for i, (a, ok) in enumerate(zip(group, oks)) if ok)
        united.append([group[right[0][1]] if ok else a for a, ok in zip(group, oks)])
    return united


def _judged_before(
    journal: Journal,
    batches: Sequence[PromptBatch],
    find: AnswersOf,
    united: Callable[[Answers | None, np.ndarray], Answers | None],
    verdict: str,
) -> list[Evaluated]:
    """Returns the batches that a journal holds; none on processes but the first."""
    parts = []
    for batch, lines in zip(batches[: journal.done], [*journal.batches, *[[]] * journal.done]):
        rows = _real_rows(batch)
        part = parsed(lines, len(rows)) if lines else None
        # The file has texts, which can be equal for answers that are not.
        answers = _agreed_answers(find, part.texts if part else None, rows)
        if part:
            unjudged = np.isnan(part.rewards[verdict])
            parts.append(part._replace(rows=rows, answers=united(answers, part.correct), unjudged=unjudged))
    return parts


def _agreed_answers(find: AnswersOf, texts: list[list[str]] | None, rows: list[dict[str, Any]]) -> Answers | None:
    """Returns the answers of completions on the first process, which has their texts; an error ends all processes."""
    return hosts.agree(lambda: find(texts, rows) if texts else None, RewardError)


def _real_rows(batch: PromptBatch) -> list[dict[str, Any]]:
    return [row for row, counts in zip(batch.rows, batch.weight > 0) if counts]


def parsed(lines: Sequence[Mapping[str, Any]], prompts: int) -> Evaluated:
    """Returns the completions of N `prompts` from their lines of completions.jsonl, without the rows of the data.

    Answers are texts. Raises ValueError or KeyError for lines of another kind.
    """
    table = lambda values, kind: np.array(list(values)).astype(kind).reshape(prompts, -1)
    floats = lambda values: table((math.nan if x is None else x for x in values), np.float32)
    column = lambda name: [line[name] for line in lines]
    samples = len(lines) // prompts
    grouped = lambda name: [column(name)[i : i + samples] for i in range(0, len(lines), samples)]
    return Evaluated(
        rows=[{}] * prompts,
        positions=table(column("row"), np.int32)[:, 0],
        correct=table(column("correct"), bool),
        lengths=table(column("length"), np.int64),
        truncated=table(column("truncated"), bool),
        logprobs=floats(line.get("logprob") for line in lines),
        rewards={name: floats(line["rewards"][name] for line in lines) for name in lines[0]["rewards"]},
        total=floats(column("total")),
        texts=grouped("completion"),
        answers=grouped("answer"),
        self_rewards=floats(column("self_reward")) if "self_reward" in lines[0] else None,
    )


def join(parts: Sequence[Evaluated], values: np.ndarray | None = None) -> Evaluated:
    """Joins parts of an evaluation. `values` f32[M] are the human values of all rows of the data, or None.

    They are from `data.values.held_out_values`.
    """
    arrays = [part._replace(rows=[], texts=None, answers=None, values=None, sampled=None) for part in parts]
    together: Evaluated = jax.tree.map(lambda *x: np.concatenate(x), *arrays)
    both = lambda lists: None if lists[0] is None else [x for items in lists for x in items]
    return together._replace(
        rows=[row for part in parts for row in part.rows],
        texts=both([part.texts for part in parts]),
        answers=both([part.answers for part in parts]),
        sampled=both([part.sampled for part in parts]),
        values=None if values is None else values[together.positions],
    )


def summary_metrics(found: Evaluated, temperature: float) -> dict[str, float]:
    """Returns the metrics of a run in progress.

    They are `eval/accuracy` (mean over all completions), the unbiased `eval/pass@k` for k = 4, 16, 64, ... below K and for
    k = K, `eval/mean_length` (tokens, end token included), `eval/clipped_ratio` (share without an end token), `eval/prompts`,
    `eval/maj@K` if completions are decoded (share of prompts whose most frequent answer is correct), `eval/entropy` as
    in `all_metrics`, the metrics of `method_metrics`, and `eval/missing_verdict_ratio`, the share without a verdict, which
    count as incorrect; only if there is one.
    """
    prompts, samples = found.correct.shape
    drawn = powers(samples, base=4)[1:] or [1]  # pass@1 is the accuracy
    majority = {}
    if found.answers is not None:
        majority[f"eval/maj@{samples}"] = float(_majority(found.answers, found.correct, samples).mean())
    return {
        "eval/accuracy": float(found.correct.mean()),
        **{f"eval/pass@{k}": float(metrics.pass_at_k(samples, found.correct.sum(axis=1), k).mean()) for k in drawn},
        "eval/mean_length": float(found.lengths.mean()),
        "eval/clipped_ratio": float(found.truncated.mean()),
        "eval/prompts": prompts,
        **majority,
        **{
            f"eval/{name}": value
            for name, value in (_entropy(found, temperature) | _missing_verdicts(found) | method_metrics(found)).items()
        },
    }


def _missing_verdicts(found: Evaluated) -> dict[str, float]:
    """Returns the share of completions without a verdict, which count as incorrect; {} if there are none."""
    share = 0.0 if found.unjudged is None else float(found.unjudged.mean())
    return {"missing_verdict_ratio": share} if share else {}


def method_metrics(found: Evaluated) -> dict[str, float]:
    """Returns the metrics that the methods improve, as far as the data and the rollout allow.

    With human values (RLEV, arXiv 2510.20187): `h_accuracy`, `value_density`, accuracy on the fifth of the prompts of
    highest and of lowest value, and the mean length in each fifth, 1 being the lowest. With decoded completions
    (ProGRPO, arXiv 2602.05281): the number of distinct correct answers and of distinct correct completions per prompt.
    With self-rewards: `self_reward_metrics`.
    """
    out = self_reward_metrics(found)
    if found.values is not None:
        values = found.values
        accuracy, lengths = found.correct.mean(axis=1), found.lengths.mean(axis=1)
        by_value = metrics.mean_by_quantile(accuracy, values)
        out |= {
            "h_accuracy": metrics.human_aligned_accuracy(accuracy, values),
            "value_density": metrics.value_density(accuracy, values, lengths),
            "high_value_accuracy": float(by_value[-1]),
            "low_value_accuracy": float(by_value[0]),
        }
        for fifth, length in enumerate(metrics.mean_by_quantile(lengths, values), start=1):
            out[f"mean_length_value_fifth_{fifth}"] = float(length)
    if found.answers is not None:
        out["distinct_correct_answers"] = _distinct(found.answers, found.correct)
    if found.texts is not None:
        out["distinct_correct_completions"] = _distinct(found.texts, found.correct)
    return out


def self_reward_metrics(found: Evaluated) -> dict[str, float]:
    """Returns how well LaSeR's self-rewards (arXiv 2510.14943) tell correct from incorrect completions.

    They are `self_reward_f1` (harmonic mean of the accuracies on correct and on incorrect completions),
    `self_reward_calibration_error`, `self_reward_auc` (share of pairs of a correct and an incorrect completion that the
    self-reward orders correctly), `self_reward_auc_within` (of pairs of one prompt), `best_of_K_accuracy` (of the
    completion of highest self-reward) and, with answers, `weighted_vote`, comparable with `maj@K`. The free baseline is
    the log-probability of the whole completion: `logprob_auc`, `logprob_auc_within`, `best_of_K_by_logprob`. A truncated
    completion has no self-reward: it is never chosen, in no pair, and has no vote. {} without self-rewards.
    """
    if found.self_rewards is None:
        return {}
    known = ~np.isnan(found.self_rewards)
    scores, correct = found.self_rewards[known], found.correct[known]
    out = {
        "self_reward_f1": metrics.self_verification_f1(scores, correct),
        "self_reward_calibration_error": metrics.calibration_error(scores, correct),
    }
    for name, x in _scores(found).items():
        out[f"{name}_auc"] = metrics.pair_accuracy(x.ravel(), found.correct.ravel())
        out[f"{name}_auc_within"] = metrics.pair_accuracy(x, found.correct)
    return out | {name: float(x.mean()) for name, x in _chosen_by_self_reward(found).items()}


def _scores(found: Evaluated) -> dict[str, np.ndarray]:
    """Returns what can judge a completion, f32[N, K] each, NaN for truncated ones: self-rewards and the free baseline."""
    if found.self_rewards is None:
        return {}
    return {
        "self_reward": found.self_rewards,
        "logprob": np.where(np.isnan(found.self_rewards), np.nan, found.logprobs),
    }


def _chosen_by_self_reward(found: Evaluated) -> dict[str, np.ndarray]:
    """Returns, per prompt, whether the completion of highest self-reward and the answer with most of it are correct.

    `best_of_K_by_logprob` is about the completion of highest log-probability, among those that ended. All are 0 for a
    prompt whose completions are all truncated.
    """
    if found.self_rewards is None:
        return {}
    K, rows = found.correct.shape[1], np.arange(len(found.correct))
    ended = ~np.isnan(found.self_rewards)
    scores = {name: np.where(np.isnan(x), -np.inf, x) for name, x in _scores(found).items()}
    correct = found.correct & ended  # the first one is taken if none has ended
    best = {name: correct[rows, x.argmax(axis=1)].astype(np.float64) for name, x in scores.items()}
    out = {f"best_of_{K}_accuracy": best["self_reward"], f"best_of_{K}_by_logprob": best["logprob"]}
    if found.answers is not None:
        weights = np.clip(scores["self_reward"], 0.0, 1.0)
        votes = [[a if ok else None for a, ok in zip(*both)] for both in zip(found.answers, ended)]
        chosen = [metrics.majority_vote(group, w) for group, w in zip(votes, weights)]
        won = [i is not None and ok[i] for i, ok in zip(chosen, found.correct)]
        out["weighted_vote"] = np.array(won, np.float64)
    return out


def per_prompt(found: Evaluated) -> dict[str, np.ndarray]:
    """Returns the metrics that are means over prompts, f64[N] each, in [0, 1].

    They are `accuracy`; for k = 1, 2, 4, ..., K the unbiased `pass@k` and, over the first k samples, `maj@k` (1 if the most
    frequent final answer is correct); and, of `self_reward_metrics`, `best_of_K_accuracy`, `best_of_K_by_logprob` and
    `weighted_vote`.
    """
    samples = found.correct.shape[1]
    numbers = {"accuracy": found.correct.mean(axis=1)}
    numbers |= {f"pass@{k}": metrics.pass_at_k(samples, found.correct.sum(axis=1), k) for k in powers(samples)}
    if found.answers is not None:
        numbers |= {f"maj@{k}": _majority(found.answers, found.correct, k) for k in powers(samples)}
    return numbers | _chosen_by_self_reward(found)


def all_metrics(found: Evaluated, temperature: float) -> dict[str, float]:
    """Returns every metric, NaN if there is nothing to average. Raises ValueError for completions that are not decoded.

    They are the means of `per_prompt`, of which `accuracy` is `avg@K`, too, and has its 95 % interval over prompts,
    `accuracy_low` and `accuracy_high`; rewards; lengths of all, correct and incorrect completions; `clipped_ratio`;
    `answered_ratio`, the share of completions with a final answer; `missing_verdict_ratio` as in `summary_metrics`; `entropy` in nats per token, estimated from the
    sampled tokens (not at temperature 0); `prompts`; and `method_metrics`.
    """
    if found.answers is None:
        raise ValueError("These completions are not decoded, so they have no answers to count.")
    correct, lengths = found.correct, found.lengths
    numbers = per_prompt(found)
    low, high = metrics.accuracy_interval(numbers["accuracy"])
    out = {
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        f"avg@{correct.shape[1]}": float(correct.mean()),
        **{name: float(x.mean()) for name, x in numbers.items() if "@" in name},
        "reward": _mean(found.total),
        **{f"rewards/{name}": _mean(values) for name, values in found.rewards.items()},
        "mean_length": float(lengths.mean()),
        "mean_length_correct": _mean(lengths[correct]),
        "mean_length_incorrect": _mean(lengths[~correct]),
        "clipped_ratio": float(found.truncated.mean()),
        "answered_ratio": float(np.mean([[answer is not None for answer in group] for group in found.answers])),
    }
    return (
        out
        | _missing_verdicts(found)
        | _entropy(found, temperature)
        | {"prompts": len(correct)}
        | method_metrics(found)
    )


def powers(samples: int, base: int = 2) -> list[int]:
    """Returns the powers of `base` below `samples`, from 1, and `samples`."""
    return [base**i for i in range(samples.bit_length()) if base**i < samples] + [samples]


def _entropy(found: Evaluated, temperature: float) -> dict[str, float]:
    """Returns the entropy in nats per token, estimated from the sampled tokens; {} for greedy completions."""
    if temperature == 0:
        return {}
    return {"entropy": float(-found.logprobs.sum(dtype=np.float64) / found.lengths.sum())}


def _distinct(things: Sequence[Sequence[Hashable | None]], correct: np.ndarray) -> float:
    """Returns the mean number of distinct correct answers or completions per prompt."""
    distinct = [{x for x, ok in zip(group, oks) if ok and x is not None} for group, oks in zip(things, correct)]
    return float(np.mean([len(found) for found in distinct]))


def _majority(answers: Answers, correct: np.ndarray, k: int) -> np.ndarray:
    """Returns 1 for prompts whose most frequent answer among the first k samples is correct, else 0; f64[N]."""
    chosen = [metrics.majority_vote(group[:k]) for group in answers]
    return np.array([position is not None and ok[position] for position, ok in zip(chosen, correct)], np.float64)


def _mean(x: np.ndarray) -> float:
    known = x[~np.isnan(x)]
    return float(known.mean()) if known.size else math.nan
