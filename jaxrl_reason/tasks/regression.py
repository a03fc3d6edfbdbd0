"""GenRe2's task: predict a number by decoding its digits (arXiv 2512.06533). Tables in, digits out.

What a text run has as tokenizer, prompt stream, solution stream, scorer and evaluation, a regression run has from here; the loop,
the rollout and the update are the same. Token ids: those of the number's alphabet first, then one that begins every prompt
(and pads), then, where rows enter as text, those of the text tokenizer.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import metrics
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import (
    load_tokenizer,
    numbers,
    PromptBatch,
    SolutionBatch,
    streams,
    tables,
    Tokenizer,
    train_tokenizer,
)
from jaxrl_reason.methods import nearest
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout

REWARDS = ("squared_error", "heavy_tailed")


@dataclasses.dataclass(frozen=True)
class Digits:
    """The vocabulary of a regression run; stands where a text run has its tokenizer.

    Attributes:
      number: how numbers are spelt.
      target: scales targets; the number's alphabet writes z-scores, or the unit interval.
      text: tokenizer of rows that enter as text, or None.
      text_size: ids of the pretrained model that goes with it, which may have more than its tokenizer; 0: as the tokenizer.
    """

    number: numbers.NumberTokenizer
    target: tables.TargetScaler
    text: Tokenizer | None = None
    text_size: int = 0

    @property
    def pad_id(self) -> int:
        return len(self.number.tokens)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return ()  # a number has a fixed length

    @property
    def vocab_size(self) -> int:
        return self.pad_id + 1 + (self.text_size or (self.text.vocab_size if self.text else 0))

    @property
    def legal(self) -> np.ndarray:
        """bool[L, V]."""
        legal = self.number.legal
        return np.pad(legal, [(0, 0), (0, self.vocab_size - legal.shape[1])])

    def encode(self, targets: np.ndarray) -> np.ndarray:
        """Targets float[N] -> int32[N, L]."""
        scale = self.target.to_unit if self.number.unit_interval else self.target.to_z
        return self.number.encode(scale(np.asarray(targets, np.float64)))

    def decode(self, tokens: jax.Array) -> jax.Array:
        """int[..., L] -> f32[...], z-scores; NaN where they spell no number. Traceable."""
        value = self.number.decode(tokens)
        return self.target.unit_to_z(value) if self.number.unit_interval else value

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Digits or prompts as text, for people."""
        return [self._text(list(ids)) for ids in sequences]

    def description(self) -> dict[str, Any]:
        """What turns ids into numbers and back, as JSON holds it."""
        number = {"kind": type(self.number).__name__, **dataclasses.asdict(self.number)}
        return {"number": number, "target": dataclasses.asdict(self.target)}

    def save(self, directory) -> None:
        """Keeps the description in digits.json, and the text tokenizer, where there is one, beside it in text/."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True)
        (directory / "digits.json").write_text(json.dumps(self.description(), indent=2) + "\n", encoding="utf-8")
        if self.text:
            self.text.save(directory / "text")

    def _text(self, ids: list[int]) -> str:
        if ids and ids[0] == self.pad_id:
            return self.text.decode_batch([[i - self.pad_id - 1 for i in ids[1:]]])[0] if self.text else "(features)"
        return self.number.text(ids)

    def prompts(self, texts: Sequence[str] | None, rows: int) -> list[list[int]]:
        """The prompts of a table's rows as ids."""
        if texts is None:
            return [[self.pad_id]] * rows
        return [[self.pad_id, *(i + self.pad_id + 1 for i in ids)] for ids in self.text.encode_batch(list(texts))]


def row_texts(table: tables.Table) -> list[str]:
    """Rows as text: "bmi 25.3, sex 1, city Rome"."""

    def one(features, labels):
        pairs = [(n, f"{x:.5g}") for n, x in zip(table.names, features) if not np.isnan(x)]
        pairs += [(n, label) for n, label in zip(table.label_names, labels) if label]
        return ", ".join(f"{name} {value}" for name, value in pairs)

    return [one(*row) for row in zip(table.features, table.labels)]


