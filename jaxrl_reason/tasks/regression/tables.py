"""The tables of a regression run: encoded rows, with the scales that the training table sets, and batches of them."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
from typing import Generic, TypeVar
import warnings

import numpy as np

from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import (
    files,
    load_tokenizer,
    numbers,
    PromptBatch,
    SolutionBatch,
    streams,
    Tokenizer,
    train_tokenizer,
)
from jaxrl_reason.data.tables import FeatureScaler, fit_features, load_table, Table, TargetScaler
from jaxrl_reason.methods import nearest
from jaxrl_reason.tasks.regression.vocabulary import Digits

Batch = TypeVar("Batch")
Make = Callable[[np.ndarray, np.ndarray], Batch]  # of positions in the table int[P] and prompt ids int32[P]


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, encoded."""

    padded: streams.Padded  # the N prompts
    features: np.ndarray | None  # f32[N, F] for the policy; None if rows enter as text
    numeric: np.ndarray  # f32[N, F], the features for the pointwise regressor, also if rows enter as text
    digits: np.ndarray  # int32[N, L], encoded targets
    z: np.ndarray  # f32[N], targets as z-scores
    targets: np.ndarray  # float64[N]
    values: np.ndarray | None = None  # f32[N], human values of the rows, or None

    def prompts(self, chosen: np.ndarray, prompt_ids: np.ndarray, weight: np.ndarray | None = None) -> PromptBatch:
        """Returns the prompts at positions int[P], with ids int32[P] and weight f32[P]; see `PromptBatch`."""
        columns = {"digits": self.digits[chosen], "z": self.z[chosen]}
        if self.values is not None:
            columns["values"] = self.values[chosen]
        weight = np.ones(len(chosen), np.float32) if weight is None else weight
        rows = [{"row": int(i), "target": float(self.targets[i])} for i in chosen]
        features = None if self.features is None else self.features[chosen]
        return PromptBatch(*self.padded.take(chosen), prompt_ids, weight, rows, features=features, columns=columns)

    def solutions(self, chosen: np.ndarray) -> SolutionBatch:
        """Returns a batch of prompts with their digits; `chosen` int[B] are positions in the table."""
        digits = self.digits[chosen]
        features = None if self.features is None else self.features[chosen]
        return SolutionBatch(*self.padded.take(chosen), digits, np.ones(digits.shape, bool), features)


class Stream(Generic[Batch]):
    """Rows of a table as endless shuffled batches; `batch(i)` is a pure function of i, as in `data.PromptStream`."""

    skipped = 0

    def __init__(
        self, rows: int, make: Make[Batch], *, batch_size: int, seed: int, local_rows: np.ndarray | None = None
    ):
        self._make, self._batch_size = make, batch_size
        self._order = streams.endless(rows, batch_size, seed, shuffle=True)
        self._local_rows = np.arange(batch_size) if local_rows is None else local_rows

    def batch(self, i: int) -> Batch:
        """Returns batch `i`, for any i >= 0."""
        chosen = streams.batch_at(self._order, i)[self._local_rows]
        return self._make(chosen, (i * self._batch_size + self._local_rows).astype(np.int32))


def eval_batches(rows: Rows, count: int, batch_size: int) -> list[PromptBatch]:
    """Returns the first `count` rows in batches; copies of its first row, of weight 0, fill up the last batch."""
    count = min(count, len(rows.targets))
    batches = []
    for start in range(0, count, batch_size):
        real = np.arange(start, min(start + batch_size, count))
        chosen = np.concatenate([real, np.full(batch_size - len(real), start)]).astype(np.int32)
        weight = (np.arange(batch_size) < len(real)).astype(np.float32)
        batches.append(rows.prompts(chosen, chosen, weight))
    return batches


def solution_batches(rows: Rows, sizes: tuple[int, np.ndarray]) -> list[SolutionBatch]:
    """Returns all rows as batches of solutions; copies of a row, with no token to learn, fill up the last batch.

    `sizes` are the rows of a batch, and those of this process in it.
    """
    (batch_size, local_rows), batches = sizes, []
    for start in range(0, len(rows.targets), batch_size):
        at = start + local_rows
        real = at < len(rows.targets)
        batch = rows.solutions(np.where(real, at, 0))
        batches.append(batch._replace(completion_mask=batch.completion_mask & real[:, None]))
    return batches


