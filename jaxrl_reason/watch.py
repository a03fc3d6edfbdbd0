"""What a long run is watched for: updates that reach nothing end it, and figures that mean nothing is learnt are told in words."""

import collections
from collections.abc import Callable, Iterable, Mapping
import math
import statistics

from jaxrl_reason import hosts

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
        self._count = self._count + 1 if metrics["skipped_update_ratio"] == 1 else 0
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
        self._say, self._limit = lambda _: None, mismatch_limit
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
        self._recent.append({name: metrics.get(name) for name in ("frac_reward_zero_std", "entropy", "reward")})
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
            "reward",
            self._all("frac_reward_zero_std", lambda x: x == 1),
            lambda: (
                f"For {PATIENCE} steps no group's completions have differed in their reward ({self._mean('reward'):.3g} in the mean), so that "
                "there is nothing to learn from. If all are right, give harder prompts; if all are wrong, easier ones, "
                "config.supervised.steps, or a larger config.max_completion_length; a larger config.group_size or "
                "config.sampling.temperature makes them differ."
            ),
        )
        self._tell(
            "entropy",
            self._all("entropy", lambda x: x < ENTROPY_FLOOR),
            lambda: (
                f"For {PATIENCE} steps the policy's entropy has been below {ENTROPY_FLOOR} nats a token (now {self._recent[-1]['entropy']:.2g}): "
                "its completions hardly differ any more. config.update.entropy_coefficient, a larger config.sampling.temperature, "
                "config.update.kl_coefficient, a lower config.optimizer.learning_rate, or the methods dapo and progrpo keep it from collapsing."
            ),
        )

    def _tell(self, what: str, now: bool, sentence: Callable[[], str]) -> None:
        if now and what not in self._told:
            self._say(f"warning: {sentence()}")
        self._told = self._told | {what} if now else self._told - {what}

    def _all(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether this held in each of the last steps."""
        values = [metrics[name] for metrics in self._recent]
        return len(values) == PATIENCE and all(value is not None and holds(value) for value in values)

    def _mean(self, name: str) -> float:
        return statistics.fmean(x for x in (metrics[name] for metrics in self._recent) if x is not None)


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
