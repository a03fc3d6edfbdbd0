"""Model cards have base model, licence, recipe, held-out metrics with intervals, versions, and no local path."""

import json
import pathlib

import huggingface_hub
import pytest

from helpers.tiny_runs import tiny
import jaxrl_reason
from jaxrl_reason.tasks.model_card import Exported, model_card, public, recipe

METRICS = {"accuracy": 0.5, "accuracy_low": 0.4375, "accuracy_high": 0.5625, "pass@2": 0.75, "mean_length": None}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    return tmp_path / "run"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


def record(checkpoint, **changes):
    data = {"name": "/home/me/problems.jsonl", "split": "all"}
    return dict(checkpoint=checkpoint, data=data, samples=4, temperature=0.5, metrics=METRICS) | changes


def head(card):
    return huggingface_hub.ModelCard(card).data.to_dict()


def config_of(**changes):
    return tiny("/home/me/rows.jsonl", supervised__steps=2, method={"name": "hero+rlev", "base": "rloo"}, **changes)


def test_a_card_of_random_weights(workdir):
    write(workdir / "evaluation" / "evaluation.json", record(9))
    write(workdir / "evaluation-2" / "evaluation.json", record(8, samples=99))
    card = model_card(Exported("mine", workdir, config_of(), 9))
    assert head(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxrl_reason", "reinforcement-learning", "hero", "rlev"],
    }
    assert (
        "# mine\n\nA language model, trained by reinforcement learning with jaxrl_reason from random weights." in card
    )
    assert "problems.jsonl, all: 4 samples per prompt, temperature 0.5" in card and "99 samples" not in card
    assert "| accuracy | 0.5 | 0.4375 to 0.5625 |\n| pass@2 | 0.75 |  |\n\n## Recipe" in card
    assert f"- jaxrl_reason {jaxrl_reason.__version__}" in card and "- jax " in card
    assert '"data.train": "rows.jsonl"' in card and '"method.base": "rloo"' in card


def test_a_card_of_a_supervised_phase_names_no_method(workdir):
    for checkpoint in (1, 2):  # the phase has two steps
        card = model_card(Exported("mine", workdir, config_of(), checkpoint))
        assert head(card)["tags"] == ["jaxrl_reason"] and "## Method" not in card
        assert "A language model, trained on worked solutions with jaxrl_reason from random weights." in card


def test_a_card_of_random_weights_before_any_step(workdir):
    card = model_card(Exported("mine", workdir, tiny("rows.jsonl", supervised__steps=0), 0))
    assert "A language model, made with jaxrl_reason before any training, from random weights." in card
    card = model_card(Exported("mine", workdir, tiny("rows.jsonl", supervised__start_from="start"), 0))
    assert "trained on worked solutions" in card