@dataclasses.dataclass(frozen=True)
class Tables:
    """The data of a regression run."""

    digits: Digits
    scaler: FeatureScaler  # scales features as the training table does
    train: Table  # without the column of human values, as `held_out`
    held_out: Table
    train_values: np.ndarray | None  # f32[N], human values of the rows, or None
    validation: Table | None  # of config.regression.validation_split
    max_prompt_length: int  # the most tokens per prompt

    @property
    def features(self) -> int:
        """Numbers per prompt; 0 if rows enter as text."""
        return 0 if self.digits.text else len(self.scaler.outputs)

    @property
    def fingerprint(self) -> str:
        """Identifies the tables, first the training table, and the human values of its rows."""
        tables = (self.train, self.held_out, self.validation)
        parts = [table.fingerprint for table in tables if table is not None]
        if self.train_values is not None:
            parts.append(hashlib.sha256(self.train_values.tobytes()).hexdigest()[:16])
        return "/".join(parts)

    def train_rows(self) -> Rows:
        return self.encode(self.train, self.train_values)

    def held_out_rows(self) -> Rows:
        return self.encode(self.held_out, None)

    def validation_rows(self) -> Rows | None:
        return None if self.validation is None else self.encode(self.validation, None)

    def encode(self, table: Table, values: np.ndarray | None) -> Rows:
        """Encodes a table on the scales of the training table; `values` f32[N] are human values, or None."""
        features = self.scaler.transform(table)
        texts = row_texts(table, self.scaler.names, self.scaler.label_names) if self.digits.text else None
        prompts = self.digits.prompts(texts, len(table))
        if texts is not None:
            _check_different(table, texts, prompts)
        longest = max(map(len, prompts))
        if longest > self.max_prompt_length:
            raise ConfigError(
                f"config.max_prompt_length is {self.max_prompt_length}, and a row of {table.name} has {longest} tokens; raise it."
            )
        return Rows(
            padded=streams.Padded(prompts, self.digits.pad_id),
            features=None if self.digits.text else features,
            numeric=features,
            digits=self.digits.encode(table.targets),
            z=np.asarray(self.digits.target.to_z(table.targets), np.float32),
            targets=table.targets,
            values=values,
        )


def open_tables(config: Config, text: Tokenizer | None = None, text_size: int = 0) -> Tables:
    """Opens the tables of a configuration with `regression.tokenizer`.

    `text` is the tokenizer of rows as text; None: config.data.tokenizer, or a new one that is trained on the rows. For
    `text_size` see `Digits`. Raises ConfigError, ValueError or OSError if the tables cannot be used; the message names
    the cause and its place.
    """
    c, r = config, config.regression
    number = _number_tokenizer(c)
    load = functools.partial(
        load_table, target=r.target, categorical=r.categorical, missing=r.missing, data_dir=c.data.data_dir or None
    )
    train, values = take_values(load(c.data.train, c.data.train_split), r.value)
    scale = TargetScaler.fit(train.targets, f"The target {train.target!r} of {train.name}")
    other = functools.partial(load, like=train, without=r.value)
    held_out = other(c.data.eval or c.data.train, c.data.eval_split)
    validation = other(c.data.train, r.validation_split) if r.validation_split else None
    if r.inputs != "text":
        text = None
    elif text is None:
        text = load_tokenizer(c.data.tokenizer) if c.data.tokenizer else None
        text = text or train_tokenizer(row_texts(train)[:2000], c.data.vocab_size)
    digits = Digits(number, scale, text, text_size)
    return Tables(digits, fit_features(train), train, held_out, values, validation, c.max_prompt_length)


