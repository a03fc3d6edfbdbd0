"""Watches a long run: skipped updates end it, and metrics that show that nothing is learned become warnings."""

import collections
from collections.abc import Callable, Iterable, Mapping
import math
import pathlib
from typing import Any

from jaxrl_reason.config import Config
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.requirements import Requirements
from jaxrl_reason.runs.metrics_file import mean_over_all, read_metrics

PATIENCE = 20  # steps in a row before a warning
ENTROPY_FLOOR = 0.01  # nats per token: the policy is then certain of nine of ten tokens
NO_REWARD = (
    f"For {PATIENCE} steps no completion has had a reward, so nothing is learned: see the metrics rewards/<name>/none_rate, "
    "error_rate and timeout_rate."
)
LEFT_OUT = (
    f"For {PATIENCE} steps no completion has entered the loss, so nothing is learned. Completions without an end token (see the metric "
    "completions/clipped_ratio) are left out if config.sampling.mask_truncated_completions is true: raise config.max_completion_length, or "
    "set config.sampling.mask_truncated_completions to false. Completions whose log-probabilities are not finite are left out too (see "
    "sampling/nonfinite_completions)."
)
Metrics = Mapping[str, Any]  # of one step; None and NaN mean "unknown"


class NonFiniteError(Exception):
    """The loss or its gradient was not finite in too many steps in a row."""


class SkippedUpdates:
    """Counts the steps in a row whose updates were all skipped because the loss or its gradient was not finite.

    `limit` such steps end the run. `history` has the metrics of all earlier steps, in order; only the first process
    needs it.
    """

    def __init__(self, limit: int, history: Iterable[Metrics] = ()):
        self._limit, self._count = limit, 0
        for metrics in history:
            self.look(metrics)
        self._count = hosts.largest(self._count)

    def look(self, metrics: Metrics) -> bool:
        """Returns whether this step reaches the limit."""
        # Not == 1: a float32 mean of ones can be slightly less.
        self._count = self._count + 1 if (metrics.get("skipped_update_ratio") or 0) > 0.9999 else 0
        return self._count >= self._limit

    def error(self, step: str, advice: str) -> NonFiniteError:
        """Returns the error that ends the run at a step such as "step 9"; `advice` ends its message."""
        return NonFiniteError(
            f"At {step} the loss or its gradient was not finite, for the {_ordinal(self._count)} step in a row; none of their updates "
            f"has reached the weights. {advice}"
        )


def mismatch_limit(config: Config, needs: Requirements) -> float:
    """Returns the allowed difference in nats between the log-probabilities of sampler and trainer for one token."""
    return config.sampling.mismatch_limit or (0.01 if needs.exact_sampler else 1.0)


class Watch:
    """Prints a warning about the metrics of RL steps, and repeats it only after its condition was over.

    `mismatch_limit` is the allowed difference in nats between the log-probabilities of sampler and trainer for one
    token. `history` has the metrics of all earlier steps, in order: a resumed run repeats no warning.
    """

    def __init__(self, say: Callable[[str], None], mismatch_limit: float, history: Iterable[Metrics] = ()):
        self._say: Callable[[str], None] | None = None
        self._limit = mismatch_limit
        self._recent: collections.deque[Metrics] = collections.deque(maxlen=PATIENCE)
        self._active: set[str] = set()  # names of the conditions that hold now
        for metrics in history:
            self.look(metrics)
        self._say = say

    def look(self, metrics: Metrics, worst: Callable[[], str] = str) -> None:
        """Looks at the next step's metrics; `worst` describes the token with the largest mismatch, for a warning."""
        self._recent.append(metrics)
        difference = metrics.get("sampling/logp_difference_max", 0.0)
        differs = difference is None or not difference <= self._limit  # True for NaN as well
        self._warn("mismatch", differs, lambda: self._mismatch(difference, worst()))
        self._warn("missing", self._all(_unrewarded), lambda: NO_REWARD)
        self._warn("left out", self._all(lambda m: _left_out(m) and not _unrewarded(m)), lambda: LEFT_OUT)
        self._warn("reward", self._all(_tied), lambda: _equal_rewards(metrics))
        collapsed = self._all(lambda m: m.get("entropy") is not None and m["entropy"] < ENTROPY_FLOOR and _learns(m))
        self._warn("entropy", collapsed, lambda: _low_entropy(metrics))

    def _warn(self, condition: str, holds: bool, sentence: Callable[[], str]) -> None:
        if holds and condition not in self._active and self._say is not None:
            self._say(f"warning: {sentence()}")
        self._active = self._active | {condition} if holds else self._active - {condition}

    def _all(self, holds: Callable[[Metrics], bool]) -> bool:
        """Returns whether a condition holds in each of the last PATIENCE steps."""
        return len(self._recent) == PATIENCE and all(map(holds, self._recent))

    def _mismatch(self, difference: float | None, worst: str) -> str:
        return (
            f"The sampler's and the trainer's log-probability of a token differ by {difference or math.nan:.3g} nats, more than "
            f"config.sampling.mismatch_limit allows ({self._limit:g}): {worst} The policy then learns from samples of another "
            "distribution than its own; config.model.compute_dtype=float32 shows whether rounding is the cause."
        )


