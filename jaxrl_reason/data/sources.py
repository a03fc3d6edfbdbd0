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

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data import files
from jaxrl_reason.data.files import Row

# TFDS finds these by name only after their module is imported.
_BUILDER_MODULES = {
    "word_problems": "jaxrl_reason.data.word_problems",
    "exam": "jaxrl_reason.data.exam",
    "many_answers": "jaxrl_reason.data.many_answers",
    "answer_forms": "jaxrl_reason.data.answer_forms",
    "sums": "jaxrl_reason.data.sums",
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
    """

    name: str
    fingerprint: str
    skipped: int
    read: Callable[[Sequence[int]], list[Row]]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Row:
        """Row `i`, a fresh dict. Raises IndexError outside [0, len)."""
        if not 0 <= i < self.length:
            raise IndexError(f"Row {i} was asked of {self.name}, which has rows 0 to {self.length - 1}.")
        return self.read([i])[0]

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
        such files on the Hugging Face hub: "hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet".
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
    rows, skipped, digests = [], 0, []
    for path in paths:
        read = files.read_parquet if path.suffix == ".parquet" else files.read_jsonl
        more, bad, digest = read(path, columns, on_bad_row)
        rows, skipped, digests = rows + more, skipped + bad, [*digests, digest]
    rows = files.slice_rows(rows, split, name)
    # Names without their directory: data that were moved are still the same data.
    one = len(paths) == 1
    names, contents = (paths[0].name, digests[0]) if one else ([path.name for path in paths], digests)
    fingerprint = _fingerprint(names, split, columns, len(rows), contents)
    return Source(name, fingerprint, skipped, lambda indices: [dict(rows[i]) for i in indices], len(rows))


def _download(name: str) -> list[pathlib.Path]:
    """The files of a data set on the Hugging Face hub that an address names, downloaded or found in its cache."""
    import huggingface_hub  # only where something is downloaded

    parts = name.removeprefix(_HUB).split("/", 2)
    if len(parts) < 3 or not name.endswith((".jsonl", ".parquet")):
        raise ValueError(
            f"The address {name!r} is not understood: write {_HUB}OWNER/NAME/PATH, PATH ending in .jsonl or .parquet, where * stands "
            "for anything, such as hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet."
        )
    owner, dataset, pattern = parts
    try:
        found = huggingface_hub.snapshot_download(f"{owner}/{dataset}", repo_type="dataset", allow_patterns=[pattern])
    except Exception as error:  # of the network, of the hub and of the disk: a dozen classes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} could not be had from the Hugging Face hub: {type(error).__name__}: {reason}"
        ) from error
    paths = sorted(path for path in pathlib.Path(found).rglob("*") if path.match(pattern))
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
