"""Tests the tables of our builders after a real preparation by TFDS."""

import math
import sys

import numpy as np
import pytest

from helpers.data_sets import digest, SPLITS
from jaxrl_reason.data.builders import tables
from jaxrl_reason.data.tables import fit_features, load_table, TargetScaler


@pytest.fixture(scope="module")
def diabetes(data_dir):
    pytest.importorskip("sklearn")
    return {split: load_table("diabetes", split, data_dir=data_dir) for split in SPLITS}


def test_diabetes_is_the_raw_data_of_scikit_learn(diabetes):
    from sklearn.datasets import load_diabetes

    raw = load_diabetes(scaled=False)
    order = [raw.feature_names.index(name) for name in diabetes["train"].names]
    expected = sorted(map(tuple, np.column_stack([raw.data[:, order], raw.target]).tolist()))
    found = [
        row
        for table in diabetes.values()
        for row in map(tuple, np.column_stack([table.features, table.targets]).tolist())
    ]
    assert sorted(found) == expected  # exactly, although TFDS stores float32
    assert {split: len(table) for split, table in diabetes.items()} == {"train": 317, "validation": 35, "test": 90}
    for table in diabetes.values():
        assert table.names == ("age", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "sex")
        assert (table.features.dtype, table.targets.dtype, table.target) == (np.float64, np.float64, "progression")
        assert table.noise_std is None and table.best_r2 is None and table.labels.shape == (len(table), 0)


def test_diabetes_can_be_learned(diabetes):
    """Least squares on the training rows reaches its known quality on test rows: features and targets match."""
    scaler, target = fit_features(diabetes["train"]), TargetScaler.fit(diabetes["train"].targets)
    with_one = lambda x: np.column_stack([x, np.ones(len(x))])
    weights, *_ = np.linalg.lstsq(with_one(scaler.transform(diabetes["train"])), target.to_z(diabetes["train"].targets))
    truth = target.to_z(diabetes["test"].targets)
    error = with_one(scaler.transform(diabetes["test"])) @ weights - truth
    assert 0.35 < 1 - np.mean(error**2) / np.var(truth) < 0.65


def test_diabetes_without_scikit_learn_raises_with_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        ValueError, match="'diabetes' is prepared, once, from the copy in scikit-learn: pip install scikit-learn"
    ):
        load_table("diabetes", "train", data_dir=tmp_path)


@pytest.fixture(scope="module")
def synthetic(data_dir):
    return {
        config: load_table(f"synthetic/{config}", "train", data_dir=data_dir)
        for config in ("friedman", "friedman_bimodal", "ripple", "ripple_bimodal")
    }


def friedman(x):
    return 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]


def ripple(x):
    return (0.5 + x[:, 1]) * np.sin(2 * np.pi * x[:, 0])


@pytest.mark.parametrize("config, function", [("friedman", friedman), ("ripple", ripple)])
def test_synthetic_noise_has_the_declared_distribution(synthetic, config, function):
    for bimodal in (False, True):
        table = synthetic[config + "_bimodal" * bimodal]
        assert len(table) == 3000 and table.names == tuple(f"x{i + 1}" for i in range(table.features.shape[1]))
        assert ((0 <= table.features) & (table.features <= 1)).all()
        assert table.noise_std.max() > 2.5 * table.noise_std.min() > 0
        truth = function(table.features)
        noise = (table.targets - truth) / table.noise_std
        assert abs(noise.mean()) < 3 / math.sqrt(3000)
        assert abs(noise.std() - 1) < 0.05
        near = np.mean(np.abs(noise) < 0.3)  # 24 % of a Gaussian; between the modes only 2 %
        assert near < 0.05 if bimodal else 0.2 < near < 0.28
        assert table.best_r2 == pytest.approx(0.85, abs=0.04)
        reached = 1 - np.mean((table.targets - truth) ** 2) / np.var(table.targets)
        assert table.best_r2 == pytest.approx(reached, abs=0.008)


def test_synthetic_by_its_short_name_in_all_splits(synthetic, data_dir, tmp_path):
    train = load_table("synthetic", "train", data_dir=data_dir)
    assert train.fingerprint == synthetic["friedman"].fingerprint
    again = load_table("synthetic", "train", data_dir=tmp_path)  # a second preparation
    assert again.fingerprint == train.fingerprint
    test = load_table("synthetic", "test", data_dir=data_dir)
    rest = load_table("synthetic", "test", data_dir=data_dir, without=test.names[1])
    assert rest.names == (test.names[0], *test.names[2:])
    np.testing.assert_array_equal(rest.features, np.delete(test.features, 1, axis=1))
    assert [len(load_table("synthetic", split, data_dir=data_dir)) for split in ("validation", "test[:30]")] == [
        500,
        30,
    ]
    assert len(test) == 1000 and not set(test.targets.tolist()) & set(train.targets.tolist())
    assert len({table.fingerprint for table in synthetic.values()}) == 4
    assert "noise_std" not in train.names and "y" not in train.names


def test_synthetic_version_1_has_fixed_rows():
    """Published metrics depend on the rows: a change needs a new VERSION. Libraries may differ in the last bit."""
    rows = [
        [
            round(value, 6)
            for row in tables._synthetic_rows(config, split, tables.Synthetic.SIZES[split])
            for value in row.values()
        ]
        for config in tables.Synthetic.BUILDER_CONFIGS
        for split in SPLITS
    ]
    assert digest(rows)[:16] == "94dd3feb4beb8086"


@pytest.mark.parametrize(
    "name, split, options, message",
    [
        (
            "diabetis",
            "train",
            {},
            "There is no table 'diabetis': give diabetes, synthetic, small_tables/diabetes, .*, or a path that ends in .csv.",
        ),
        ("synthetic", "dev", {}, "Split 'dev' of table 'synthetic' cannot be opened: .*'validation'"),
        ("synthetic", "train[0:0]", {}, "Split 'train\\[0:0\\]' of table 'synthetic'"),
        ("synthetic/waves", "train", {}, "Split 'train' of table 'synthetic/waves' cannot be opened: .*waves"),
        ("synthetic", "train", {"target": "x1"}, "The table 'synthetic' predicts 'y', not 'x1'; leave `target` empty"),
        ("synthetic", "train", {"missing": "zero"}, "missing is 'zero'; it has to be one of 'refuse', 'mean', 'drop'."),
        (
            "a.csv",
            "all",
            {"categorical": "mean"},
            "categorical is 'mean'; it has to be one of 'refuse', 'onehot', 'drop'.",
        ),
    ],
)
def test_unknown_table_names_raise_a_sentence(synthetic, data_dir, name, split, options, message):
    with pytest.raises(ValueError, match=message):
        load_table(name, split, data_dir=data_dir, **options)
