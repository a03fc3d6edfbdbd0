"""Tests the tables of results in documents, by hand."""

import shutil
import subprocess
import sys

import pytest

from helpers.documents import ROOT
from helpers.entries import ENTRIES, entry
from jaxrl_reason import tasks
from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs import result_tables, results

RESULTS = ROOT / "configs" / "results"


def test_a_table_by_hand():
    assert result_tables.markdown(ENTRIES, ["accuracy", "r2"], tasks.BASELINES) == (
        "| | accuracy | r2 |\n"
        "|---|---|---|\n"
        "| start | 30.0 ± 63.5 % | - |\n"
        "| start, difference to hero | -32.5 [-127.8, +62.8] points | - |\n"
        "| pointwise | - | 0.600 ± 1.271 |\n"
        "| hero | 62.5 ± 158.8 % | - |\n"
        "| plain | 35.0 ± 127.1 % | - |\n"
        "| plain, difference to hero | -27.5 [-59.3, +4.3] points | - |\n"
        "\n"
        "Seeds 0, 1. Means ± half-widths of 95 % intervals (Student's t over seeds); differences [95 % interval] are "
        "paired by seed. 1.5 minutes per run of RL."
    )
    alone = result_tables.markdown([ENTRIES[0]], ["accuracy"], tasks.BASELINES)
    assert "| hero | 50.0 % |" in alone and alone.endswith(
        "Seed 0. One seed, so there is no interval. 1.0 minutes per run of RL."
    )


def of_table(table, row, seed, r2, r2_before=0.0, recipe=False):
    return entry(row, seed, {"eval/r2": r2_before}, {"eval/r2": r2}, recipe=recipe) | {"table": f"small_tables/{table}"}


SEVERAL = [
    of_table("a", "genre2", 0, 0.5, 0.3, recipe=True),
    of_table("a", "genre2", 1, 0.7, 0.3, recipe=True),
    of_table("b", "genre2", 0, 0.2, 0.4, recipe=True),
    of_table("a", "more", 0, 0.4),
    of_table("a", "more", 1, 0.4),
    of_table("b", "more", 0, 0.3),
]


def test_a_table_over_several_training_tables_by_hand():
    """genre2 has 0.6 and 0.2 on a and b, its start 0.3 and 0.4, more 0.4 and 0.3. t(0.975, 1) / sqrt(2) = 8.9846."""
    assert result_tables.markdown(SEVERAL, ["r2"], ()) == (
        "| | r2 |\n"
        "|---|---|\n"
        "| start | 0.350 ± 0.635 |\n"
        "| start, difference to genre2 | -0.050 [-3.227, +3.127], 1 of 2 |\n"
        "| genre2 | 0.400 ± 2.541 |\n"
        "| more | 0.350 ± 0.635 |\n"
        "| more, difference to genre2 | -0.050 [-1.956, +1.856], 1 of 2 |\n"
        "\n"
        "2 tables. Seeds 0, 1. Means over the tables, each the mean over the seeds, ± half-widths of 95 % intervals "
        "(Student's t over tables). Differences [95 % interval] are paired by table and seed, and followed by the number of "
        "tables on which the row is above genre2. 1.3 minutes per run of RL."
    )
    assert result_tables.markdown_by_table(SEVERAL, ["r2"], ()) == (
        "| r2 | start | genre2 | more |\n"
        "|---|---|---|---|\n"
        "| a | 0.300 | 0.600 ± 1.271 | 0.400 |\n"
        "| b | 0.400 | 0.200 | 0.300 |"
    )
    with pytest.raises(ValueError, match=r"^The rows \['genre2', 'more'\] of small_tables/a have not the same seeds"):
        result_tables.markdown([e for e in SEVERAL if e is not SEVERAL[4]], ["r2"], ())
    with pytest.raises(ValueError, match="have not the same rows; run the missing ones"):
        result_tables.markdown(SEVERAL[:-1], ["r2"], ())


