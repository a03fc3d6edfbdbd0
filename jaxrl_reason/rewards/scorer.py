"""The rewards of a run, as its configuration names them: device rewards are traced, host rewards are called."""

import collections
from collections.abc import Callable, Mapping, Sequence
import copy
import functools
import itertools
import math
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.config import Reward
from jaxrl_reason.data import ChatTemplate, files, PromptBatch, PromptTemplate, Source, Tokenizer
from jaxrl_reason.rewards import host, isolated
from jaxrl_reason.rewards.answers import extract_answer
from jaxrl_reason.rewards.device import match_answer_tokens
from jaxrl_reason.rewards.host import RewardError
from jaxrl_reason.rewards.loading import distinct_names, load_reward
from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.pool import Pool
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout

# Learned rewards: the score of the reward model, or the logistic function of the score, which is in (0, 1).
LEARNED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reward_model": lambda x: x,
    "reward_model_probability": jax.nn.sigmoid,
}
_ROWS_PER_CHECK = 4096  # rows whose references are read at once, by the worker processes of math_verify together
ANSWER_MARKER = "####"  # announces the answer that `match_answer` compares, after one space: "#### -3"

Template = PromptTemplate | ChatTemplate
Rewards = tuple[dict[str, jax.Array], dict[str, float]]  # name -> f32[P, G], NaN if missing; metrics
# (rollout, its batch) -> scores f32[P, G], NaN if missing; and metrics.
RewardModelScorer = Callable[[Rollout, PromptBatch], tuple[jax.Array, dict[str, float]]]


