"""Tables by name: our TFDS builders and CSV files."""

import pathlib
import re

import numpy as np

from jaxrl_reason.data import sources
from jaxrl_reason.data.builders.tables import NOISE, TARGETS
from jaxrl_reason.data.tables.csv_files import CATEGORICAL, MISSING, read_table
from jaxrl_reason.data.tables.table import Table


def load_table(
    name: str,
    split: str,
    *,
    target: str = "",
    categorical: str = "refuse",
    missing: str = "refuse",
    data_dir: str | pathlib.Path | None = None,
) -> Table:
    """Opens a table; TFDS prepares it on first use.

    Args:
      name: "diabetes"; "synthetic", short for "synthetic/friedman", or another config of `Synthetic`; or a path that
        ends in .csv.
      split: for our data sets "train", "validation", "test[:100]" and so on; for a file, "all" or a slice in the order
        of its rows, such as "[:90%]".
      target: the column of a file to predict. Our data sets have a fixed one.
      categorical: the treatment of a column of texts: "refuse" raises, "onehot" keeps it for `fit_features`, "drop"
        leaves it out. A column of numbers and texts always raises.
      missing: the treatment of a missing value (an empty cell, NA, N/A, NaN, null or ?): "refuse" raises, "mean" keeps
        the gap for `fit_features` to fill, "drop" leaves the row out and warns. A target is never filled.
      data_dir: the directory of TFDS's prepared data; None means TFDS's default, ~/tensorflow_datasets. Files do not
        use it.

    Raises:
      FileNotFoundError: if the file does not exist.
      ImportError: if "diabetes" has to be prepared and scikit-learn, which contains the data, is not installed.
      ValueError: if the name, the split or an option is unknown, or the file is not such a table. The message names
        file, line and column.
    """
    for option, value, allowed in (("categorical", categorical, CATEGORICAL), ("missing", missing, MISSING)):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}; it has to be one of {', '.join(map(repr, allowed))}.")
    if name.endswith(".csv"):
        return read_table(pathlib.Path(name).expanduser(), split, target, categorical, missing)
    builder = re.split("[/:]", name)[0]
    if builder not in TARGETS:
        raise ValueError(f"There is no table {name!r}: give {', '.join(TARGETS)}, or a path that ends in .csv.")
    if target not in ("", TARGETS[builder]):
        raise ValueError(
            f"The table {name!r} predicts {TARGETS[builder]!r}, not {target!r}; leave `target` empty, it is for files."
        )
    return _prepared_table(name, split, TARGETS[builder], data_dir)


def _prepared_table(name: str, split: str, target: str, data_dir: str | pathlib.Path | None) -> Table:
    data = sources.open_prepared(name, split, data_dir, kind="table")
    rows = data.__getitems__(list(range(len(data))))
    # TFDS stores float32. Its shortest decimal restores 32.1, which would otherwise be 32.0999985.
    columns = {key: np.array([float(str(np.float32(row[key]))) for row in rows]) for key in sorted(rows[0])}
    noise_std = columns.pop(NOISE, None)
    targets = columns.pop(target)
    return Table(
        name=name,
        names=tuple(columns),
        features=np.column_stack(list(columns.values())),
        label_names=(),
        labels=np.empty((len(rows), 0), str),
        target=target,
        targets=targets,
        noise_std=noise_std,
    )
