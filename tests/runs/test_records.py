"""Sample tables have completions as they were sampled."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import data
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs.metrics_file import SampleTable
from jaxrl_reason.runs.records import write_samples

TOKENIZER = data.train_tokenizer([], vocab_size=259)
TOKENIZER.backend.add_special_tokens(["<think>", "</think>"])


def padded(texts):
    """Returns tokens and mask, padded on the right."""
    rows = [TOKENIZER.encode(text) for text in texts]
    width = max(map(len, rows))
    tokens = np.array([row + [TOKENIZER.pad_id] * (width - len(row)) for row in rows])
    return tokens, np.array([[i < len(row) for i in range(width)] for row in rows])


def written(directory, rollout, numbers, count, skip_special=False, verdict=""):
    """Writes `count` prompts of a step, whose rewards and advantages are `numbers`, to samples.jsonl; returns its lines."""
    batch = SimpleNamespace(
        rollout=jax.tree.map(jnp.asarray, rollout), advantages=jnp.asarray(numbers), mask=jnp.asarray(rollout.mask)
    )
    step = SimpleNamespace(batch=batch, groups=SimpleNamespace(rewards={"r": jnp.asarray(numbers)}))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with SampleTable(directory) as table:
        write_samples(table, 1, step, count, TOKENIZER, {"r": 1.0}, here, skip_special, verdict)
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "skip_special, prompt, completions",
    [
        (False, "<bos>2 + 3 =", ["<think>23</think>5", "<bos>6"]),
        (True, "2 + 3 =", ["235", "6"]),
    ],
)
def test_a_table_shows_special_tokens_but_no_end(skip_special, prompt, completions, tmp_path):
    prompts, tokens = padded(["<bos>2 + 3 ="]), padded(["<think>23</think>5<eos>", "<bos>6"])
    tokens = [x[None] for x in tokens]
    numbers = np.array([[0.0, 1.0]], np.float32)
    logprobs = -np.arange(tokens[0].size, dtype=np.float32).reshape(tokens[0].shape) / 8
    rollout = Rollout(*prompts, *tokens, logprobs, np.array([[False, True]]))
    lines = written(tmp_path, rollout, numbers, 1, skip_special, "r")
    assert [line["prompt"] for line in lines] == [prompt] * 2
    assert [line["completion"] for line in lines] == completions
    assert [line["correct"] for line in lines] == [False, True]
    shown = ["", "", ""] if skip_special else ["<think>", "</think>", "<bos>"]
    assert lines[0]["tokens"] == [shown[0], "2", "3", shown[1], "5", ""]  # the end token has no text
    assert lines[0]["logprobs"] == [0.0, -0.125, -0.25, -0.375, -0.5, -0.625]
    assert lines[1]["tokens"] == [shown[2], "6"] and lines[1]["logprobs"] == [-0.75, -0.875]


@pytest.mark.parametrize("filled", [[], [1, 3]])
def test_places_that_were_not_filled_are_no_samples(filled, tmp_path):
    prompts, tokens = padded(["1", "2", "3", "4"]), padded([*"abcd"])
    mask = tokens[1][:, None] & np.isin(np.arange(4), filled)[:, None, None]
    numbers = np.arange(4.0)[:, None]
    rollout = Rollout(*prompts, tokens[0][:, None], mask, np.zeros(mask.shape), np.zeros((4, 1), bool))
    lines = written(tmp_path, rollout, numbers, 2)
    assert [(line["prompt"], line["completion"], line["total"]) for line in lines] == [
        (str(i + 1), "abcd"[i], float(i)) for i in filled
    ]


def test_the_prompt_of_a_row_of_numbers_shows_its_features(tmp_path):
    prompts, tokens = padded(["1", "1"]), padded(["a", "b"])
    features = np.array([[0.5, -1.23456], [0.5, 2.0]], np.float32)
    numbers, mask = np.zeros((2, 1), np.float32), tokens[1][:, None]
    rollout = Rollout(*prompts, tokens[0][:, None], mask, np.zeros(mask.shape), np.zeros((2, 1), bool), features)
    lines = written(tmp_path, rollout, numbers, 2)
    assert [line["prompt"] for line in lines] == ["(features 0.5, -1.235)", "(features 0.5, 2)"]


def test_without_a_verdict_nothing_is_correct(tmp_path):
    rewards = np.zeros((1, 1))
    with SampleTable(tmp_path) as table:
        table.write(
            1,
            ["p"],
            [["c"]],
            rewards={"r": rewards},
            total=rewards,
            advantages=rewards,
            lengths=rewards,
            truncated=rewards,
        )
    assert not {"correct", "tokens", "logprobs"} & json.loads((tmp_path / "samples.jsonl").read_text()).keys()