class RewardScorer:
    """Computes the rewards of rollouts. Only host rewards transfer data: token ids to the host, and rewards back.

    "match_answer" and the learned functions run on the device, the other built-in functions in this process, and the
    user's own functions in worker processes (`isolated`). The tokenizer and the template convert ids and rows to the
    text that host rewards read. `sharding` is that of rewards [P, G]. `output` takes what the user's own functions print;
    without it, nothing does.

    `names`, `weights` and `verdict` are as configured, by the names in the metrics, to which `by_function` maps the
    entries of `config.reward.functions`. `on_host` tells whether any reward needs the host. Raises RewardError if a
    function cannot be found, two have one name, a weight is not finite, all weights are 0, or match_answer cannot work
    with the tokenizer.
    """

    def __init__(
        self,
        settings: Reward,
        *,
        tokenizer: Tokenizer,
        template: Template,
        sharding: jax.sharding.Sharding,
        output: Output | None = None,
    ):
        functions = settings.functions
        weights = [float(w) for w in settings.weights] or [1.0] * len(functions)
        self._tokenizer, self._template, self._sharding = tokenizer, template, sharding
        self._max_failure_share, self._skip_special = settings.max_failure_share, settings.skip_special_tokens
        self._evaluated, self._failed = 0, collections.defaultdict[str, float](float)  # see `over`
        self._host: list[host.HostReward] = []
        self._device: dict[str, Callable[..., jax.Array]] = {}
        self._learned: dict[str, Callable[[jax.Array], jax.Array]] = {}
        self._reward_model: RewardModelScorer | None = None
        self.by_function: dict[str, str] = {}
        own = {spec: load_reward(spec) for spec in functions if ":" in spec}
        names = distinct_names(own, [spec for spec in functions if spec not in own])
        pool_of = _pools(own, settings, output)
        for spec, weight in zip(functions, weights, strict=True):
            name = names.get(spec, spec)
            if spec in own:
                isolate = isolated.Isolated(spec, own[spec], pool_of(spec), self._max_failure_share, name)
                self._host.append(host.HostReward(name, isolate))
            else:
                self._open(spec)
            if name in self.by_function.values():
                raise RewardError(f"Two rewards are named {name!r}; metrics are logged by name, so rename one of them.")
            if not math.isfinite(weight):
                raise RewardError(f"The weight of reward {name!r} is {weight}; give a finite number.")
            self.by_function[spec] = name
        if not any(weights):
            raise RewardError("No reward has a weight other than 0, so there is nothing to learn; weight at least one.")
        self.names = tuple(self.by_function.values())
        self.weights = dict(zip(self.names, weights))
        self.verdict = self.by_function[settings.verdict or functions[0]]
        self.on_host = bool(self._host)

    def _open(self, name: str) -> None:
        """Opens a built-in reward."""
        if name == "match_answer":
            self._answers = _AnswerTokens(self._tokenizer)
            match = match_answer_tokens(self._answers.marker, eos_ids=self._tokenizer.eos_ids)
            self._device[name] = jax.jit(match, out_shardings=self._sharding)
        elif name in LEARNED:
            self._learned[name] = jax.jit(LEARNED[name], out_shardings=self._sharding)
        else:
            function = load_reward(name, other_names=["match_answer", *LEARNED])
            self._host.append(host.HostReward(name, function))

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> Rewards:
        """Computes the rewards of the completions of a batch. Each process brings its share of the rows.

        Returns name -> f32[P, G] on the device, in the order of `names`, NaN if missing; and the metrics
        `rewards/<name>/{error_rate,none_rate,timeout_rate}` of host rewards, `rewards/reward_model/too_long_ratio` of a
        pretrained reward model. If a reward with a weight fails on a sample, the sample has none of the rewards with a
        weight, so that training leaves it out; evaluations keep the others (see `over`). Raises RewardError if a host reward breaks its contract (see `host.compute_rewards`),
        or if match_answer cannot compare the answer of a row.
        """
        return self.begin(rollout, batch)()

    def begin(self, rollout: Rollout, batch: PromptBatch) -> Callable[[], Rewards]:
        """Calls the host rewards, which wait for the completions, and returns a function that does the rest.

        The returned function returns or raises as `__call__` does. Between the two calls, the device can go on with
        work that was dispatched before: nothing here waits for other processes.
        """
        called = hosts.attempt(lambda: self._call_host(rollout, batch), RewardError) if self._host else None
        return functools.partial(self._finish, rollout, batch, called)

    def _finish(self, rollout: Rollout, batch: PromptBatch, called: Callable[[], host.RewardTable] | None) -> Rewards:
        rewards: dict[str, jax.Array] = {}
        metrics: dict[str, float] = {}
        size = len(rollout.tokens)
        if self._device:
            answers = hosts.agree(lambda: self._answers.encode(batch.rows), RewardError)
            columns = {"answer_tokens": hosts.put_rows(_padded(answers), self._sharding, size)}
            for name, function in self._device.items():
                rewards[name] = function(rollout.tokens, rollout.mask, columns)
        if self._learned:
            assert self._reward_model is not None, "with_reward_model comes first"
            scores, metrics = self._reward_model(rollout, batch)
            rewards |= {name: function(scores) for name, function in self._learned.items()}
        if called:
            table = hosts.agree(called, RewardError)
            for name, values in table.per_reward.items():
                rewards[name] = hosts.put(hosts.gather_rows(values, self._sharding, size), self._sharding)
            failures = hosts.mean(table.failures())
            rows = hosts.mean({"rows": float((batch.weight > 0).sum())})["rows"] * jax.process_count()
            for name in table.error:
                self._check_failures(name, failures, table, rows)
                host.warn_of_failures(table, name)
            metrics = metrics | failures
            rewards |= self._without_failed(rewards, table, failures, size)
        return {name: rewards[name] for name in self.names}, metrics

    def _without_failed(
        self, rewards: Mapping[str, jax.Array], table: host.RewardTable, failures: Mapping[str, float], size: int
    ) -> dict[str, jax.Array]:
        """Returns the rewards that count in training, NaN on samples on which one of them fails; {} if none does."""
        kinds = ("error_rate", "timeout_rate")
        fail = [n for n in table.failed if self.weights[n] and any(failures[f"rewards/{n}/{kind}"] for kind in kinds)]
        if self._evaluated or not fail:
            return {}
        any_failed = np.any([table.failed[name] for name in fail], axis=0)
        failed = hosts.put(hosts.gather_rows(any_failed, self._sharding, size), self._sharding)
        return {name: _leave_out(rewards[name], failed) for name in self.names if self.weights[name]}

    def _call_host(self, rollout: Rollout, batch: PromptBatch) -> host.RewardTable:
        """Calls the host rewards on this process's share of the rows."""
        ids = local_token_ids(rollout, self._sharding)
        texts = [self._tokenizer.completions(group, self._skip_special) for group in ids]
        prompts = [self._template.render_prompt(row) for row in batch.rows]
        # `_check_failures` limits the failures among the rows of all processes.
        columns = _columns(batch.rows)
        return host.compute_rewards(self._host, prompts, texts, ids, columns, max_failure_share=1.0, warns=False)

    def _check_failures(self, name: str, failures: Mapping[str, float], table: host.RewardTable, rows: float) -> None:
        """Raises RewardError, quoting one process's error, if `failures`, the shares of all processes, are too large.

        `rows` is the number of prompts of the batch, on all processes.
        """
        share = failures[f"rewards/{name}/error_rate"] + failures[f"rewards/{name}/timeout_rate"]
        if self._evaluated:
            self._failed[name] += share * rows
            share = self._failed[name] / self._evaluated
        if share <= self._max_failure_share + 1e-6:  # the mean over processes is rounded
            return

        def refuse() -> None:
            if table.error_rate[name] + table.timeout_rate[name]:
                raise RewardError(
                    f"Reward {name!r} failed on {share:.1%} of the completions, and config.reward.max_failure_share "
                    f"allows {self._max_failure_share:.1%}; the last error is {(table.error[name] or 'unknown').rstrip('.')}. The "
                    f"first failure is on a completion of the prompt {table.prompt[name]!r:.80}."
                )

        hosts.agree(refuse, RewardError)

    def with_reward_model(self, score: RewardModelScorer) -> "RewardScorer":
        """Returns this scorer with a reward model: (rollout, batch) -> (f32[P, G], NaN if missing; metrics)."""
        other = copy.copy(self)
        other._reward_model = score
        return other

    def over(self, prompts: int) -> "RewardScorer":
        """Returns this scorer for one evaluation of a number of prompts in batches.

        `max_failure_share` is a share of all of them then, and not of each batch: the last batch may have one prompt only.
        A sample on which a reward fails keeps its other rewards.
        """
        other = copy.copy(self)
        other._evaluated, other._failed = prompts, collections.defaultdict(float)
        return other

    def answers_of(self, name: str) -> Callable[[list[list[str]], Sequence[Mapping[str, Any]]], list[list]] | None:
        """Returns the function by which a host reward tells answers apart, or None if it has no `answer_of`.

        The function maps the completions of each row to their answers, which are equal if they mean the same; a
        completion without an answer gets None.
        """
        function: Any = next((reward.function for reward in self._host if reward.name == name), None)
        if hasattr(function, "answers_of"):
            return function.answers_of
        return each(function.answer_of) if hasattr(function, "answer_of") else None

    def has_one_answer(self, name: str) -> bool:
        """Returns whether a reward compares answers with one reference per row, so that all correct ones mean the same."""
        functions = {reward.name: reward.function for reward in self._host}
        return name == "match_answer" or functions.get(name) in host.ONE_REFERENCE

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Checks, before there are completions, that `__call__` will accept the rows of a batch. Calls no reward.

        Raises RewardError if a host reward cannot take their columns, or if match_answer cannot compare an answer.
        """
        if self._device:
            self._answers.encode(rows)
        if self._host:
            columns, one_each = _columns(rows), [""] * len(rows)
            host.checked_shape(one_each, [[""]] * len(rows), [[[]]] * len(rows), columns)
            arguments = dict(prompts=one_each, completions=one_each, completion_ids=one_each) | columns
            for reward in self._host:
                host.check_signature(reward, arguments)

    def try_out(self, rows: Sequence[Mapping[str, Any]], samples: int) -> None:
        """Calls each of the user's own functions once, on `samples` made-up completions of the first row.

        If all fail, the function is called for the next row. The workers end after it, and with them the state of the
        functions. Raises RewardError if a function breaks its contract, or if it fails on every row; the second only if
        `max_failure_share` is below 1.
        """
        for reward in self._host:
            if not isinstance(reward.function, isolated.Isolated):
                continue
            for row in rows:
                texts = [_made_up(row, sample) for sample in range(samples)]
                ids = [[*self._tokenizer.encode(text), self._tokenizer.eos_ids[0]] for text in texts]
                prompt = self._template.render_prompt(row)
                table = host.compute_rewards(
                    [reward], [prompt], [texts], [ids], _columns([row]), max_failure_share=1.0, warns=False
                )
                if table.error_rate[reward.name] + table.timeout_rate[reward.name] < 1:
                    break
            else:
                if self._max_failure_share < 1:
                    raise RewardError(
                        f"Reward {reward.name!r} failed on all {samples} made-up completions, of each of {len(rows)} rows; "
                        f"the last error is {(table.error[reward.name] or 'unknown').rstrip('.')}. Correct the function; if it may "
                        "fail on such texts, return None for them, or set config.reward.max_failure_share=1."
                    )
            reward.function.forget()

    def check_references(self, source: Source, first: int | None = None) -> None:
        """Warns of rows whose reference a built-in reward cannot read, by place and reason. They will have no reward.

        Checks the first rows, or all. Raises RewardError if such rows are more than `max_failure_share` of the rows.
        """
        for reward in self._host:
            if reward.function not in host.COMPARING:
                continue
            reports: list[str] = []
            count = total = 0
            rows = itertools.islice(source, first)
            while chunk := list(itertools.islice(rows, _ROWS_PER_CHECK)):
                try:
                    faults = host.reference_faults(reward.function, _columns(chunk))
                except RuntimeError as error:  # no worker process can start
                    raise RewardError(f"Reward {reward.name!r} cannot be called. {error}") from None
                for place, fault in enumerate(faults, start=total):
                    if fault is not None:
                        count += 1
                        if len(reports) < files.REPORTED:
                            reports.append(f"{source.place(place)}: {fault}")
                total += len(chunk)
            if not count:
                continue
            report = files.listed(f"Reward {reward.name!r} cannot judge {count} of {total} rows", reports, count)
            if count > self._max_failure_share * total:
                raise RewardError(f"{report}\nCorrect these rows, or choose a reward that reads such answers.")
            warnings.warn(f"{report}\nThese rows will have no reward.", stacklevel=2)


@jax.jit
def _leave_out(rewards: jax.Array, failed: jax.Array) -> jax.Array:
    return jnp.where(failed, jnp.nan, rewards)


def each(answer_of: Callable[[str, Mapping[str, Any]], Any]) -> Callable[..., list[list]]:
    """Returns the function (texts [P][K], rows) -> the answer of every text."""
    answers = lambda group, row: [answer_of(text, row) for text in group]
    return lambda texts, rows: [answers(group, row) for group, row in zip(texts, rows, strict=True)]


def local_token_ids(rollout: Rollout, sharding: jax.sharding.Sharding) -> list[list[list[int]]]:
    """Returns the sampled token ids [P][G][length] of this process's rows, end token included."""
    tokens, mask = (hosts.rows_to_host(x, sharding) for x in (rollout.tokens, rollout.mask))
    return [[row[live].tolist() for row, live in zip(*group)] for group in zip(tokens, mask)]


