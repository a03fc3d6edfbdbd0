"""Random-access rows by name: our word problems, GSM8K, any other TFDS data set, JSONL and Parquet files, here or on the hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import re
from typing import Any
import warnings

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data import files, hub
from jaxrl_reason.data.files import Row

# TFDS finds these by name only after their module is imported.
_BUILDER_MODULES = {
    "word_problems": "jaxrl_reason.data.builders.word_problems",
    "exam": "jaxrl_reason.data.builders.exam",
    "many_answers": "jaxrl_reason.data.builders.many_answers",
    "answer_forms": "jaxrl_reason.data.builders.answer_forms",
    "sums": "jaxrl_reason.data.builders.sums",
    "gsm8k": "tensorflow_datasets.text.gsm8k.gsm8k",
}
_HUB = "hf://datasets/"
_CHUNK = 1024  # rows read at once when a source is gone through in order


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A sequence of rows, each a dict from column to value, with at least `question` and `answer`.

    Attributes:
      name: what was asked for.
      fingerprint: short hex that changes with the name, the split, the columns, the size or the content.
      skipped: bad rows left out; 0 unless a file was loaded with on_bad_row="skip".
      read: the rows at a list of positions.
      length: the number of rows.
      where: what messages call the row at a position: its file and line, where it comes from a file; None: its position.
    """

    name: str
    fingerprint: str
    skipped: int
    read: Callable[[Sequence[int]], list[Row]]
    length: int
    where: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Row:
        """Row `i`, a fresh dict. Raises IndexError outside [0, len)."""
        if not 0 <= i < self.length:
            raise IndexError(f"Row {i} was asked of {self.name}, which has rows 0 to {self.length - 1}.")
        return self.read([i])[0]

    def place(self, i: int) -> str:
        """What messages call row `i`, such as "problems.jsonl, line 7"."""
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
) -> Source:
    """Opens a data set, preparing it on first use.

    Args:
      name: "word_problems", "word_problems/chains", "gsm8k", any other name that TFDS knows; a path that ends in .jsonl or .parquet; or
        such files on the Hugging Face hub: "hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet",
        with "@REVISION" behind the data set's name, if need be.
      split: for TFDS, "train", "test[:100]" and so on; for a file, "all" or a slice such as "[:90%]".
      data_dir: where TFDS keeps prepared data; None means its default, ~/tensorflow_datasets. Files do not use it.
      columns: our names to those of the data, such as {"question": "problem"}. Columns not mentioned keep their names;
        of a Parquet file only columns that are mentioned, or have names of ours, are read (see `files.read_parquet`).
      on_bad_row: what a bad line of a file does: "refuse" raises, "skip" leaves it out, counts and warns. TFDS data were checked
        by their builder.

    Returns:
      A `Source`. Text is str, numbers are int or float; other values are passed on as they are.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unknown name or split, a missing column, bad rows, no rows.
    """
    if on_bad_row not in ("refuse", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; it has to be 'refuse' or 'skip'.")
    columns = dict(columns or {})
    if name.startswith(_HUB):
        return _files_source(name, _download(name), split, columns, on_bad_row)
    if name.endswith((".jsonl", ".parquet")):
        return _files_source(name, [pathlib.Path(name).expanduser()], split, columns, on_bad_row)
    return _tfds_source(name, split, data_dir, columns)


def _files_source(name: str, paths: list[pathlib.Path], split: str, columns: dict[str, str], on_bad_row: str) -> Source:
    read = [(files.read_parquet if p.suffix == ".parquet" else files.read_jsonl)(p, columns, on_bad_row) for p in paths]
    found = [(file, row, number) for file in read for row, number in zip(file.rows, file.numbers, strict=True)]
    found = files.slice_rows(found, split, name)
    # Names without their directory: data that were moved are still the same data.
    one = len(paths) == 1
    digests = [file.digest for file in read]
    names, contents = (paths[0].name, digests[0]) if one else ([path.name for path in paths], digests)

    def where(i: int) -> str:
        file, _, number = found[i]
        return f"{file.path}, {file.unit} {number}"

    return Source(
        name=name,
        fingerprint=_fingerprint(names, split, columns, len(found), contents),
        skipped=sum(file.skipped for file in read),
        read=lambda indices: [dict(found[i][1]) for i in indices],
        length=len(found),
        where=where,
    )


def warn_of_repeats(train: Source, held_out: Source, prompt: Callable[[Mapping[str, Any]], str]) -> None:
    """Warns of training rows with the prompt of an earlier one, and of held-out rows with the prompt of a training row; all are kept.

    Rows are the same where their prompts are, white space at both ends aside. Prepared data sets are not gone through: their builders
    say what their splits share, and one prompt may stand there many times on purpose.

    Args:
      train: the training rows.
      held_out: the rows that figures are taken on.
      prompt: what the policy reads of a row.
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
            repeats.append((earlier, i))
            if str(train[earlier].get("answer")) != str(row.get("answer")):
                others.append((earlier, i))
    if repeats:
        report = lambda pairs: [f"{train.place(j)} repeats {train.place(i)}" for i, j in pairs[: files.REPORTED]]
        summary = f"{train.name}: prompts of earlier rows stand again in {len(repeats)} of {len(train)} rows; these are kept and weigh more"
        warnings.warn(files.listed(summary, report(repeats), len(repeats)), stacklevel=2)
        if others:
            summary = f"{train.name}: another answer than the earlier row's stands in {len(others)} of these; see which is right"
            warnings.warn(files.listed(summary, report(others), len(others)), stacklevel=2)
    leaks = [(first[text], i) for i, _, text in texts(held_out) if text in first]
    if leaks:
        summary = (
            f"{held_out.name}: training prompts of {train.name} stand in {len(leaks)} of {len(held_out)} held-out rows, so that held-out "
            "figures flatter"
        )
        reports = [f"{held_out.place(j)} is {train.place(i)}" for i, j in leaks[: files.REPORTED]]
        warnings.warn(files.listed(summary, reports, len(leaks)), stacklevel=2)


def _download(name: str) -> list[pathlib.Path]:
    """The files of a data set on the Hugging Face hub that an address names, downloaded or found in its cache."""
    parts = name.removeprefix(_HUB).split("/", 2)
    address = "/".join(parts[:2])
    if len(parts) < 3 or not hub.is_address(address) or not name.endswith((".jsonl", ".parquet")):
        raise ValueError(
            f"The address {name!r} is not understood: write {_HUB}OWNER/NAME/PATH or {_HUB}OWNER/NAME@REVISION/PATH, PATH ending in .jsonl or .parquet, where * stands "
            "for anything, such as hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet."
        )
    pattern = parts[2]
    try:
        paths = hub.fetch(address, [pattern], kind="dataset").files
    except hub.HubError as error:
        raise ValueError(f"{name}: {error}") from error
    if not paths:
        raise ValueError(f"{name}: the data set has no file {pattern!r}.")
    return paths


def _tfds_source(name: str, split: str, data_dir: str | pathlib.Path | None, columns: dict[str, str]) -> Source:
    builder = re.split("[/:]", name)[0]  # name/config:version
    if builder in _BUILDER_MODULES:
        importlib.import_module(_BUILDER_MODULES[builder])
    open_it = functools.partial(
        tfds.data_source,
        name,
        split=split,
        data_dir=None if data_dir is None else pathlib.Path(data_dir).expanduser(),
        builder_kwargs={"file_format": "array_record"},  # the default format needs TensorFlow
    )
    try:
        try:
            data = open_it()
        except FileExistsError:  # another process prepared the same data meanwhile: they are there now
            data = open_it()
    except tfds.core.DatasetNotFoundError as error:
        ours = ", ".join(_BUILDER_MODULES)
        raise ValueError(
            f"There is no data set {name!r}: give {ours}, another name that TFDS knows, or a path that ends in .jsonl or .parquet."
        ) from error
    except ValueError as error:
        raise ValueError(f"Split {split!r} of data set {name!r} cannot be opened: {error}") from error
    if not len(data):
        raise ValueError(f"Split {split!r} of data set {name!r} has no rows.")

    info = data.dataset_info
    adapt = _adapt_gsm8k if info.name == "gsm8k" else lambda row: row

    def read(indices: Sequence[int]) -> list[Row]:
        rows = data.__getitems__([int(i) for i in indices])
        return [
            files.rename_columns(adapt({key: _plain(value) for key, value in row.items()}), columns) for row in rows
        ]

    try:
        ends = read([0, len(data) - 1])
    except ValueError as error:
        raise ValueError(f"Data set {name!r} does not fit: {error}. Name its columns with `columns`.") from error
    sizes = [[part.num_examples, int(part.num_bytes)] for part in info.splits.values()]
    fingerprint = _fingerprint(info.full_name, split, columns, len(data), sizes, ends)
    return Source(name, fingerprint, 0, read, len(data))


def _adapt_gsm8k(row: Row) -> Row:
    """GSM8K's `answer` is a worked text that ends in "#### N": that text is our solution and N our answer."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"question": row["question"], "solution": row["answer"], "answer": answer}


def _plain(value: Any) -> Any:
    """Text from bytes and Python numbers from NumPy scalars; anything else as it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