def test_a_metric_that_a_table_does_not_have_is_left_out_of_the_means():
    """A rank correlation of equal predictions is NaN, and null in JSON."""
    unknown = [
        entry
        | {"evaluations": [line | {"eval/spearman": None if entry["table"][-1] == "a" else 0.5} for line in lines]}
        for entry in SEVERAL
        for lines in [entry["evaluations"]]
    ]
    assert "| more, difference to genre2 | +0.000, 0 of 1 |" in result_tables.markdown(unknown, ["spearman"], ())
    assert "| genre2 | 0.500 |" in result_tables.markdown(unknown, ["spearman"], ())


def test_results_of_several_tables_are_merged_by_table(tmp_path):
    results.merge(tmp_path / "a.jsonl", [*SEVERAL[::-1], of_table("a", "genre2", 0, 0.9, recipe=True)])
    found = results.read(tmp_path / "a.jsonl")
    assert [(e["row"], e["table"][-1], e["seed"]) for e in found[:3]] == [
        ("genre2", "a", 0),
        ("genre2", "a", 1),
        ("genre2", "b", 0),
    ]
    assert len(found) == 6 and found[0]["evaluations"][-1]["eval/r2"] == 0.9
    text = "<!-- results by table: a: r2 -->\n<!-- end of results -->\n"
    assert result_tables.markdown_by_table(found, ["r2"], ()) in result_tables.with_tables(text, tmp_path, ())


def test_results_that_make_no_table_are_one_sentence():
    with pytest.raises(
        ValueError, match="^The row 'hero' has results of several configurations; run its old ones again"
    ):
        result_tables.markdown([ENTRIES[0], ENTRIES[1] | {"config": "d"}], ["accuracy"], ())
    for markdown in (result_tables.markdown, result_tables.markdown_by_table):
        with pytest.raises(ValueError, match="^There are no results of the recipe"):
            markdown(ENTRIES[2:], ["accuracy"], ())
    with pytest.raises(
        ValueError, match=r"^The rows \['hero', 'plain'\] have not the same seeds; run the missing ones"
    ):
        result_tables.markdown(ENTRIES[:3], ["accuracy"], ())


def test_tables_of_a_document_are_written_anew(tmp_path):
    results.merge(tmp_path / "a.jsonl", ENTRIES)
    text = "before\n<!-- results: a: accuracy -->\n{}<!-- end of results -->\nafter <!-- results -->\n"
    table = result_tables.markdown(ENTRIES, ["accuracy"], tasks.BASELINES)
    for old in ("", "an old table\n"):
        assert result_tables.with_tables(text.format(old), tmp_path, tasks.BASELINES) == text.format(f"{table}\n")
    with pytest.raises(ConfigError, match="The document names the results 'b', and .*b.jsonl has none."):
        result_tables.with_tables(text.replace(": a:", ": b:").format(""), tmp_path, ())


def test_the_tables_of_the_recipes_are_those_of_the_results():
    readme = (ROOT / "configs" / "README.md").read_text()
    assert result_tables.with_tables(readme, RESULTS, tasks.BASELINES) == readme, "run configs/results/write_tables.py"
    for file in RESULTS.glob("*.jsonl"):
        assert f"<!-- results: {file.stem}:" in readme, f"{file} is in no table"


def test_the_script_writes_the_tables():
    before = (ROOT / "configs" / "README.md").read_text()
    subprocess.run([sys.executable, RESULTS / "write_tables.py"], check=True, env={"PYTHONPATH": str(ROOT)})
    assert (ROOT / "configs" / "README.md").read_text() == before


def test_the_script_says_what_a_table_lacks(tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(RESULTS / "write_tables.py", tmp_path / "results")
    results.merge(tmp_path / "results" / "a.jsonl", ENTRIES[:3])
    (tmp_path / "README.md").write_text("<!-- results: a: accuracy -->\n<!-- end of results -->\n")
    script = [sys.executable, tmp_path / "results" / "write_tables.py"]
    done = subprocess.run(script, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith("error: The rows ['hero', 'plain'] have not the same seeds")
