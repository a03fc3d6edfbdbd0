"""Tests named sets in local files: their columns get our names, and their verifiers read their answers."""

import fnmatch
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrl_reason import data
from jaxrl_reason.data.named_sets import NAMED_SETS
from jaxrl_reason.rewards import load_reward
from jaxrl_reason.rewards.host import reference_faults

# A row of each set, in the columns of its file; a correct completion; and an incorrect one.
ROWS = {
    "aime24": (
        {"id": 60, "problem": "Find x.", "solution": "So 33.", "answer": "033", "url": "u", "year": "2024"},
        r"\boxed{33}",
        r"\boxed{34}",
    ),
    "aime25": ({"question": "Find b.", "answer": "70"}, r"The sum is \boxed{70}.", r"\boxed{7}"),
    "amc23": ({"id": 0, "answer": "27", "url": "u", "question": "How many?"}, r"\boxed{27}", r"\boxed{-27}"),
    "gsm8k": ({"question": "How much?", "answer": "2*600=<<2*600=1200>>\n#### 1,200"}, r"\boxed{1200}", r"\boxed{600}"),
    "math500": (
        {
            "problem": "Convert.",
            "solution": "...",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        r"It is \boxed{(3, \pi/2)}.",
        r"\boxed{(3, \pi)}",
    ),
    "minerva": ({"question": "What speed?", "answer": "4.5e33"}, r"\boxed{4.5e33}", r"\boxed{4.5e32}"),
    "olympiadbench": (
        {
            "id": 1,
            "question": "Solve.",
            "solution": ["..."],
            "final_answer": [r"$\frac{1}{2}$"],
            "context": None,
            "is_multiple_answer": False,
        },
        r"\boxed{0.5}",
        r"\boxed{2}",
    ),
}


def write(path, row):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) + "\n")
    return path


def test_every_set_is_tested():
    assert ROWS.keys() == NAMED_SETS.keys()


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_set_is_read_and_judged(name, tmp_path):
    known, (row, correct, incorrect) = NAMED_SETS[name], ROWS[name]
    file = known.file.rpartition("/")[2].replace("*test*", "test.jsonl").replace("*", "I")
    assert fnmatch.fnmatch(file, known.file.rpartition("/")[2])
    source = data.load_source(str(write(tmp_path / file, row)), "all", columns=known.columns)
    (found,) = source
    assert found["question"] == row[known.question]
    assert data.get_template(known.template).render_prompt(found).startswith(row[known.question])
    reward = load_reward(known.verifier)
    assert reference_faults(reward, {"answer": [found["answer"]]}) == [None]
    assert reward(completions=[correct, incorrect], answer=[found["answer"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("name", NAMED_SETS)
def test_the_source_has_the_form_of_an_address_at_a_commit(name):
    known = NAMED_SETS[name]
    assert re.fullmatch(r"[0-9a-f]{40}", known.revision)
    assert known.source == f"hf://datasets/{known.repository}@{known.revision}/{known.file}"


def test_a_set_comes_from_the_hub_at_its_commit(hub_cache, monkeypatch):
    """The cache of the hub holds the set at a commit that the table then names."""
    row = ROWS["aime25"][0]
    files = {f"aime2025-{part}.jsonl": (json.dumps(row | {"answer": part}) + "\n").encode() for part in ("I", "II")}
    commit = hub_cache("dataset", "opencompass/AIME2025", files)
    source = NAMED_SETS["aime25"].source.replace(NAMED_SETS["aime25"].revision, commit)
    assert [found["answer"] for found in data.load_source(source, "all")] == ["I", "II"]
