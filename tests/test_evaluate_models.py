"""Tests the evaluate command on models without a run: several sets, continued evaluations, two policies compared."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from helpers import reference_decoder
from helpers.tiny_runs import ROWS, write_rows
from jaxrl_reason import data, evaluate, metrics, models
from jaxrl_reason.data.named_sets import NAMED_SETS
from jaxrl_reason.models import lora, ModelConfig
from jaxrl_reason.rl.programs import Programs

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

PROMPTS = [{"question": f"Write {i}.", "answer": i} for i in range(7)]
OTHERS = [{"question": f"Say {i} twice.", "answer": i} for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes two random models, `a` and `b`, two files of problems, and a reward that both models sometimes get."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = data.train_tokenizer([f"{row['question']}\n{row['solution']}" for row in ROWS], 300)
    config = ModelConfig(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, rope_theta=1e4)
    for seed, name in enumerate("ab"):
        params = reference_decoder.random_params(config, scale=0.3, seed=seed)
        models.save_pretrained(folder / name, models.Policy(config, params, tokenizer))
    write_rows(folder / "first.jsonl", PROMPTS)
    write_rows(folder / "second.jsonl", OTHERS)
    (folder / "rewards.py").write_text(
        "def even(completions, **_):\n    return [float(len(c) % 2 == 0) for c in completions]\n"
        "def some(completions, **_):\n    return [float(len(c) % 3 == 0) for c in completions]\n"
    )
    return folder


def flags(folder, out, *more, model="a", reward="even"):
    fields = {
        "data.template": "plain",
        "reward.functions": f"{folder / 'rewards.py'}:{reward}",
        "prompts_per_step": 2,
        "group_size": 2,
        "log.progress": "false",
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--model={folder / model}", f"--out={out}", *given, "--max_completion_length=6", "--samples=2", *more]


def run(*arguments, **options):
    """Runs the command and returns the content of evaluation.json."""
    assert evaluate.main(flags(*arguments, **options)) == 0
    return json.loads((arguments[1] / "evaluation.json").read_text())


def lines_of(directory):
    return [json.loads(line) for line in open(directory / "completions.jsonl", encoding="utf-8")]


def refusal(capsys, *arguments, code=2, **options):
    capsys.readouterr()
    assert evaluate.main(flags(*arguments, **options)) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.fixture
def sampled(monkeypatch):
    """Records the sizes of the sampled batches. The disk fails after `sampled.limit` batches."""

    class Sampled(list):
        limit = 99

    batches, generate = Sampled(), Programs.generate_eval

    def watched(programs, weights, batch, temperature=None):
        if len(batches) == batches.limit:
            raise OSError("the disk fails")
        batches.append(int(batch.weight.sum()))
        return generate(programs, weights, batch, temperature)

    monkeypatch.setattr(Programs, "generate_eval", watched)
    return batches


# -- continuing ------------------------------------------------------------------------------------


def test_an_evaluation_that_is_ended_continues_and_equals_one_that_is_not(folder, tmp_path, sampled, capsys):
    whole, half, question = tmp_path / "whole", tmp_path / "half", f"--data={folder / 'first.jsonl'}"
    expected = run(folder, whole, question)
    assert sampled == [2, 2, 2, 1] and 0 < expected["metrics"]["accuracy"] < 1
    sampled.clear()
    sampled.limit = 2
    assert "the disk fails" in refusal(capsys, folder, half, question, code=1)
    assert len(lines_of(half)) == 8 and "metrics" not in json.loads((half / "evaluation.json").read_text())
    with (half / "completions.jsonl").open("a") as file:
        file.write('{"row": 4, "sam')  # a write that was cut
    # Other settings do not continue it.
    assert "holds another evaluation" in refusal(capsys, folder, half, question, "--temperature=0.5")
    sampled.clear()
    sampled.limit = 99
    found = run(folder, half, question)
    assert sampled == [2, 1]
    assert f"{half} has the completions of 4 prompts" in capsys.readouterr().out.replace("\n", " ")
    assert (half / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    without = lambda record: {name: x for name, x in record.items() if name != "command"}
    assert without(found) == without(expected)
    sampled.clear()
    capsys.readouterr()
    assert run(folder, half, question) == found and sampled == []
    out = capsys.readouterr().out
    assert f"{half} has the completions of all 7 prompts; nothing is sampled." in out
    assert re.search(r"│ avg@2 +│ +[\d.]+ % │ +[\d.]+ to [\d.]+ % │", out)


def test_another_model_in_the_same_place_is_another_evaluation(folder, tmp_path, capsys):
    params = models.load_pretrained(folder / "b")
    models.save_pretrained(tmp_path / "model", params)
    options = [folder, tmp_path / "out", f"--data={folder / 'second.jsonl'}", f"--model={tmp_path / 'model'}"]
    run(*options)
    file = tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert "holds another evaluation" in refusal(capsys, *options)


def test_another_text_of_a_reward_is_another_evaluation(folder, tmp_path, capsys):
    file = tmp_path / "judge.py"
    file.write_text("def judge(completions, **_):\n    return [len(text) % 2 for text in completions]\n")
    question = [f"--data={folder / 'second.jsonl'}", f'--config.reward.functions=["{file}:judge"]']
    options = [folder, tmp_path / "out", *question, "--config.reward.weights=[1.0]"]
    found = run(*options)
    assert list(found["reward_files"]) == [f"{file}:judge"] and run(*options) == found
    file.write_text(file.read_text().replace("% 2", "% 3"))
    assert "holds another evaluation" in refusal(capsys, *options)


def test_adapters_are_evaluated_as_the_model_that_they_make(folder, tmp_path):
    base, adapters, merged = models.load_pretrained(folder / "a"), tmp_path / "adapters", tmp_path / "merged"
    config = dataclasses.replace(base.config, lora_rank=2, lora_alpha=8.0, lora_projections=("q", "v", "down"))
    trained, _ = lora.split(config, reference_decoder.random_params(config, scale=0.3, seed=5))
    policy = dataclasses.replace(base, config=config, params=lora.join(trained, base.params))
    models.save_adapters(adapters, policy, str(folder / "a"))
    models.save_pretrained(merged, models.load_pretrained(adapters))
    texts = {}
    for name, model in {"base": folder / "a", "adapters": adapters, "merged": merged}.items():
        run(folder, tmp_path / name / "out", f"--data={folder / 'first.jsonl'}", f"--model={model}")
        texts[name] = [line["completion"] for line in lines_of(tmp_path / name / "out")]
    assert texts["adapters"] == texts["merged"] != texts["base"]


# -- several sets ----------------------------------------------------------------------------------


def test_sets_have_their_own_samples_and_equal_evaluations_of_each(folder, tmp_path, capsys):
    sets = f"--sets={folder / 'first.jsonl'}@4,{folder / 'second.jsonl'}"
    record = run(folder, tmp_path / "both", sets)
    out = capsys.readouterr().out
    assert re.search(r"│ first +│ 7 +│ 4 +│ [\d.]+ % +│", out) and re.search(r"│ mean +│ +│ +│ [\d.]+ % +│", out)
    assert (tmp_path / "both" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    accuracies = []
    for label, samples, prompts in (("first", 4, 7), ("second", 2, 5)):
        alone = run(folder, tmp_path / label, f"--data={folder / label}.jsonl", f"--samples={samples}")
        found = record["sets"][label]
        for name in ("metrics", "intervals", "samples", "prompts", "data"):
            assert found[name] == alone[name]
        assert (found["samples"], found["prompts"]) == (samples, prompts)
        assert json.loads((tmp_path / "both" / label / "evaluation.json").read_text()) == found
        lines = lines_of(tmp_path / label)
        assert lines == lines_of(tmp_path / "both" / label) and len(lines) == samples * prompts
        accuracies.append([np.mean([x["correct"] for x in lines if x["row"] == i]) for i in range(prompts)])
        low, high = found["intervals"]["accuracy"]
        assert (low, high) == metrics.accuracy_interval(accuracies[-1]) and low < found["metrics"]["accuracy"] <= high
        assert found["intervals"].keys() == {"accuracy"} | {
            f"{x}@{k}" for x in ("pass", "maj") for k in (1, 2, 4)[:samples]
        }
    assert record["all"] == metrics.mean_over_sets(accuracies)._asdict()
    assert record["all"]["mean"] == pytest.approx(np.mean([np.mean(x) for x in accuracies]))
    # The same sets continue, with nothing left to do here. Other sets are refused.
    assert run(folder, tmp_path / "both", sets)["sets"] == record["sets"]
    other = f"--sets={folder / 'first.jsonl'}@4"
    assert "holds another evaluation" in refusal(capsys, folder, tmp_path / "both", other)


def test_sets_continue_in_the_set_in_which_they_were_ended(folder, tmp_path, sampled, capsys):
    sets = f"--sets={folder / 'second.jsonl'},{folder / 'first.jsonl'}"
    sampled.limit = 4
    assert "the disk fails" in refusal(capsys, folder, tmp_path, sets, code=1)
    assert sampled == [2, 2, 1, 2]
    sampled.clear()
    sampled.limit = 99
    record = run(folder, tmp_path, sets)
    assert sampled == [2, 2, 1] and [found["prompts"] for found in record["sets"].values()] == [5, 7]


def test_a_named_set_has_its_columns_its_prompt_and_its_verifier(folder, tmp_path, hub_cache, monkeypatch):
    row = {
        "id": 1,
        "problem": "Say 7.",
        "solution": "7",
        "answer": "\\frac{7}{1}",
        "subject": "s",
        "level": 1,
        "unique_id": "u",
    }
    commit = hub_cache("dataset", "HuggingFaceH4/MATH-500", {"test.jsonl": (json.dumps(row) + "\n").encode()})
    monkeypatch.setitem(NAMED_SETS, "math500", dataclasses.replace(NAMED_SETS["math500"], revision=commit))
    arguments = [f"--model={folder / 'a'}", "--sets=math500@3", f"--out={tmp_path}", "--max_completion_length=4"]
    assert evaluate.main([*arguments, "--config.log.progress=false"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["math500"]
    assert found["verdict"] == "math_verify" and found["rewards"] == {"math_verify": 1.0} and found["samples"] == 3
    assert found["data"]["name"] == f"hf://datasets/HuggingFaceH4/MATH-500@{commit}/test.jsonl"
    prompts = {line["prompt"] for line in lines_of(tmp_path / "math500")}
    assert prompts == {"Say 7.\nPlease reason step by step, and put your final answer within \\boxed{}."}


def test_truncated_sampling_is_wired_and_its_log_probabilities_are_those_of_what_is_left(folder, tmp_path):
    """With one token, sampling is greedy and has probability 1. Top-k 2 leaves at most two answers to a question."""
    question, found = f"--data={folder / 'first.jsonl'}", {}
    cuts = {
        "greedy": ["--temperature=0", "--samples=1"],
        "k1": ["--top_k=1"],
        "p0": ["--top-p=1e-6"],
        "k2": ["--top-k=2", "--max_completion_length=1", "--samples=16"],
        "all": ["--max_completion_length=1", "--samples=16"],
    }
    for name, more in cuts.items():
        record = run(folder, tmp_path / name, question, *more)
        found[name] = lines_of(tmp_path / name)
        assert (record["top_k"], record["top_p"]) == {"k1": (1, 1), "k2": (2, 1), "p0": (0, 1e-6)}.get(name, (0, 1))
    greedy = {line["row"]: line["completion"] for line in found["greedy"]}
    for name in ("k1", "p0"):
        assert all(line["completion"] == greedy[line["row"]] for line in found[name])
        assert all(line["logprob"] == pytest.approx(0, abs=1e-6) for line in found[name])
    drawn = {name: {line["logprob"] for line in found[name] if line["row"] == 0} for name in ("k2", "all")}
    assert len(drawn["k2"]) == 2 < len(drawn["all"]) and sum(map(math.exp, drawn["k2"])) == pytest.approx(1, abs=1e-5)


# -- comparing -------------------------------------------------------------------------------------


def test_two_models_are_compared_prompt_by_prompt(folder, tmp_path, capsys):
    question = f"--data={folder / 'first.jsonl'}"
    record = run(folder, tmp_path / "both", question, f"--against={folder / 'b'}")
    out = capsys.readouterr().out
    assert "a against b" in out and "difference" in out and "settings" not in out
    run(folder, tmp_path / "b", question, model="b")
    theirs = tmp_path / "both" / "against"
    assert (theirs / "completions.jsonl").read_bytes() == (tmp_path / "b" / "completions.jsonl").read_bytes()
    found = record["against"]
    assert found["directory"] == str(theirs) and found["differences"]["prompts"] == 7
    mine, other = (
        np.array([line["correct"] for line in lines_of(place)], float).reshape(7, 2)
        for place in (tmp_path / "both", theirs)
    )
    expected = metrics.paired_difference(mine.mean(axis=1), other.mean(axis=1))
    accuracy = found["differences"]["accuracy"]
    assert (accuracy["this"], accuracy["other"]) == (pytest.approx(mine.mean()), pytest.approx(other.mean()))
    assert (accuracy["difference"], accuracy["low"], accuracy["high"]) == expected and expected.low < expected.high
    assert found["differences"]["pass@2"]["difference"] == pytest.approx((mine.max(1) - other.max(1)).mean())
    # The differences are the same from the results of an earlier evaluation, and from the other side.
    again = run(folder, tmp_path / "both", question, f"--against={tmp_path / 'b'}")
    assert again["against"]["differences"] == found["differences"]
    turned = run(folder, tmp_path / "b", question, f"--against={tmp_path / 'both'}", model="b")["against"][
        "differences"
    ]
    assert turned["accuracy"]["difference"] == -accuracy["difference"]


def test_sets_are_compared_one_by_one_and_other_numbers_of_samples_share_what_they_can(folder, tmp_path, capsys):
    sets = f"{folder / 'first.jsonl'}@2,{folder / 'second.jsonl'}@2"
    run(folder, tmp_path / "b", f"--sets={sets}", model="b")
    record = run(folder, tmp_path / "a", f"--sets={folder / 'second.jsonl'}@4", f"--against={tmp_path / 'b'}")
    found = record["against"]["differences"]
    assert found.keys() == {"second"} and found["second"]["prompts"] == 5
    assert found["second"].keys() == {"prompts", "accuracy", "pass@1", "pass@2", "maj@1", "maj@2"}
    assert "differ in their settings: second samples 4 and 2.\n" in capsys.readouterr().out
    other = [line["correct"] for line in lines_of(tmp_path / "b" / "second")]
    assert found["second"]["accuracy"]["other"] == pytest.approx(np.mean(other))


def test_what_cannot_be_compared_is_a_sentence(folder, tmp_path, sampled, capsys):
    first, second = (f"--data={folder / name}.jsonl" for name in ("first", "second"))
    run(folder, tmp_path / "first", first)
    against = f"--against={tmp_path / 'first'}"
    assert "has other data" in refusal(capsys, folder, tmp_path / "out", second, against)
    assert "another verdict ('even', not 'some')" in refusal(
        capsys, folder, tmp_path / "out", first, against, reward="some"
    )
    sets = f"--sets={folder / 'first.jsonl'}"
    assert "has no evaluation of first" in refusal(capsys, folder, tmp_path / "out", sets, against)
    (tmp_path / "first" / "evaluation.json").write_text("[]")
    assert "is not that of an evaluation" in refusal(capsys, folder, tmp_path / "out", first, against)
    sampled.limit = len(sampled) + 1
    refusal(capsys, folder, tmp_path / "half", first, code=1)
    against = f"--against={tmp_path / 'half'}"
    assert "is not finished" in refusal(capsys, folder, tmp_path / "out", first, against)
    assert "There is no nowhere" in refusal(capsys, folder, tmp_path / "out", first, "--against=nowhere")


@pytest.mark.parametrize(
    "more, said",
    [
        (["--sets="], "expected sets such as"),
        (["--sets=aime24@0"], "config.eval.samples is 0"),
        (["--sets=aime24@2,aime24@4"], "two are called 'aime24'"),
        (["--sets=aime2@4"], "There is no data set 'aime2'"),
        (["--sets=aime24", "--data=x.jsonl"], "--sets names the data"),
        (["--sets=aime24", "--split=test"], "--sets names the data"),
        (["--sets=nothing.jsonl@3"], "nothing.jsonl"),
        (["--data=nothing.jsonl", "--top_p=0"], "eval.top_p is 0.0; it must be greater than 0"),
        (["--data=nothing.jsonl", "--top_p=1.5"], "eval.top_p is 1.5; it must be at most 1"),
        (["--data=nothing.jsonl", "--top_k=-1"], "eval.top_k is -1; it must be at least 0"),
        (["--data=nothing.jsonl", "--config.sampling.top_p=0.9"], "no field 'top_p'"),
        (["--data=nothing.jsonl", "--max_completion_length=0"], "max_completion_length is 0"),
        (["--data=nothing.jsonl", "--against=gs://bucket/run"], "gs://bucket/run"),
    ],
)
def test_wrong_flags_are_sentences(more, said, folder, tmp_path, capsys):
    assert said in refusal(capsys, folder, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