def _equal_rewards(metrics: Metrics) -> str:
    easier = "If all are correct, give harder prompts; if all are incorrect, give easier ones"
    if "dynamic_sampling/reward" in metrics:
        return (
            f"For {PATIENCE} steps dynamic sampling has found no group with correct and incorrect completions (the mean reward is now "
            f"{metrics['dynamic_sampling/reward']:.3g}), so nothing is learned. {easier}, or raise config.supervised.steps."
        )
    return (
        f"For {PATIENCE} steps the completions of every group have had equal rewards (the mean reward is now {metrics['reward']:.3g}), "
        f"so nothing is learned. {easier}, or raise config.supervised.steps or config.max_completion_length. A larger "
        "config.group_size or config.sampling.temperature makes rewards differ."
    )


def _low_entropy(metrics: Metrics) -> str:
    return (
        f"For {PATIENCE} steps the policy's entropy has been below {ENTROPY_FLOOR} nats per token (now {metrics['entropy']:.2g}), so its "
        "completions hardly differ. Remedies: config.update.entropy_coefficient, a larger config.sampling.temperature, "
        "config.update.kl_coefficient, a lower config.optimizer.learning_rate, or the methods dapo and progrpo."
    )


def _learns(metrics: Metrics) -> bool:
    """Returns whether the step had a completion to learn from; without one, its means are over nothing."""
    return not _left_out(metrics) and metrics.get("dynamic_sampling/groups") != 0


def _left_out(metrics: Metrics) -> bool:
    """Returns whether every completion of the step was left out of the loss."""
    # Metrics of earlier versions have no left_out_ratio.
    return 1 in (metrics.get("completions/left_out_ratio"), metrics.get("completions/missing_reward_ratio"))


def _unrewarded(metrics: Metrics) -> bool:
    """Returns whether no completion of the step had a reward."""
    if "dynamic_sampling/reward" in metrics:
        return mean_over_all(metrics, "reward") is None
    return metrics.get("completions/missing_reward_ratio") == 1


def _tied(metrics: Metrics) -> bool:
    """Returns whether no group of the step had rewards that differ, and no completion an advantage for another reason."""
    if "dynamic_sampling/kept_ratio" in metrics:
        return metrics["dynamic_sampling/kept_ratio"] == 0 and not _unrewarded(metrics)
    # Equal rewards may still teach: REINFORCE++ compares groups, and HERO compares incorrect completions. Metrics of earlier versions have
    # no frac_advantage_zero.
    without_advantage = metrics.get("frac_advantage_zero", 1) == 1
    return metrics.get("frac_reward_zero_std") == 1 and without_advantage and _learns(metrics)


def history(directory: pathlib.Path, begin: int) -> list[dict[str, Any]]:
    """Returns the metrics of the first `begin` steps of a phase; an empty list on all processes but the first."""
    lines = read_metrics(directory / "metrics.jsonl") if begin and hosts.is_first() else []
    return [line for line in lines if line["step"] > 0]


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