class Stream:
    """Rows of a table as endless shuffled batches: `batch(i)` is a pure function of i, as of `data.PromptStream`.

    Args:
      rows: from `read`.
      batch_size: rows a batch.
      seed: of the shuffle.
      solutions: whether batches are SolutionBatches (the digits to learn) or PromptBatches.
      places: see `data.PromptStream`.
    """

    def __init__(self, rows: "Rows", *, batch_size: int, seed: int, solutions: bool, places: np.ndarray | None = None):
        self._rows, self._batch_size, self._solutions = rows, batch_size, solutions
        self._order = streams.endless(len(rows.targets), batch_size, seed, shuffle=True)
        self._places = np.arange(batch_size) if places is None else places
        self.skipped = 0

    def batch(self, i: int) -> PromptBatch | SolutionBatch:
        chosen = streams.batch_at(self._order, i)[self._places]
        if self._solutions:
            return self._rows.solutions(chosen)
        return self._rows.prompts(chosen, np.int32(i * self._batch_size + self._places))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, encoded.

    Attributes:
      padded: the prompts.
      features: f32[N, F] for the policy, or None where rows enter as text.
      numeric: f32[N, F], the same where rows enter as text too: what a regressor beside the policy reads.
      digits: int32[N, L].
      z: f32[N], targets as z-scores.
      targets: float64[N].
      values: f32[N], what the rows are worth, or None.
    """

    padded: streams.Padded
    features: np.ndarray | None
    numeric: np.ndarray
    digits: np.ndarray
    z: np.ndarray
    targets: np.ndarray
    values: np.ndarray | None = None

    def prompts(self, chosen: np.ndarray, prompt_ids: np.ndarray, weight: np.ndarray | None = None) -> PromptBatch:
        tokens, mask = self.padded.take(chosen)
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            prompt_ids=prompt_ids,
            weight=np.ones(len(chosen), np.float32) if weight is None else weight,
            rows=[{"row": int(i), "target": float(self.targets[i])} for i in chosen],
            features=None if self.features is None else self.features[chosen],
            columns={"digits": self.digits[chosen], "z": self.z[chosen]}
            | ({} if self.values is None else {"values": self.values[chosen]}),
        )

    def solutions(self, chosen: np.ndarray) -> SolutionBatch:
        digits = self.digits[chosen]
        features = None if self.features is None else self.features[chosen]
        return SolutionBatch(*self.padded.take(chosen), digits, np.ones(digits.shape, bool), features)


@dataclasses.dataclass(frozen=True)
class Task:
    """A regression run's data.

    Attributes:
      tokenizer: the vocabulary.
      features: how many numbers a prompt carries; 0 where rows enter as text.
      train, held_out: encoded rows.
      fingerprint: of the tables and their split.
      best_r2: the R2 that no regressor exceeds on the held-out rows, where it is known.
    """

    tokenizer: Digits
    features: int
    train: Rows
    held_out: Rows
    fingerprint: str
    best_r2: float | None


def open_task(config: Config, text: Tokenizer | None = None, text_size: int = 0) -> Task:
    """Opens and encodes the tables of a configuration with `regression.tokenizer`.

    Args:
      config: of the run.
      text: tokenizer of rows as text; None: config.data.tokenizer, or one that is trained on them.
      text_size: see `Digits`.

    Raises:
      ConfigError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    c, r = config, config.regression
    try:
        number = numbers.make_tokenizer(r.tokenizer, **r.tokenizer_options)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"config.regression.tokenizer_options: {e}") from e
    if c.max_completion_length != number.length:
        raise ConfigError(
            f"config.max_completion_length is {c.max_completion_length}, and the numbers of config.regression.tokenizer have "
            f"{number.length} tokens; set it to {number.length}."
        )
    opened = functools.partial(
        tables.load_table,
        target=r.target,
        categorical=r.categorical,
        missing=r.missing,
        data_dir=c.data.data_dir or None,
    )
    train, values = take_values(opened(c.data.train, c.data.train_split), r.value)
    held_out, held_out_values = take_values(opened(c.data.eval or c.data.train, c.data.eval_split), r.value)
    as_text = r.inputs == "text"
    if as_text and text is None:
        text = load_tokenizer(c.data.tokenizer) if c.data.tokenizer else None
        text = text or train_tokenizer(row_texts(train)[:2000], c.data.vocab_size)
    digits = Digits(number, tables.TargetScaler.fit(train.targets), text if as_text else None, text_size)
    scaler = tables.fit_features(train)

    def encode(table: tables.Table, values: np.ndarray | None) -> Rows:
        prompts = digits.prompts(row_texts(table) if as_text else None, len(table))
        longest = max(map(len, prompts))
        if longest > c.max_prompt_length:
            raise ConfigError(
                f"config.max_prompt_length is {c.max_prompt_length}, and a row of {table.name} has {longest} tokens; raise it."
            )
        features = scaler.transform(table)
        return Rows(
            streams.Padded(prompts, c.max_prompt_length, digits.pad_id),
            None if as_text else features,
            features,
            digits.encode(table.targets),
            np.asarray(digits.target.to_z(table.targets), np.float32),
            table.targets,
            values,
        )

    fingerprint = f"{train.fingerprint}/{held_out.fingerprint}"
    features = 0 if as_text else len(scaler.outputs)
    rows = encode(train, values), encode(held_out, held_out_values)
    return Task(digits, features, *rows, fingerprint, held_out.best_r2)


