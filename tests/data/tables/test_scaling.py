"""Tests the scaling of features and targets by hand. Scales are learned from training rows only."""

import dataclasses
import json
import math

from hypothesis import given
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.data.tables import FeatureScaler, fit_features, load_table, TargetScaler

HOUSES = "size, price ,town\n50,1e2,Rome\n70,.15e3,Pisa\n-30.,+80,Rome\n90,210,Bari\n"


def csv_table(path, split="all", target="y", **options):
    return load_table(path, split, target=target, **options)


@pytest.fixture
def write(write):
    return lambda content, name="rows.csv": write(content, name)


def test_scaling_by_hand(write):
    path = write("a,b,town,c,y\n1,10,Rome,7,1\n2,,Pisa,7,2\n3,30,Rome,7,3\n9,20,Oslo,8,4\n,,,7,5\n")
    train = csv_table(path, "[:3]", categorical="onehot", missing="mean")
    test = csv_table(path, "[3:]", categorical="onehot", missing="mean")
    scaler = fit_features(train)
    assert scaler.outputs == ["a", "b", "c", "town=Pisa", "town=Rome"]
    std = math.sqrt(2 / 3)  # of 1, 2, 3, ddof 0
    expected = [[-1 / std, -1, 0, 0, 1], [0, 0, 0, 1, 0], [1 / std, 1, 0, 0, 1]]
    np.testing.assert_allclose(scaler.transform(train), expected, rtol=1e-6)
    assert scaler.transform(train).dtype == np.float32
    # Means and texts are of training rows. A column that is constant in training is 0. New and missing texts have none.
    np.testing.assert_allclose(scaler.transform(test), [[7 / std, 0, 0, 0, 0], [0, 0, 0, 0, 0]], rtol=1e-6)


def test_a_file_of_texts_only(write):
    table = csv_table(write('t, u,y\na, "x, or ""y""",1\nb,z,2\na,,3\n'), categorical="onehot", missing="mean")
    assert table.names == () and table.labels.tolist() == [["a", 'x, or "y"'], ["b", "z"], ["a", ""]]
    scaler = fit_features(table)
    assert scaler.outputs == ["t=a", "t=b", 'u=x, or "y"', "u=z"]
    np.testing.assert_array_equal(scaler.transform(table), [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]])


def test_later_rows_do_not_change_the_scaler(write):
    rows = "a,t,y\n1,u,1\n,v,2\n4,,3\n"
    scalers = [
        fit_features(csv_table(write(rows + rest), "[:3]", categorical="onehot", missing="mean"))
        for rest in ("5,u,4\n", "1e6,zzz,-1e9\n,,7\n")
    ]
    assert scalers[0] == scalers[1]
    assert (scalers[0].means, scalers[0].levels) == ([2.5], [["u", "v"]])


def test_columns_can_change_their_order_and_other_columns_raise(write):
    scaler = fit_features(csv_table(write("a,b,y\n1,10,1\n3,50,2\n")))
    swapped = csv_table(write("b,y,a\n50,1,1\n30,2,2\n"))
    np.testing.assert_array_equal(scaler.transform(swapped), [[-1, 1], [0, 0]])
    with pytest.raises(
        ValueError, match=r"rows.csv has the columns of numbers \['a'\], but the training table had \['a', 'b'\]"
    ):
        scaler.transform(csv_table(write("a,y\n1,1\n2,2\n")))
    with pytest.raises(
        ValueError, match=r"has the columns of numbers \['a'\], but"
    ):  # the names are the same, but one column has another kind
        scaler.transform(csv_table(write("a,b,y\n1,u,1\n2,v,2\n"), categorical="onehot"))


def test_scalers_round_trip_through_json(write):
    table = csv_table(write(HOUSES), target="price", categorical="onehot")
    scaler = fit_features(table)
    again = FeatureScaler(**json.loads(json.dumps(dataclasses.asdict(scaler))))
    assert again == scaler
    np.testing.assert_array_equal(again.transform(table), scaler.transform(table))
    target = TargetScaler.fit(table.targets)
    assert TargetScaler(**json.loads(json.dumps(dataclasses.asdict(target)))) == target


