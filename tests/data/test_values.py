"""Tests RLEV's values against numbers worked by hand."""

import numpy as np
import pytest

from jaxrl_reason.data.sources import Source
from jaxrl_reason.data.values import altered, held_out_values, read_values


def source(rows):
    return Source("exam.jsonl", "", 0, lambda indices: [dict(rows[i]) for i in indices], len(rows))


def test_points_over_the_points_of_their_exam():
    rows = [
        {"points": 3, "exam": "a"},
        {"points": 1.5, "exam": "b"},
        {"points": "1", "exam": "a"},
        {"points": 4.5, "exam": "b"},
    ]
    np.testing.assert_allclose(read_values(source(rows)), [0.75, 0.25, 0.25, 0.75])


def test_points_over_a_given_total():
    np.testing.assert_allclose(read_values(source([{"points": 2, "exam_total": 100, "exam": "a"}])), [0.02])


def test_held_out_values_are_needed_or_optional():
    exam = source([{"points": 3, "exam": "a"}, {"points": 1, "exam": "a"}])
    np.testing.assert_allclose(held_out_values(exam, needed=False), [0.75, 0.25])
    assert held_out_values(source([{"question": "q"}]), needed=False) is None
    house = source([{"value": 300_000}])  # this value is no share of an exam
    assert held_out_values(house, needed=False) is None
    with pytest.raises(ValueError, match="row 0"):
        held_out_values(house, needed=True)


def test_a_column_of_values_has_precedence():
    assert read_values(source([{"value": 0.5, "points": 1, "exam": "a"}])).tolist() == [0.5]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"value": 0.1}, {"value": -0.1}], "row 1 of exam.jsonl has -0.1 in the column 'value'"),
        ([{"value": 0.1}, {"value": None}], "row 1 .* has None"),
        (
            [{"points": 1, "exam": "a"}, {"points": 1, "exam": "a", "value": 0.1}],
            "row 0 .* has None in the column 'value'",
        ),
        ([{"value": float("nan")}], "row 0 .* has nan"),
        ([{"value": "much"}], "row 0 .* has 'much'"),
        ([{"value": True}], "row 0 .* has True"),
        ([{"value": 1.5}], r"row 0 .* has the value 1.5; a value is a share of an exam, in \[0, 1\]"),
        ([{"points": 1, "exam": "a"}, {"points": 1}], "row 1 .* no exam"),
        ([{"points": 1, "exam": ["a"]}], r"row 0 .* has the exam \['a'\]; name it by a text or a whole number"),
        ([{"points": 1, "exam": float("nan")}], "row 0 .* has the exam nan"),
        (
            [{"value": 10**400}],
            "^row 0 of exam.jsonl has 1000*0 in the column 'value'; it must be a number and not negative.$",
        ),
        ([{"value": "0_1"}], "row 0 .* has '0_1'"),
        ([{"value": "١"}], "row 0 .* has '١'"),
        ([{"value": "x" * 1_000_000}], "^row 0 of exam.jsonl has 'x{79} in the column"),
        ([{"points": 0, "exam": "a"}], "row 0 .* an exam of 0 points"),
        ([{"points": 5, "exam_total": 4}], "row 0 .* has the value 1.25"),
        ([{"question": "q", "points": 1}], "neither a column 'value' nor 'points' .*points, question"),
    ],
)
def test_invalid_values_raise_with_their_row(rows, message):
    with pytest.raises(ValueError, match=message):
        read_values(source(rows))


def test_the_ablations_keep_the_values_and_the_mean_scale():
    values = np.array([0.01, 0.05, 0.2, 0.3], np.float32)
    scale = lambda v: 1 + np.minimum(10 * v, 1)
    assert altered(values, "own", alpha=10, clip=1, seed=0) is values
    shuffled = altered(values, "shuffled", alpha=10, clip=1, seed=0)
    assert sorted(shuffled) == sorted(values) and shuffled.tolist() != values.tolist()
    uniform = altered(values, "uniform", alpha=10, clip=1, seed=0)
    assert len(set(uniform.tolist())) == 1
    np.testing.assert_allclose(scale(uniform), scale(values).mean(), rtol=1e-6)
    assert altered(values, "uniform", alpha=0, clip=1, seed=0).tolist() == [0] * 4


def test_levels_are_the_fifths_of_the_rows():
    values = np.float32([0.5, 0.1, 0.2, 0.3, 0.4, 0.9, 0.8, 0.7, 0.6, 1.0])
    levels = altered(values, "levels", alpha=10, clip=1, seed=0)
    np.testing.assert_array_equal(levels, np.float32([4, 1, 1, 2, 2, 8, 6, 6, 4, 8]) / 100)
    np.testing.assert_array_equal(
        altered(values[[0, 0, 0]], "levels", alpha=10, clip=1, seed=0), np.float32([0.01] * 3)
    )