def take_values(table: tables.Table, column: str) -> tuple[tables.Table, np.ndarray | None]:
    """The table without the column of its rows' values, and these, f32[N]; as it is, and None, without a name.

    Raises:
      ConfigError: no such column of numbers, or a value that is missing or outside [0, 1].
    """
    if not column:
        return table, None
    if column not in table.names:
        raise ConfigError(
            f"config.regression.value is {column!r}, and {table.name} has no such column of numbers."
            f"{nearest(column, table.names)}"
        )
    at = table.names.index(column)
    values = table.features[:, at]
    bad = np.flatnonzero(~((0 <= values) & (values <= 1)))
    if bad.size:
        raise ConfigError(
            f"Row {bad[0]} of {table.name} has {values[bad[0]]:g} in the column {column!r}; a value lies in [0, 1]."
        )
    names = tuple(name for name in table.names if name != column)
    rest = dataclasses.replace(table, names=names, features=np.delete(table.features, at, axis=1))
    return rest, values.astype(np.float32)


def eval_batches(rows: Rows, count: int, batch_size: int) -> list[PromptBatch]:
    """The first `count` rows (all, where there are fewer), as `data.eval_prompts` batches them."""
    count = min(count, len(rows.targets))
    batches = []
    for start in range(0, count, batch_size):
        real = np.arange(start, min(start + batch_size, count))
        chosen = np.concatenate([real, np.full(batch_size - len(real), start)]).astype(np.int32)
        weight = (np.arange(batch_size) < len(real)).astype(np.float32)
        batches.append(rows.prompts(chosen, chosen, weight))
    return batches


class NumberScorer:
    """Rewards of decoded numbers, on the device: minus the squared error in z-scores.

    "squared_error": -(yhat - y)^2. "heavy_tailed": -min((yhat - y)^2, 50), and -100 for what spells no number.

    Args:
      functions, weights: as in `config.reward`: one of these.
      tokenizer: decodes.
      sharding: where rewards [P, G] live.
    """

    def __init__(self, functions, weights, tokenizer: Digits, sharding: jax.sharding.Sharding):
        if len(functions) != 1 or functions[0] not in REWARDS:
            raise ConfigError(
                f"config.reward.functions is {functions}; a regression run has one reward, {' or '.join(REWARDS)}."
            )
        name = functions[0]
        self.names, self.verdict = (name,), name
        self.weights = {name: float(weights[0]) if weights else 1.0}
        if not self.weights[name] > 0:
            raise ConfigError(f"config.reward.weights is {list(weights)}; the only reward needs a weight above 0.")
        self._sharding = sharding

        def reward(tokens, z):
            # A number of the wide alphabets can be so far off that its square is no float32.
            error = jnp.minimum(jnp.square(tokenizer.decode(tokens) - z[:, None]), jnp.finfo(jnp.float32).max)
            if name == "squared_error":
                return -error
            return jnp.where(jnp.isnan(error), -100.0, -jnp.minimum(error, 50.0))

        self._reward = jax.jit(reward, out_shardings=sharding)

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[dict[str, jax.Array], dict[str, float]]:
        """(name -> f32[P, G], no metrics of the host)."""
        z = hosts.put_share(batch.columns["z"], self._sharding, len(rollout.tokens))
        return {self.verdict: self._reward(rollout.tokens, z)}, {}

    def begin(self, rollout: Rollout, batch: PromptBatch) -> Callable:
        """() -> as `__call__`: nothing is to be asked of the host."""
        return functools.partial(self, rollout, batch)

    def check(self, *rows) -> None:
        """There is nothing that a row could lack: tables are checked when they are read."""


