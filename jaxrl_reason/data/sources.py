"""Random-access rows by name: TFDS data sets, ours and others, and files from the disk or the hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
from typing import Any
import warnings

import numpy as np

from jaxrl_reason.data import files, hub, parsers, preparing
from jaxrl_reason.data.files import Row

# TFDS finds these data sets by name only after the import of their module.
_OURS = ("word_problems", "exam", "many_answers", "answer_forms", "checked_tries", "sums", "reasoning_gym")
_BUILDER_MODULES = {name: f"jaxrl_reason.data.builders.{name}" for name in _OURS}
_BUILDER_MODULES["gsm8k"] = "tensorflow_datasets.text.gsm8k.gsm8k"
_NAMES = tuple(_BUILDER_MODULES)  # of text problems
_BUILDER_MODULES |= dict.fromkeys(("diabetes", "synthetic"), "jaxrl_reason.data.builders.tables")
_BUILDER_MODULES["small_tables"] = "jaxrl_reason.data.builders.small_tables"
_HUB = "hf://datasets/"
_FILES = f"a file ends in {parsers.SUFFIXES}"
_CHUNK = 1024  # rows that an iteration reads at once
_KEPT = 50_000  # a data set of TFDS with at most this many rows stays in memory, as files do: parsing it again is slow


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A sequence of rows, each a dict from column to value, with at least `question`; rewards may need an `answer`."""

    name: str  # the name given to `load_source`
    fingerprint: str  # short hex that changes with the name, the split, the columns, the size or the content
    skipped: int  # the number of bad rows left out; 0 unless on_bad_row="skip"
    read: Callable[[Sequence[int]], list[Row]]  # returns the rows at a list of positions
    length: int
    where: Callable[[int], str] | None = None  # returns the file and line of a row; None without files

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Row:
        """Returns row `i` as a new dict. Raises IndexError outside [0, len)."""
        if not 0 <= i < self.length:
            raise IndexError(f"{self.name} has no row {i}; its rows are 0 to {self.length - 1}.")
        return self.read([i])[0]

    def place(self, i: int) -> str:
        """Returns the name of row `i` in messages, such as "problems.jsonl, line 7"."""
        return f"row {i} of {self.name}" if self.where is None else self.where(i)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, self.length, _CHUNK):
            yield from self.read(range(start, min(start + _CHUNK, self.length)))


