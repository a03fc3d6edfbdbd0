"""The rewards of a run, as its configuration names them: device rewards traced, host rewards called."""

from collections.abc import Callable, Mapping, Sequence
import copy
import functools
import itertools
import math
from typing import Any
import warnings

import jax
import numpy as np

from jaxrl_reason.config import Reward
from jaxrl_reason.data import files, PromptBatch, PromptTemplate, Source, Tokenizer
from jaxrl_reason.rewards import host, isolated
from jaxrl_reason.rewards.device import match_answer_tokens
from jaxrl_reason.rewards.numeric import extract_answer
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout

# Learned rewards: the reward model's score, and its logistic function, which lies in (0, 1).
LEARNED = {"reward_model": lambda x: x, "reward_model_probability": jax.nn.sigmoid}
ANSWER_MARKER = "####"  # announces the answer that `match_answer` compares, after one space: "#### -3"


class Scorer:
    """Scores rollouts. Only token ids leave the device, and only for host rewards; only rewards come back.

    Args:
      settings: `config.reward`: of its functions "match_answer" runs on the device, the learned ones do too, those built in are
        called here, and those of the user's own in worker processes (`isolated`).
      tokenizer, template: turn ids and rows into the text that host rewards read.
      sharding: where rewards [P, G] live.

    Attributes:
      names, weights, verdict: as configured, by the names that metrics use.
      by_function: from the names in `functions` to these.
      on_host: whether a score needs the host.

    Raises:
      RewardError: a function that cannot be found, two of one name, weights that are not finite or all 0, or
        match_answer with a tokenizer that it cannot work with.
    """

    def __init__(
        self,
        settings: Reward,
        *,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        sharding: jax.sharding.Sharding,
    ):
        functions = settings.functions
        weights = [float(w) for w in settings.weights] or [1.0] * len(functions)
        self._tokenizer, self._template, self._sharding = tokenizer, template, sharding
        self._max_failure_share = settings.max_failure_share
        self._host, self._device, self._learned, names = [], {}, {}, {}
        self._reward_model = None
        limits = dict(workers=settings.workers, timeout_s=settings.timeout_s, memory_mb=settings.memory_mb)
        pool = functools.cache(lambda: isolated.make_pool([spec for spec in functions if ":" in spec], **limits))
        for spec, weight in zip(functions, weights, strict=True):
            if spec == "match_answer":
                name, self._answers = spec, _AnswerTokens(tokenizer)
                function = match_answer_tokens(self._answers.marker, eos_ids=tokenizer.eos_ids)
                self._device[name] = jax.jit(function, out_shardings=sharding)
            elif spec in LEARNED:
                name = spec
                self._learned[name] = jax.jit(LEARNED[spec], out_shardings=sharding)
            else:
                function = host.load_reward(spec, besides=["match_answer", *LEARNED])
                if spec not in host.BUILT_IN:
                    function = isolated.Isolated(spec, function, pool(), settings.max_failure_share)
                reward = host.HostReward(spec if spec in host.BUILT_IN else None, function)
                self._host.append(reward)
                name = reward.name
            if name in names.values():
                raise host.RewardError(
                    f"Two rewards are named {name!r}; metrics are logged by name, so give each a name of its own."
                )
            if not math.isfinite(weight):
                raise host.RewardError(f"The weight of reward {name!r} is {weight}; give a finite number.")
            names[spec] = name
        if not any(weights):
            raise host.RewardError(
                "No reward has a weight other than 0, so there is nothing to learn from; give at least one."
            )
        self.names, self.weights = tuple(names.values()), dict(zip(names.values(), weights))
        self.by_function, self.verdict = names, names[settings.verdict or functions[0]]
        self.on_host = bool(self._host)

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[dict[str, jax.Array], dict[str, float]]:
        """Scores the completions of a batch, of which each process brings its share of the rows.

        Returns:
          name -> f32[P, G] on the device, in the order of `names`, NaN where missing; and metrics of host rewards
          (`rewards/<name>/{error_rate,none_rate,timeout_rate}`; `rewards/reward_model/too_long_ratio` of a pretrained one).

        Raises:
          RewardError: a host reward breaks its contract (see `host.score`), or match_answer meets a row whose answer
            it cannot compare.
        """
        return self.begin(rollout, batch)()

    def begin(
        self, rollout: Rollout, batch: PromptBatch
    ) -> Callable[[], tuple[dict[str, jax.Array], dict[str, float]]]:
        """Asks the host rewards, for which these completions have to be there; called, the result does the rest, and returns or raises as
        `__call__`.

        Between the two devices can go on with what was dispatched before: nothing here waits for other processes.
        """
        asked = hosts.attempt(lambda: self._ask(rollout, batch), host.RewardError) if self._host else None
        return functools.partial(self._finish, rollout, batch, asked)

    def _finish(self, rollout: Rollout, batch: PromptBatch, asked: Callable[[], host.RewardTable] | None):
        rewards, metrics, size = {}, {}, len(rollout.tokens)
        put = lambda x: hosts.put_share(x, self._sharding, size)
        if self._device:
            answers = hosts.agree(lambda: self._answers.encode(batch.rows), host.RewardError)
            columns = {"answer_tokens": put(_padded(answers))}
            for name, function in self._device.items():
                rewards[name] = function(rollout.tokens, rollout.mask, columns)
        if self._learned:
            scores, metrics = self._reward_model(rollout, batch)
            rewards |= {name: function(scores) for name, function in self._learned.items()}
        if asked:
            table = hosts.agree(asked, host.RewardError)
            for name, values in table.per_reward.items():
                everyone = hosts.together(values, self._sharding, size)
                rewards[name] = hosts.put(everyone, self._sharding)
            failures = hosts.mean(table.failures())
            for name in table.error:
                self._check_failures(name, failures, table)
            metrics = metrics | failures
        return {name: rewards[name] for name in self.names}, metrics

    def _ask(self, rollout: Rollout, batch: PromptBatch) -> host.RewardTable:
        """What the host rewards say about this process's share."""
        tokens, mask = (hosts.share(x, self._sharding) for x in (rollout.tokens, rollout.mask))
        ids = [[row[live].tolist() for row, live in zip(*group)] for group in zip(tokens, mask)]
        texts = [self._tokenizer.decode_batch(group) for group in ids]
        prompts = [self._template.render_prompt(row) for row in batch.rows]
        # How many may fail is asked of all processes' rows, in `_check_failures`.
        return host.score(self._host, prompts, texts, ids, _columns(batch.rows), max_failure_share=1.0)

    def _check_failures(self, name: str, failures: Mapping[str, float], table: host.RewardTable) -> None:
        """Refuses too large a share of failures, in the words of a process that has met one; `failures` are of all of them."""
        share = failures[f"rewards/{name}/error_rate"] + failures[f"rewards/{name}/timeout_rate"]
        if share <= self._max_failure_share + 1e-6:  # rounded, as the mean over processes is
            return

        def refuse():
            if table.error_rate[name] + table.timeout_rate[name]:
                raise host.RewardError(
                    f"Reward {name!r} failed on {share:.1%} of the completions, and config.reward.max_failure_share allows "
                    f"{self._max_failure_share:.1%}; the last error is {table.error[name] or 'not told'}"
                )

        hosts.agree(refuse, host.RewardError)

    def with_reward_model(
        self, score: Callable[[Rollout, PromptBatch], tuple[jax.Array, dict[str, float]]]
    ) -> "Scorer":
        """This scorer with a reward model: (Rollout, its batch) -> f32[P, G] on the device, NaN where missing, and metrics."""
        other = copy.copy(self)
        other._reward_model = score
        return other

    def answers_of(self, name: str) -> Callable[[list[list[str]], Sequence[Mapping[str, Any]]], list[list]] | None:
        """How a host reward tells answers apart, if it says so by an attribute `answer_of(completion, row)`: of each row's completions, the
        answers, equal where they are the same; None where there is none."""
        for reward in self._host:
            if reward.name == name and hasattr(reward.function, "answers_of"):
                return reward.function.answers_of
            if reward.name == name and hasattr(reward.function, "answer_of"):
                return each(reward.function.answer_of)
        return None

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuses, before there are completions, the rows of a batch that `__call__` would refuse; calls no reward.

        Raises:
          RewardError: a host reward cannot take their columns, or match_answer cannot compare an answer.
        """
        if self._device:
            self._answers.encode(rows)
        if self._host:
            columns = _columns(rows)
            one_each = [""] * len(rows)
            host.checked_shape(one_each, [[""]] * len(rows), [[[]]] * len(rows), columns)
            for reward in self._host:
                host.check_signature(
                    reward, dict(prompts=one_each, completions=one_each, completion_ids=one_each) | columns
                )

    def check_references(self, source: Source, first: int | None = None) -> None:
        """Warns, by place and reason, of rows that a built-in reward cannot judge whatever is answered; they will have no reward.

        Args:
          source: rows that are going to be scored.
          first: only so many of them; None: all.

        Raises:
          RewardError: they are more than `max_failure_share` of the rows.
        """
        for reward in self._host:
            if reward.function not in [host.BUILT_IN[name] for name in host.COMPARING]:
                continue
            reports, count = [], 0
            for i, row in enumerate(itertools.islice(source, first)):
                asked = dict(prompts=[""], completions=[""], completion_ids=[[]])
                try:
                    reward.function(**_columns([row]) | asked)
                except (ValueError, TypeError) as e:  # what it reads is no number, or is not there
                    count += 1
                    if len(reports) < files.REPORTED:
                        reports.append(f"{source.place(i)}: {e}")
            if not count:
                continue
            said = files.listed(f"Reward {reward.name!r} cannot judge {count} of {i + 1} rows", reports, count)
            if count > self._max_failure_share * (i + 1):
                raise host.RewardError(f"{said}\nCorrect them, or choose a reward for answers like these.")
            warnings.warn(f"{said}\nThey will have no reward.", stacklevel=2)


def each(answer_of: Callable[[str, Mapping[str, Any]], Any]):
    """(texts [P][K], rows) -> the answer of every text."""
    return lambda texts, rows: [
        [answer_of(text, row) for text in group] for group, row in zip(texts, rows, strict=True)
    ]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """column -> a value a row, None where a row lacks it."""
    return {key: [row.get(key) for row in rows] for key in sorted(set().union(*rows))}


class _AnswerTokens:
    """What match_answer looks for: the marker, and behind it the tokens of " " and the answer.

    Both are cut out of one encoded text, on a line of its own as solutions have it, since a tokenizer may join the
    space with what follows: " -3" is " -" and "3" to the embedded one.

    Attributes:
      marker: its token ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        line, marked = tokenizer.encode_batch(["\n", "\n" + ANSWER_MARKER])
        self._begin, self.marker = marked, tuple(marked[len(line) :])
        if marked[: len(line)] != line or not self.marker:
            raise host.RewardError(
                f"The reward 'match_answer' compares tokens, and this tokenizer joins {ANSWER_MARKER!r} with the line "
                "break before it; use the reward 'accuracy', which compares numbers."
            )

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The tokens of each row's answer."""
        answers = [_answer(row) for row in rows]
        encoded = self._tokenizer.encode_batch([f"\n{ANSWER_MARKER} {answer}" for answer in answers])
        for answer, ids in zip(answers, encoded):
            if ids[: len(self._begin)] != self._begin:
                raise host.RewardError(
                    f"The reward 'match_answer' compares tokens, and this tokenizer joins the answer {answer!r} with "
                    f"the {ANSWER_MARKER!r} before it; use the reward 'accuracy', which compares numbers."
                )
        return [ids[len(self._begin) :] for ids in encoded]


def _padded(answers: list[list[int]]) -> np.ndarray:
    """int32[P, A], padded with -1 to a multiple of 8 so that few shapes are compiled; one A for all processes."""
    width = -(-hosts.largest(max(map(len, answers))) // 8) * 8
    padded = np.full((len(answers), width), -1, np.int32)
    for row, ids in zip(padded, answers):
        row[: len(ids)] = ids
    return padded


def _answer(row: Mapping[str, Any]) -> str:
    """The final answer of a row, whose column `answer` may be a worked solution, as for `accuracy`."""
    text = row.get("answer")
    if text is not None:
        text = str(text)
        text = (extract_answer(text) or text).strip()
    if not text:
        raise host.RewardError(
            f"The reward 'match_answer' needs the column 'answer', and a row has {text!r} there; its columns are "
            f"{', '.join(sorted(row))}."
        )
    return text