def predictions(
    generate: Callable[[PromptBatch], Rollout], batches: Sequence[PromptBatch], tokenizer: Digits
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded samples f32[N, K] and targets f32[N], in z-scores."""
    decode = jax.jit(tokenizer.decode)
    samples, targets = [], []
    for batch in batches:
        real = batch.weight > 0
        samples.append(hosts.whole(decode(generate(batch).tokens))[real])
        targets.append(batch.columns["z"][real])
    return np.concatenate(samples), np.concatenate(targets)


def figures(samples: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Regression scores of the samples' mean and median, and their spread.

    Args:
      samples: f32[N, K], targets: f32[N], as `predictions` gives them.

    Returns:
      `rmse`, `r2`, `spearman` of the mean; `median_rmse`, ... of the median; `spread`, the mean over rows of the samples' standard
      deviation; `sample_rmse`, of single samples; `prompts`. All in z-scores.
    """
    samples, targets = samples.astype(np.float64), targets.astype(np.float64)  # a sum of float32 may overflow
    mean, median = samples.mean(axis=1), np.median(samples, axis=1)
    return {
        **metrics.regression_scores(mean, targets),
        **{f"median_{name}": x for name, x in metrics.regression_scores(median, targets).items()},
        "spread": float(samples.std(axis=1).mean()),
        "sample_rmse": float(np.sqrt(np.square(samples - targets[:, None]).mean())),
        "prompts": len(targets),
    }


def evaluate(
    generate: Callable[[PromptBatch], Rollout], batches: Sequence[PromptBatch], tokenizer: Digits
) -> dict[str, float]:
    """The evaluation of a run in progress: `figures`, named eval/..."""
    return {f"eval/{name}": x for name, x in figures(*predictions(generate, batches, tokenizer)).items()}


def pointwise_regressor(
    task: Task, *, width: int, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, float]:
    """The usual alternative, for comparison: an MLP with a mean-squared-error head on the same columns.

    Args:
      task: the data, whether the policy reads them as features or as text.
      width: of its two hidden layers.
      steps, batch_size, learning_rate: AdamW, cosine to 0, as in the supervised phase.
      seed: of weights and batches.

    Returns:
      `pointwise/rmse`, `pointwise/r2`, `pointwise/spearman` on the held-out rows, in z-scores.
    """
    sizes = [task.train.numeric.shape[1], width, width, 1]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    params = [(jax.random.normal(k, (i, o)) * i**-0.5, jnp.zeros(o)) for k, i, o in zip(keys, sizes[:-1], sizes[1:])]
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))
    batches = streams.endless(len(task.train.z), batch_size, seed, shuffle=True)

    def predict(params, x):
        for i, (w, b) in enumerate(params):
            x = x @ w + b
            x = jax.nn.gelu(x) if i < len(params) - 1 else x
        return x[:, 0]

    @jax.jit
    def update(carry, x, y):
        params, opt_state = carry
        grads = jax.grad(lambda p: jnp.square(predict(p, x) - y).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    carry = params, optimizer.init(params)
    for i in range(steps):
        chosen = batches[i]
        carry = update(carry, task.train.numeric[chosen], task.train.z[chosen])
    scores = metrics.regression_scores(np.asarray(jax.jit(predict)(carry[0], task.held_out.numeric)), task.held_out.z)
    return {f"pointwise/{name}": value for name, value in scores.items()}