def test_features_that_cannot_be_scaled_raise(write):
    with pytest.raises(
        ValueError, match="Column 'a' of .*rows.csv has no value in any of the 2 training rows; remove it, or train on"
    ):
        fit_features(csv_table(write("a,b,y\n,1,1\n,2,2\n3,3,3\n"), "[:2]", missing="mean"))
    with pytest.raises(
        ValueError, match="Column 'a' of .*rows.csv goes from -1e\\+308 to 1e\\+308, for which float64 has no standard"
    ):
        fit_features(csv_table(write("a,y\n-1e308,1\n1e308,2\n1e308,3\n")))
    scaler = fit_features(csv_table(write("a,y\n1,1\n2,2\n")))
    with pytest.raises(
        ValueError, match="Column 'a' is 1e\\+60 in line 3 of .*rows.csv, too far from the training mean for float32."
    ):
        scaler.transform(csv_table(write("a,y\n1,1\n1e60,2\n")))


def test_equal_values_are_constant_despite_rounding(write):
    """Eight times 0.1 has a floating-point standard deviation of 1.4e-17."""
    rows = "".join(f"0.1,{i}\n" for i in range(8))
    scaler = fit_features(csv_table(write("a,y\n" + rows)))
    assert (scaler.means, scaler.stds) == ([0.1], [0.0])
    np.testing.assert_array_equal(scaler.transform(csv_table(write("a,y\n0.1,1\n5,2\n"))), [[0], [0]])
    with pytest.raises(ValueError, match="The training target is 0.1 in all 8 rows, so there is nothing to learn."):
        TargetScaler.fit(np.full(8, 0.1))


def test_targets_by_hand():
    """The targets 1, 2 and 6 have the mean 3 and the variance 14/3."""
    scaler = TargetScaler.fit(np.array([2.0, 6.0, 1.0]))
    std = math.sqrt(14 / 3)
    assert dataclasses.astuple(scaler) == pytest.approx((3, std, -2 / std, 3 / std))
    assert all(
        type(value) is float for value in dataclasses.astuple(scaler)
    )  # a NumPy number would make JAX arrays float64
    np.testing.assert_allclose(scaler.to_z(np.array([3.0, 5.0])), [0, 2 / std])
    np.testing.assert_allclose(scaler.to_unit(np.array([1.0, 2.0, 6.0, 11.0, -4.0])), [0, 0.2, 1, 2, -1], atol=1e-15)
    np.testing.assert_allclose(scaler.unit_to_z(np.array([0, 0.2, 1])), [-2 / std, -1 / std, 3 / std])
    on_device = scaler.unit_to_z(jnp.array([0.2], jnp.float32))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, [-1 / std], rtol=1e-6)


@given(st.lists(st.floats(-1e100, 1e100), min_size=2, max_size=30))
def test_the_training_range_is_the_unit_interval(targets):
    targets = np.array(targets)
    try:
        scaler = TargetScaler.fit(targets)
    except ValueError:
        assert np.std(targets) == 0 or targets.min() == targets.max()
        return
    unit = scaler.to_unit(targets)
    assert (unit.min(), unit.max()) == (0, 1)
    np.testing.assert_allclose(scaler.unit_to_z(unit), scaler.to_z(targets), atol=1e-9)


@pytest.mark.parametrize(
    "targets, message",
    [
        ([], "The training targets have the shape \\(0,\\); give one axis"),
        ([[1.0, 2.0]], "the shape \\(1, 2\\); give one axis"),
        ([1.0, np.nan], "Training target 1 is nan; targets have to be finite numbers."),
        ([np.inf, 1.0], "Training target 0 is inf"),
        ([5.0], "The training target is 5.0 in all 1 rows, so there is nothing to learn."),
        (
            [1e308, -1e308],
            "The training target goes from -1e\\+308 to 1e\\+308, for which float64 has no standard deviation",
        ),
        ([0.0, 1e-200], "The training target goes from 0.0 to 1e-200, for which"),
    ],
)
def test_targets_that_cannot_be_scaled_raise(targets, message):
    with pytest.raises(ValueError, match=message):
        TargetScaler.fit(np.array(targets))