def load_source(
    name: str,
    split: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "refuse",
    naming: str = files.NAMING,
) -> Source:
    """Opens a data set; TFDS prepares it on first use. Text is str, numbers int or float; other values do not change.

    Args:
      name: a data set of TFDS or of ours: "gsm8k", "word_problems", "word_problems/chains"; a path that ends in .jsonl,
        .json, .csv, .tsv (also with .gz) or .parquet; or such files on the Hugging Face hub:
        "hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet". "@REVISION" may follow the data set's name.
      split: for TFDS, "train", "test[:100]" and so on; for a file, "all" or a slice such as "[:90%]".
      data_dir: the directory of TFDS's prepared data; None means its default, ~/tensorflow_datasets. Unused for files.
      columns: maps our names to the data's, such as {"question": "problem"}. Other columns keep their names. Parquet
        columns are read only if they are needed (see `files.read`).
      on_bad_row: as in `files.read`. Rows of TFDS are not checked.
      naming: what to do about a missing column, for the error.

    Raises FileNotFoundError for a file, and ValueError for an unknown name or split, a missing column, a bad row, no rows,
    or a package that is missing.
    """
    if on_bad_row not in ("refuse", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; it has to be 'refuse' or 'skip'.")
    columns = dict(columns or {})
    if name.startswith(_HUB):
        return _files_source(name, _download(name), split, columns, on_bad_row, naming)
    path = pathlib.Path(name).expanduser()
    if parsers.kind_of(name):
        return _files_source(name, [path], split, columns, on_bad_row, naming)
    if path.is_file():  # a directory can have the name of a data set
        raise ValueError(f"{path} is no file of rows that can be read: {_FILES}.")
    return _tfds_source(name, split, data_dir, columns, naming)


def _files_source(
    name: str, paths: list[pathlib.Path], split: str, columns: dict[str, str], on_bad_row: str, naming: str
) -> Source:
    read = [files.read(path, columns, on_bad_row, naming) for path in paths]
    every = [(file, row, number) for file in read for row, number in zip(file.rows, file.numbers, strict=True)]
    part = files.slice_rows(every, split, name)
    # Names without directories: the fingerprint of moved data does not change.
    names: Any = [path.name for path in paths]
    contents: Any = [file.digest for file in read]
    if len(paths) == 1:
        (names,), (contents,) = names, contents
    fingerprint = _fingerprint(names, split, columns, len(part), contents)
    where = lambda i: "{0.path}, {0.unit} {2}".format(*part[i])
    rows = lambda indices: [dict(part[i][1]) for i in indices]
    return Source(name, fingerprint, sum(file.skipped for file in read), rows, len(part), where)


def warn_of_repeats(train: Source, held_out: Source, prompt: Callable[[Mapping[str, Any]], str]) -> None:
    """Warns of repeated prompts: within the training rows, and of training prompts among the held-out rows. All rows are kept.

    Two rows repeat each other if the prompts that `prompt` renders are equal, up to white space at both ends. Data sets
    of TFDS are not compared with each other: their builders control the splits, and may repeat a prompt on purpose.
    """
    if train.where is None and held_out.where is None:
        return

    def texts(source: Source) -> Iterator[tuple[int, Row, str]]:
        for i, row in enumerate(source):
            try:
                yield i, row, prompt(row).strip()
            except ValueError as error:
                raise ValueError(f"{source.place(i)}: {error}") from error

    first: dict[str, int] = {}
    repeats, others = [], []
    for i, row, text in texts(train):
        earlier = first.setdefault(text, i)
        if earlier != i and train.where is not None:
            repeats.append(f"{train.place(i)} repeats {train.place(earlier)}")
            if str(train[earlier].get("answer")) != str(row.get("answer")):
                others.append(repeats[-1])
    leaks = [f"{held_out.place(i)} is {train.place(first[text])}" for i, _, text in texts(held_out) if text in first]
    again = f"earlier prompts repeat in {len(repeats)} of {len(train)} rows; the rows are kept and count again"
    differ = f"another answer in {len(others)} of the repeats; check which is correct"
    share = f"{len(leaks)} of {len(held_out)} held-out rows"
    leak = f"training prompts of {train.name} occur in {share}, so held-out metrics are too high"
    for source, summary, reports in ((train, again, repeats), (train, differ, others), (held_out, leak, leaks)):
        if reports:
            warnings.warn(files.listed(f"{source.name}: {summary}", reports, len(reports)), stacklevel=2)


def _download(name: str) -> list[pathlib.Path]:
    parts = name.removeprefix(_HUB).split("/", 2)
    address = "/".join(parts[:2])
    if len(parts) < 3 or not hub.is_address(address) or not (parsers.kind_of(name) or name.endswith("*")):
        forms = f"write {_HUB}OWNER/NAME/PATH or {_HUB}OWNER/NAME@REVISION/PATH. PATH ends in {parsers.SUFFIXES}, and"
        example = f"* in it matches anything, as in {_HUB}zwhe99/DeepMath-103K/data/train-*.parquet"
        raise ValueError(f"The address {name!r} is not understood: {forms} {example}.")
    pattern = parts[2]
    try:
        paths = hub.fetch(address, [pattern], kind="dataset").files
    except hub.HubError as error:
        raise ValueError(f"{name}: {error}") from error
    if not paths:
        raise ValueError(f"{name}: the data set has no file {pattern!r}.")
    for path in paths:
        if not parsers.kind_of(path):
            raise ValueError(f"{name}: {path.name} is no file of rows that can be read: {_FILES}.")
    return paths


def open_prepared(name: str, split: str, data_dir: str | pathlib.Path | None, kind: str = "data set") -> Any:
    """Opens a split with TFDS, which prepares the data on first use: a random-access data source with at least one row.

    Raises ValueError if the name or the split is unknown, or the split is empty, and OSError if the data set cannot be
    prepared. `kind` is the noun in the message.
    """
    builder = re.split("[/:]", name)[0]  # name/config:version
    if builder in _BUILDER_MODULES:
        importlib.import_module(_BUILDER_MODULES[builder])
    folder = None if data_dir is None else pathlib.Path(data_dir).expanduser()
    try:
        data = preparing.open_split(name, split, folder, kind)
    except ValueError as error:
        raise ValueError(f"Split {split!r} of {kind} {name!r} cannot be opened: {error}") from error
    if data is None:
        raise _unknown(name)
    if not len(data):
        raise ValueError(f"Split {split!r} of {kind} {name!r} has no rows.")
    return data


def _unknown(name: str) -> ValueError:
    names = ", ".join(_NAMES)
    return ValueError(
        f"There is no data set {name!r}: give {names}, another name that TFDS knows, or a path; {_FILES}."
    )


def _tfds_source(
    name: str, split: str, data_dir: str | pathlib.Path | None, columns: dict[str, str], naming: str
) -> Source:
    data = open_prepared(name, split, data_dir)
    info = data.dataset_info
    adapt = _adapt_gsm8k if info.name == "gsm8k" else lambda row: row

    def parse(indices: Sequence[int]) -> list[Row]:
        rows = data.__getitems__(indices)
        return [files.rename_columns(adapt({key: _plain(row[key]) for key in row}), columns) for row in rows]

    parsed: dict[int, Row] = {}

    def read(indices: Sequence[int]) -> list[Row]:
        places = [int(i) for i in indices]
        if len(data) > _KEPT:
            return parse(places)
        new = [i for i in places if i not in parsed]
        if new:
            parsed.update(zip(new, parse(new)))
        return [dict(parsed[i]) for i in places]

    try:
        ends = read([0, len(data) - 1])
    except ValueError as error:
        raise ValueError(f"Data set {name!r} does not fit: {error}. {naming}") from error
    sizes = [[part.num_examples, int(part.num_bytes)] for part in info.splits.values()]
    fingerprint = _fingerprint(info.full_name, split, columns, len(data), sizes, ends)
    return Source(name, fingerprint, 0, read, len(data))


def _adapt_gsm8k(row: Row) -> Row:
    """Splits GSM8K's `answer`, a worked text that ends in "#### N", into our `solution` (the text) and `answer` (N)."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"question": row["question"], "solution": row["answer"], "answer": answer}


def _plain(value: Any) -> Any:
    """Returns text for bytes, Python numbers and lists for NumPy's, also inside; images and other values do not change.

    Numbers of 16 and 32 bits are the decimals that they print as: 0.1 instead of 0.10000000149011612.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray):
        return _plain([*value] if value.ndim else value[()]) if value.ndim < 3 else value
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.floating) and value.itemsize < 8:
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