def warn_of_repeats(train: Table, held_out: Table) -> None:
    """Warns of rows of a held-out file that are training rows: equal features, texts and target.

    Data sets of TFDS are not compared, because a real table may have two equal rows in two splits.
    """
    if not train.lines or not held_out.lines:
        return

    def keys(table: Table) -> Iterator[tuple]:
        numbers = table.features[:, [table.names.index(name) for name in train.names]]
        labels = table.labels[:, [table.label_names.index(name) for name in train.label_names]]
        # Bytes are compared, because NaN equals NaN then. The sum turns -0.0 into 0.0.
        rows = np.column_stack([numbers, table.targets]) + 0.0
        for i, (row, texts) in enumerate(zip(rows, labels.tolist())):
            yield row.tobytes(), *texts, *(table.exact.get((i, name)) for name in train.names)

    first: dict[tuple, int] = {}
    for row, key in enumerate(keys(train)):
        first.setdefault(key, row)
    reports = [
        f"{held_out.place(row)} is {train.place(first[key])}" for row, key in enumerate(keys(held_out)) if key in first
    ]
    if reports:
        share = f"{len(reports)} of {len(held_out)} held-out rows"
        summary = f"training rows of {train.name} occur in {share}, so held-out metrics are too good"
        warnings.warn(files.listed(f"{held_out.name}: {summary}", reports, len(reports)), stacklevel=2)


def _number_tokenizer(config: Config) -> numbers.NumberTokenizer:
    r = config.regression
    try:
        number = numbers.make_tokenizer(r.tokenizer, **r.tokenizer_options)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"config.regression.tokenizer_options: {e}") from e
    if config.max_completion_length != number.length:
        raise ConfigError(
            f"config.max_completion_length is {config.max_completion_length}, and the numbers of config.regression.tokenizer have "
            f"{number.length} tokens; set it to {number.length}."
        )
    return number


def row_texts(table: Table, names: Sequence[str] | None = None, label_names: Sequence[str] | None = None) -> list[str]:
    """Returns rows as text: "bmi 25.3, sex 1, city Rome". The order of columns is the table's, or that of the names.

    A number has all digits that the file has, in their shortest form: 1.50 is 1.5, and 20240115 stays.
    """
    number_at = [table.names.index(name) for name in (table.names if names is None else names)]
    label_at = [table.label_names.index(name) for name in (table.label_names if label_names is None else label_names)]

    def one(row: int) -> str:
        features, labels = table.features[row].tolist(), table.labels[row].tolist()
        pairs = [
            (table.names[i], table.exact.get((row, table.names[i])) or repr(features[i]).removesuffix(".0"))
            for i in number_at
            if features[i] == features[i]  # not NaN, a missing value
        ]
        pairs += [(table.label_names[i], labels[i]) for i in label_at if labels[i]]
        return ", ".join(f"{name} {value}" for name, value in pairs)

    return [one(row) for row in range(len(table))]


def _check_different(table: Table, texts: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError if two rows with different features have the same prompt."""
    first: dict[tuple[int, ...], int] = {}
    exact = lambda row: [table.exact.get((row, name)) for name in table.names]
    for row, ids in enumerate(prompts):
        other = first.setdefault(tuple(ids), row)
        same = (
            np.array_equal(table.features[row], table.features[other], equal_nan=True)
            and np.array_equal(table.labels[row], table.labels[other])
            and exact(row) == exact(other)
        )
        if not same:
            raise ConfigError(
                f"Two rows have different features and the same prompt, {texts[row]!r:.200}: {table.place(other)} and {table.place(row)}. "
                "Rename columns or change texts, or use a tokenizer that tells them apart."
            )


def take_values(table: Table, column: str) -> tuple[Table, np.ndarray | None]:
    """Returns a table without its column of human values, and the values f32[N], or None for an empty `column`.

    Raises ConfigError without such a column of numbers, and for a value that is missing or outside [0, 1].
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
            f"Column {column!r} is {values[bad[0]]:g} in {table.place(bad[0])}; give a value from 0 to 1."
        )
    rest = dataclasses.replace(
        table,
        names=tuple(name for name in table.names if name != column),
        features=np.delete(table.features, at, axis=1),
        exact={place: text for place, text in table.exact.items() if place[1] != column},
        left_out=(*table.left_out, column),
    )
    return rest, values.astype(np.float32)
