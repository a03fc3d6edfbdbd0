"""Tests CSV files as tables: texts, gaps, fingerprints and every kind of fault."""

import numpy as np
import pytest

from jaxrl_reason.data.tables import load_table


def csv_table(path, split="all", target="y", **options):
    return load_table(path, split, target=target, **options)


@pytest.fixture
def write(write):
    return lambda content, name="rows.csv": write(content, name)


HOUSES = "size, price ,town\n50,1e2,Rome\n70,.15e3,Pisa\n-30.,+80,Rome\n90,210,Bari\n"


def test_a_file(write):
    path = write('\ufeffa,y,b\r\n1,10,2\r\n"3",20,4\r\n5,30.5,-6e-1\r\n\r\n  \r\n')
    table = csv_table(path)
    assert (table.name, table.names, table.target, len(table)) == (path, ("a", "b"), "y", 3)
    np.testing.assert_array_equal(table.features, [[1, 2], [3, 4], [5, -0.6]])
    np.testing.assert_array_equal(table.targets, [10, 20, 30.5])
    assert table.features.dtype == table.targets.dtype == np.float64
    assert table.noise_std is None
    np.testing.assert_array_equal(csv_table(path, "[1:]").targets, [20, 30.5])
    np.testing.assert_array_equal(csv_table(path, "[:33%]").features, [[1, 2]])


def test_texts_become_columns_or_are_dropped(write):
    path = write(HOUSES)
    table = csv_table(path, target="price", categorical="onehot")
    assert (table.names, table.label_names) == (("size",), ("town",))
    assert table.labels.tolist() == [["Rome"], ["Pisa"], ["Rome"], ["Bari"]]
    np.testing.assert_array_equal(table.targets, [100, 150, 80, 210])
    dropped = csv_table(path, target="price", categorical="drop")
    assert (dropped.names, dropped.label_names, dropped.labels.shape) == (("size",), (), (4, 0))
    with pytest.raises(
        ValueError, match="rows.csv holds text in column 'town': set categorical to 'onehot' .* or to 'drop'"
    ):
        csv_table(path, target="price")


def test_gaps_stay_for_the_scaler_or_drop_their_row(write):
    path = write("a,b,y\n1,,10\n NA ,2,20\n3,4,30\n5,n/a,40\nnan,?,50\n7,Null,60\n")
    with pytest.raises(ValueError) as refusal:
        csv_table(path)
    assert str(refusal.value).split("\n")[1:3] == ["  column 'a', lines 3, 6", "  column 'b', lines 2, 5, 6, 7"]
    assert "or set missing to 'mean' to fill them with training means, or to 'drop'" in str(refusal.value)
    table = csv_table(path, missing="mean")
    nan = np.nan
    np.testing.assert_array_equal(table.features, [[1, nan], [nan, 2], [3, 4], [5, nan], [nan, nan], [7, nan]])
    with pytest.warns(UserWarning, match="rows.csv: rows with missing values left out: 1, kept: 2"):
        table = csv_table(write("a,y\n,1\n2,3\n3,4\n"), missing="drop")
    np.testing.assert_array_equal(table.features, [[2], [3]])
    with pytest.raises(ValueError, match="Every row of .*rows.csv has a missing value"):
        csv_table(write("a,b,y\n,1,1\n2,,3\n"), missing="drop")


def test_a_gap_in_a_target_is_never_filled(write):
    path = write("a,y\n1,\n2,3\n3,4\n")
    with pytest.raises(ValueError, match="column 'y', line 2"):
        csv_table(path)
    with pytest.raises(
        ValueError, match="The target 'y' of .*rows.csv is missing in line 2, and a target cannot be filled in"
    ):
        csv_table(path, missing="mean")
    with pytest.warns(UserWarning):
        np.testing.assert_array_equal(csv_table(path, missing="drop").targets, [3, 4])


def test_gaps_in_dropped_columns_do_not_matter(write):
    table = csv_table(write("a,t,y\n1,,10\n2,u,20\n"), categorical="drop")
    np.testing.assert_array_equal(table.targets, [10, 20])


def test_an_index_of_pandas_and_columns_without_a_value_are_no_features(write):
    path = write(",a,note,b,y\n0,1,,5,10\n1,2,NA,6,20\n")
    with pytest.warns(UserWarning) as warned:
        table = csv_table(path)
    assert table.names == ("a", "b")
    np.testing.assert_array_equal(table.features, [[1, 5], [2, 6]])
    assert sorted(str(w.message) for w in warned) == [
        f"{path} has no value in any row of column 'note', left out.",
        f"{path}: the first column has no name, as an index that pandas writes; it is left out.",
    ]


