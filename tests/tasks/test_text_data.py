"""Tests runs on common data: CSV files, conversations, rows without an answer, and a PEFT directory as model."""

import dataclasses
import json

import pytest

from helpers import reference_decoder
from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import data, models, train
from jaxrl_reason.config import Data, Model, Reward
from jaxrl_reason.rewards.host import RewardError

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

CHAT = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}<|assistant|>"
JUDGE = """
def judge(prompts, completions, question=None, tests=None, **_):
    assert all(isinstance(text, str) for text in prompts), prompts
    if tests is not None:
        assert tests == [[{"in": [1], "out": "x"}]] * len(tests), tests
    return [float(len(text) % 3) for text in completions]
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return Reward(functions=[f"{tmp_path / 'judge.py'}:judge"], workers=1)


def last_reward(directory):
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["reward"]


def test_a_csv_file_trains(tmp_path):
    path = tmp_path / "rows.CSV"
    path.write_text("question,answer\n" + "".join(f"Write {i}.,{i}\n" for i in range(20)))
    train.train(train.setup(tiny(path), tmp_path / "run"))
    assert last_reward(tmp_path / "run") >= 0


def test_conversations_with_structured_columns_and_no_answer_train(tmp_path, judge):
    turns = lambda i: [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": f"Write {i}."},
    ]
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": turns(i), "tests": [{"in": [1], "out": "x"}]} for i in range(20)]
    )
    tokenizer = data.train_tokenizer(["Be brief. Hi Hello. Write 1."], 300)
    dataclasses.replace(tokenizer, chat_template=CHAT).save(tmp_path / "tokenizer")
    settings = Data(
        train=str(path), train_split="all", eval_split="all", tokenizer=str(tmp_path / "tokenizer"), chat=True
    )
    train.train(train.setup(tiny(path, data=settings, reward=judge, max_prompt_length=128), tmp_path / "run"))
    assert last_reward(tmp_path / "run") >= 0


def test_a_reward_that_needs_an_answer_says_so_before_the_run(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": f"Write {i}."} for i in range(20)])
    with pytest.raises(RewardError, match="Reward 'accuracy' cannot be called: .*'answer'.*--config.data.columns"):
        train.setup(tiny(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_on_a_model_train(tmp_path, judge):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": f"Write {i}."} for i in range(20)])
    tokenizer = data.train_tokenizer(["Write 1."], 300)
    config = models.ModelConfig(vocab_size=300, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24)
    base = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    models.save_pretrained(tmp_path / "base", base)
    config = dataclasses.replace(config, lora_rank=2)
    policy = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    models.save_adapters(tmp_path / "adapters", policy, str(tmp_path / "base"))
    config = tiny(path, model=Model(path=str(tmp_path / "adapters")), reward=judge)
    train.train(train.setup(config, tmp_path / "run"))
    assert last_reward(tmp_path / "run") >= 0