def test_a_card_has_each_set_of_an_evaluation_with_its_intervals(workdir):
    sets = {
        name: record(9, samples=1, data={"name": f"{name}.jsonl", "split": "all"}, intervals={"pass@2": [0.5, 0.875]})
        for name in ("first", "second")
    }
    sets["second"] |= {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    write(workdir / "evaluation" / "evaluation.json", {"command": "evaluate", "sets": sets})
    card = model_card(Exported("mine", workdir, config_of(), 9))
    assert "first.jsonl, all: 1 sample per prompt, temperature 0.5\n\n| metric |" in card
    assert "second.jsonl, all: 1 sample per prompt, temperature 0.6, top-k 20, top-p 0.95\n\n| metric |" in card
    assert card.count("| accuracy | 0.5 | 0.4375 to 0.5625 |\n| pass@2 | 0.75 | 0.5 to 0.875 |") == 2


def test_without_an_evaluation_the_card_has_the_last_one_of_the_training(workdir):
    lines = [
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 5, "eval/accuracy": 0.25},
        {"step": 6},
        {"step": 9, "eval/accuracy": 1.0},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = model_card(Exported("mine", workdir, config_of(), 2 + 7))
    assert "rows.jsonl, all, after RL step 5 of the training: 2 samples per prompt, temperature 1" in card
    assert "| accuracy | 0.25 |  |" in card
    (workdir / "metrics.jsonl").unlink()
    assert "None were measured." in model_card(Exported("mine", workdir, config_of(), 9))


CARD = "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x/y\ntags: [a]\n---\nText.\n"


def test_base_model_and_licence_of_a_model_of_the_hub(workdir, hub_cache):
    commit = hub_cache("model", "Owner/Base", {"README.md": CARD.encode()})
    write(workdir / "tokenizer" / "config.json", {"_commit_hash": commit})
    card = model_card(Exported("mine", workdir, config_of(model__path="Owner/Base@main"), 9, adapters=True))
    found = head(card)
    assert (found["base_model"], found["library_name"]) == ("Owner/Base", "peft")
    assert [found[name] for name in ("license", "license_name", "license_link")] == ["other", "gemma", "https://x/y"]
    assert f"from [Owner/Base](https://huggingface.co/Owner/Base) (revision {commit})." in card


@pytest.mark.parametrize(
    "text, license", [(CARD, "other"), ("---\nlicense: [a\n---\n", None), ("No head.", None), (None, None)]
)
def test_licence_of_a_local_model(text, license, workdir, tmp_path):
    (tmp_path / "base").mkdir()
    if text is not None:
        (tmp_path / "base" / "README.md").write_text(text)
    write(workdir / "tokenizer" / "config.json", {})
    card = model_card(Exported("mine", workdir, config_of(model__path=str(tmp_path / "base")), 9))
    assert head(card).get("license") == license and "base_model" not in head(card)
    assert "from a local model, base." in card and str(tmp_path) not in card


def test_a_card_of_a_reward_model(workdir):
    write(workdir / "reward_model" / "reward_model.json", {"held_out": {"accuracy": 0.875, "pairs": 8}})
    card = model_card(Exported("judge", workdir, config_of(), None))
    assert head(card)["pipeline_tag"] == "text-classification" and "A reward model, trained on preference pairs" in card
    assert "| accuracy | 0.875 |  |\n| pairs | 8 |  |" in card and "## Method" not in card


def test_a_recipe_has_the_names_of_files_only(tmp_path):
    config = config_of(
        reward__functions=["accuracy", "/home/me/rewards.py:brevity", "~/other.py:f", "module:function"],
        data__eval="hf://datasets/a/b/c.parquet",
        data__data_dir="/home/me/data",
        compilation_cache="/home/me/cache",
        reward_model__path="Owner/Judge",
        supervised__start_from="../runs/first",
        data__tokenizer=str(tmp_path / "tokenizer"),
    )
    found = recipe(config)
    assert found["reward.functions"] == ["accuracy", "rewards.py:brevity", "other.py:f", "module:function"]
    assert found["data.eval"] == "hf://datasets/a/b/c.parquet" and found["reward_model.path"] == "Owner/Judge"
    assert (found["supervised.start_from"], found["data.tokenizer"]) == ("first", "tokenizer")
    assert "/home" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    assert not [name for name in found if name.startswith(("mesh", "log", "compilation_cache", "data.data_dir"))]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Owner/Name", "Owner/Name"),
        ("Owner/Name@v1", "Owner/Name@v1"),
        ("gsm8k", "gsm8k"),
        ("a/b.jsonl/", "b.jsonl"),
        ("C:\\me\\x.csv", "x.csv"),
    ],
)
def test_names_of_the_hub_stay_and_paths_are_cut(text, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "a/b.jsonl/":
        pathlib.Path("a/b.jsonl").mkdir(parents=True)
    assert public(text) == shown


def test_a_local_directory_of_the_form_owner_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("me/model").mkdir(parents=True)
    assert public("me/model") == "model"
