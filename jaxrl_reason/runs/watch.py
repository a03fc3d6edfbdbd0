"""What a long run is watched for: updates that reach nothing end it, and figures that mean nothing is learnt are told in words."""

import collections
from collections.abc import Callable, Iterable, Mapping
import math
import pathlib

from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import writers

PATIENCE = 20  # steps in a row before a figure is told
ENTROPY_FLOOR = 0.01  # nats a token: nine of ten tokens are then certain


class NonFiniteError(Exception):
    """The loss or its gradient was not finite too often in a row; the message is a sentence."""


class SkippedUpdates:
    """Counts the steps in a row none of whose updates reached the weights, since the loss or its gradient was not finite.

    Args:
      limit: so many end the run.
      history: the metrics of the steps that were done before, in order; of several processes the first brings them.
    """

    def __init__(self, limit: int, history: Iterable[Mapping[str, float]] = ()):
        self._limit, self._count = limit, 0
        for metrics in history:
            self.look(metrics)
        self._count = hosts.largest(self._count)

    def look(self, metrics: Mapping[str, float]) -> bool:
        """Whether the limit is reached with this step."""
        # Not == 1: a float32 mean of ones may be a little less.
        self._count = self._count + 1 if metrics["skipped_update_ratio"] > 0.9999 else 0
        return self._count >= self._limit

    def error(self, step: str, advice: str) -> NonFiniteError:
        return NonFiniteError(
            f"At {step} the loss or its gradient was not finite, for the {_ordinal(self._count)} step in a row; none of their updates "
            f"has reached the weights. {advice}"
        )


class Watch:
    """Looks at the metrics of every RL step, and says once (again only after it was over) what a person should know.

    Args:
      say: takes a sentence.
      mismatch_limit: nats by which the sampler's and the trainer's log-probability of a token may differ.
      history: the metrics of the steps that were done before, in order: a run that goes on says nothing twice.
    """

    def __init__(self, say: Callable[[str], None], mismatch_limit: float, history: Iterable[Mapping[str, float]] = ()):
        self._say, self._limit = None, mismatch_limit
        self._recent, self._told = collections.deque(maxlen=PATIENCE), set()
        for metrics in history:
            self.look(metrics)
        self._say = say

    def look(self, metrics: Mapping[str, float], worst: Callable[[], str] = str) -> None:
        """Looks at the next step.

        Args:
          metrics: of the step; a figure that is None or NaN is unknown.
          worst: describes the token on which sampler and trainer agree least; only asked where that is told.
        """
        self._recent.append(metrics)
        difference = metrics["sampling/logp_difference_max"]
        self._tell(
            "mismatch",
            difference is None or not difference <= self._limit,  # also of NaN
            lambda: (
                f"The sampler's and the trainer's log-probability of a token differ by {difference or math.nan:.3g} nats, more than "
                f"config.sampling.mismatch_limit allows ({self._limit:g}): {worst()} What is learnt then comes from another law than the "
                "policy's; config.model.compute_dtype=float32 tells whether this is rounding."
            ),
        )
        self._tell(
            "missing",
            self._all(lambda m: m.get("completions/missing_reward_ratio") == 1),
            lambda: (
                f"For {PATIENCE} steps no completion has had a reward, so that nothing is learnt: see rewards/<name>/none_rate, error_rate and "
                "timeout_rate."
            ),
        )
        self._tell(
            "reward",
            self._all(_tied),
            lambda: (
                (
                    f"For {PATIENCE} steps no group's completions have differed in their reward ({metrics['reward']:.3g} in the mean, now), so "
                    "that there is nothing to learn from. If all are right, give harder prompts; if all are wrong, easier ones, "
                    "config.supervised.steps, or a larger config.max_completion_length; a larger config.group_size or "
                    "config.sampling.temperature makes them differ."
                )
                if "dynamic_sampling/reward" not in metrics
                else (
                    f"For {PATIENCE} steps dynamic sampling has found no group with right and wrong completions (the mean reward is "
                    f"{metrics['dynamic_sampling/reward']:.3g}, now), so that there is nothing to learn from. If all are right, give harder prompts; "
                    "if all are wrong, easier ones, or config.supervised.steps."
                )
            ),
        )
        self._tell(
            "entropy",
            self._all(lambda m: m["entropy"] is not None and m["entropy"] < ENTROPY_FLOOR and _learns(m)),
            lambda: (
                f"For {PATIENCE} steps the policy's entropy has been below {ENTROPY_FLOOR} nats a token (now {metrics['entropy']:.2g}): "
                "its completions hardly differ any more. config.update.entropy_coefficient, a larger config.sampling.temperature, "
                "config.update.kl_coefficient, a lower config.optimizer.learning_rate, or the methods dapo and progrpo keep it from collapsing."
            ),
        )

    def _tell(self, what: str, now: bool, sentence: Callable[[], str]) -> None:
        if now and what not in self._told and self._say is not None:
            self._say(f"warning: {sentence()}")
        self._told = self._told | {what} if now else self._told - {what}

    def _all(self, holds: Callable[[Mapping[str, float]], bool]) -> bool:
        """Whether this held in each of the last steps."""
        return len(self._recent) == PATIENCE and all(map(holds, self._recent))


def _learns(metrics: Mapping[str, float]) -> bool:
    """Whether any completion of the step was there to learn from; otherwise means over what was learnt are of nothing."""
    return metrics.get("completions/missing_reward_ratio") != 1 and metrics.get("dynamic_sampling/groups") != 0


def _tied(metrics: Mapping[str, float]) -> bool:
    """Whether no group of the step had rewards that differ."""
    if "dynamic_sampling/kept_ratio" in metrics:
        return metrics["dynamic_sampling/kept_ratio"] == 0
    return metrics["frac_reward_zero_std"] == 1 and _learns(metrics)


def history(directory: pathlib.Path, begin: int) -> list[dict[str, float]]:
    """The metrics of the steps that were done before a phase goes on; nothing on other processes than the first."""
    lines = writers.read_metrics(directory / "metrics.jsonl") if begin and hosts.first() else []
    return [line for line in lines if line["step"] > 0]


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