def _pools(own: Mapping[str, host.RewardFunction], s: Reward, output: Output | None) -> Callable[[str], Pool]:
    """Returns the function from an own function's spec to its pool: one for each `async` function, one for the others."""
    make = functools.partial(
        isolated.make_pool, workers=s.workers, timeout_s=s.timeout_s, memory_mb=s.memory_mb, output=output
    )
    shared = [spec for spec, function in own.items() if not isolated.is_async(function)]
    pool = make(shared)
    return lambda spec: pool if spec in shared else make([spec])


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Returns column -> one value per row, None if a row lacks the column."""
    return {key: [row.get(key) for row in rows] for key in sorted(set().union(*rows))}


def _made_up(row: Mapping[str, Any], sample: int) -> str:
    """Returns one of several texts as a policy could write them, with the answer of a row."""
    answer = row.get("answer", 1)
    texts = [
        str(row.get("solution") or f"The answer is {answer}."),
        f"So it is\n#### {answer}",
        f"So it is \\boxed{{{answer}}}.",
        f"<think>\nIt is {answer}.\n</think>\n<answer>{answer}</answer>",
    ]
    return texts[sample % len(texts)]


class _AnswerTokens:
    """The tokens that match_answer compares: the marker, and after it the tokens of " " and the answer."""

    # Both are cut out of one encoded text, on a line of its own as in the solutions. A tokenizer may join the space
    # with the text after it: the embedded tokenizer splits " -3" into " -" and "3".

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        line, marked = tokenizer.encode_batch(["\n", "\n" + ANSWER_MARKER])
        self._begin, self.marker = marked, tuple(marked[len(line) :])
        if marked[: len(line)] != line or not self.marker:
            raise RewardError(
                f"The reward 'match_answer' compares tokens, and this tokenizer joins {ANSWER_MARKER!r} with the line "
                "break before it; use the reward 'accuracy', which compares numbers."
            )

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Returns the tokens of each row's answer. Raises RewardError if there is none or it joins the marker."""
        answers = [_answer(row) for row in rows]
        encoded = self._tokenizer.encode_batch([f"\n{ANSWER_MARKER} {answer}" for answer in answers])
        for answer, ids in zip(answers, encoded):
            if ids[: len(self._begin)] != self._begin:
                raise RewardError(
                    f"The reward 'match_answer' compares tokens, and this tokenizer joins the answer {answer!r} with "
                    f"the {ANSWER_MARKER!r} before it; use the reward 'accuracy', which compares numbers."
                )
        return [ids[len(self._begin) :] for ids in encoded]


def _padded(answers: list[list[int]]) -> np.ndarray:
    """Returns int32[P, A], padded with -1. A is equal in all processes, and a multiple of 8 to compile few shapes."""
    width = -(-hosts.largest(max(map(len, answers))) // 8) * 8
    return np.array([ids + [-1] * (width - len(ids)) for ids in answers], np.int32)


def _answer(row: Mapping[str, Any]) -> str:
    """Returns the final answer of a row. As for `accuracy`, the column `answer` may be a worked solution."""
    text = row.get("answer")
    if text is not None:
        text = (extract_answer(str(text)) or str(text)).strip()
    if not text:
        raise RewardError(
            f"The reward 'match_answer' needs the column 'answer', and a row has {text!r} there; its columns are "
            f"{', '.join(sorted(row))}."
        )
    return text