FAULTS = [
    ("", "rows.csv has no header: it is empty."),
    ("\n\n", "rows.csv has no header: it is empty."),
    ("a,y\n", "rows.csv has a header and no rows."),
    ("\na,y\n1,2\n", "rows.csv, line 1 is blank; the first line has to name every column."),
    ("a,,y\n1,2,3\n", "rows.csv, line 1: column 2 has no name"),
    ("a,y, a\n1,2,3\n", "rows.csv, line 1: columns 1 and 3 are both named 'a'; rename one of them."),
    ("a,y\n1,2\n3\n", "rows.csv, line 3 has 1 cell, but the header names 2 columns."),
    ("a,y\n1,2,3\n", "rows.csv, line 2 has 3 cells, but the header names 2 columns."),
    ("a,y\n1,2\n\n3,4\n", "rows.csv, line 3 has no cells, but the header names 2 columns."),
    ('a,y\n"1\n\n1",2\n"x\ny",3,4\n', "rows.csv, line 5 has 3 cells"),  # lines of the file count, not rows
    ('a,y\n1,2\n"3,4\n', "rows.csv, line 3 is not readable as CSV: unexpected end of data."),
    ('a,y\n"1"1,2\n', "rows.csv, line 2 is not readable as CSV"),
    (b"a,y\n1,2\n\xff,3\n", "rows.csv, line 3 is not UTF-8"),
    ("a,y\n" + "9" * 200_000 + ",1\n", "rows.csv, line 2, column 'a' is 99999999999999999..., not"),
    ("a,y\n1,2\ninf,3\n", "rows.csv, line 3, column 'a' is inf, not a finite number."),
    ("a,y\n1,-Infinity\n2,3\n", "rows.csv, line 2, column 'y' is -Infinity, not a finite number."),
    ("a,y\n1e999,2\n2,3\n", "rows.csv, line 2, column 'a' is 1e999, not a finite number."),
    ("a,y\n" + "9" * 400 + ",2\n2,3\n", "rows.csv, line 2, column 'a' is 99999999999999999..., not a finite number."),
    (
        "a,y\n1,2\nx,3\n5,4\n",
        "Column 'a' of .*rows.csv holds both numbers and text, such as 'x', in line 3; correct the cells.",
    ),
    (
        'a,y\n"1,5",2\n1_000,3\n0x1,4\n٣,5\n5,6\n',
        "Column 'a' of .*holds both .*such as '1,5', in lines 2, 3, 4, 5; correct",
    ),
    ("a,y\n" + "1,1\nx,2\n" * 12, "in lines 3, 5, 7, 9, 11, 13, 15, 17, 19, 21 and 2 more; correct"),
    ("a,y\n,2\nNA,3\n", "Column 'a' of .*rows.csv has no value in any row; remove it."),
    ("a,y\n1,low\n2,high\n", "The target 'y' of .*rows.csv holds text \\(line 2\\); regression needs numbers."),
    ("y\n1\n2\n", "rows.csv has no column to predict 'y' from; it needs a header and cells separated by commas."),
    ("a,Y\n1,2\n", "rows.csv has no column 'y' to predict. There are 'a', 'Y'."),
]


@pytest.mark.parametrize("content, message", FAULTS)
def test_faults_raise_a_sentence(write, content, message):
    path = write(content)
    for options in ({}, {"missing": "mean", "categorical": "onehot"}):
        with pytest.raises(ValueError, match=message):
            csv_table(path, **options)


def test_missing_files_and_columns_raise_a_sentence(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no data file .*none.csv"):
        csv_table(str(tmp_path / "none.csv"))
    path = write(HOUSES)
    with pytest.raises(ValueError, match="rows.csv has no column 'prise' to predict. Did you mean 'price'\\?"):
        csv_table(path, target="prise")
    with pytest.raises(
        ValueError, match="rows.csv needs `target`, the column to predict. There are 'size', 'price', 'town'."
    ):
        csv_table(path, target="")
    with pytest.raises(ValueError, match="The split 'train' of .*rows.csv is not understood"):
        csv_table(path, "train", target="price", categorical="drop")


def test_a_long_cell_is_parsed_quickly(write):
    """A pattern with backtracking would take hours."""
    with pytest.raises(ValueError, match="holds both numbers and text, such as '11111111111111111...', in line 2"):
        csv_table(write("a,y\n" + "1" * 100_000 + "x,1\n2,2\n"))


def test_fingerprints_follow_the_content(write):
    path = write(HOUSES)
    load = lambda path, split="all", categorical="onehot", target="price": csv_table(
        path, split, target, categorical=categorical
    )
    first = load(path).fingerprint
    assert len(first) == 64 and first == load(write(HOUSES.replace("50,1e2", "5e1,100"), "copy.csv")).fingerprint
    others = [
        load(path, "[1:]"),
        load(path, categorical="drop"),
        load(path, target="size"),
        load(write(HOUSES.replace("Pisa", "Pise"), "b.csv")),
        load(write(HOUSES.replace("90", "91"), "b.csv")),
        load(write(HOUSES.replace("210", "211"), "b.csv")),
        load(write(HOUSES.replace("size", "area"), "b.csv")),
    ]
    assert len({first, *(table.fingerprint for table in others)}) == 1 + len(others)
