"""Tests rows of tables as text, with every digit of the file and one prompt per set of features."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from jaxrl_reason import data
from jaxrl_reason.config import Config, ConfigError, Data, Regression
from jaxrl_reason.data.tables import load_table
from jaxrl_reason.tasks.regression.tables import open_tables, row_texts


def texts_of(tmp_path, rows, header="a,y", **options):
    path = tmp_path / "rows.csv"
    path.write_text(header + "\n" + "".join(f"{row}\n" for row in rows))
    return row_texts(load_table(str(path), "all", target="y", **options))


@pytest.mark.parametrize(
    "cell, text",
    [
        ("20240115", "20240115"),
        ("20240131", "20240131"),
        ("123456.1", "123456.1"),
        ("123456.9", "123456.9"),
        ("25.30", "25.3"),
        ("+5", "5"),
        (".5", "0.5"),
        ("-0.000012", "-1.2e-05"),
        ("1e3", "1000"),
        ("1e300", "1e+300"),
        ("0.1", "0.1"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("9007199254740993", "9007199254740993"),  # 2**53 + 1, which float64 rounds to 2**53
        ("9007199254740992", "9007199254740992"),
        ("12345678901234567890.5", "12345678901234567890.5"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("100000000000000000000000", "1e+23"),
        ("1e-400", "1e-400"),  # 0 in float64
        ("1e-99999999999999999999", "1e-99999999999999999999"),  # and below all decimals
        ("3e-324", "3e-324"),
        ("0.0", "0"),
    ],
)
def test_a_number_has_all_digits_of_the_file(tmp_path, cell, text):
    assert texts_of(tmp_path, [f"{cell},1", "2,3"]) == [f"a {text}", "a 2"]


def test_missing_numbers_and_texts(tmp_path):
    rows = ["1.5,Rome,1", ",Oslo,2", "3,,4"]
    found = texts_of(tmp_path, rows, "a,city,y", categorical="onehot", missing="mean")
    assert found == ["a 1.5, city Rome", "city Oslo", "a 3"]


def opened(tmp_path, rows, header="a,y", held_out=None, **changes):
    for name, part, head in (("train", rows, header), ("eval", *(held_out or (rows, header)))):
        (tmp_path / f"{name}.csv").write_text(head + "\n" + "".join(f"{row}\n" for row in part))
    settings = dict(tokenizer="normalized", target="y", inputs="text", categorical="onehot", missing="mean")
    files = dict(
        train=str(tmp_path / "train.csv"), train_split="all", eval=str(tmp_path / "eval.csv"), eval_split="all"
    )
    return open_tables(
        Config(
            max_prompt_length=64,
            max_completion_length=8,
            data=Data(**files, **changes),
            regression=Regression(**settings),
        )
    )


def prompts_of(rows):
    tokens, mask = rows.padded.take(np.arange(len(rows.targets)))
    return [tuple(ids[live]) for ids, live in zip(tokens, mask)]


def test_close_numbers_have_different_prompts(tmp_path):
    cells = ["20240115", "20240131", "123456.1", "123456.9", "9007199254740992", "9007199254740993", "123456.1"]
    found = prompts_of(opened(tmp_path, [f"{cell},{i}" for i, cell in enumerate(cells)]).train_rows())
    assert len(set(found)) == 6 and found[2] == found[6]


@pytest.mark.parametrize(
    "header, rows",
    [
        ("a,city,y", ['1,"x, b",1', '1,"x, b",2', "3,z,3"]),  # equal rows share a prompt
        ("a,b,y", ["1,2,1", "1.0,2.00,2", "3,4,3"]),
    ],
)
def test_equal_rows_may_share_a_prompt(tmp_path, header, rows):
    found = prompts_of(opened(tmp_path, rows, header).train_rows())
    assert found[0] == found[1] != found[2]


def test_different_rows_never_share_a_prompt(tmp_path):
    with pytest.raises(
        ConfigError,
        match="Two rows have different features and the same prompt, 'a 1, c x, d y': line 2 of .*train.csv and line 3 of ",
    ):
        opened(tmp_path, ['1,"x, d y",,1', "1,x,y,2", "3,z,z,3"], "a,c,d,y").train_rows()
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    data.Tokenizer(backend, (2,), 2).save(tmp_path / "coarse")
    tables = opened(tmp_path, ["1,1", "2,2"], tokenizer=str(tmp_path / "coarse"))
    with pytest.raises(ConfigError, match="line 2 of .* and line 3 of .* use a tokenizer that tells them apart"):
        tables.train_rows()


def test_held_out_rows_have_the_order_of_the_training_columns(tmp_path):
    held_out = (["5,1,Oslo,1", "6,2,Rome,2"], "b,a,city,y")
    tables = opened(tmp_path, ["1,5,Oslo,1", "2,6,Rome,3"], "a,b,city,y", held_out=held_out)
    assert prompts_of(tables.train_rows()) == prompts_of(tables.held_out_rows())


def test_the_fingerprint_knows_the_digits_that_float64_rounds(tmp_path):
    tables = [load_table_of(tmp_path, cell) for cell in ("9007199254740993", "9007199254740992")]
    assert np.array_equal(tables[0].features, tables[1].features)
    assert tables[0].fingerprint != tables[1].fingerprint
    assert tables[1].fingerprint == dataclasses.replace(tables[0], exact={}).fingerprint


def load_table_of(tmp_path, cell):
    path = tmp_path / "rows.csv"
    path.write_text(f"a,y\n{cell},1\n2,3\n")
    return load_table(str(path), "all", target="y")
