"""metrics.jsonl, samples.jsonl and TensorBoard have complete lines after a kill, and no line twice after a resume."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxrl_reason.runs import results
from jaxrl_reason.runs.metrics_file import HELD_OUT_ACCURACY, HeldOutTable, MetricsWriter, read_metrics, SampleTable


def events(directory):
    """Returns the events under a directory in order.

    A record is 8 bytes of length, 4 bytes of checksum, data, 4 bytes of checksum.
    """
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(directory):
    return [(event.step, value.tag, value.simple_value) for event in events(directory) for value in event.summary.value]


def test_one_line_per_step_and_equal_events(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(0, {"reward": 0.5, "eval/pass@4": np.float32(0.25), "tokens": 7, "kl": math.nan})
        writer.write(1, {"reward": jnp.float32(1.5), "kl": -math.inf, "flag": np.True_})
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "reward": 0.5, "eval/pass@4": 0.25, "tokens": 7, "kl": None},
        {"step": 1, "reward": 1.5, "kl": None, "flag": 1.0},
    ]
    written = [
        (step, value) for step, tag, value in scalars(tmp_path / "new" / "run" / "tensorboard") if tag == "reward"
    ]
    assert written == [(0, 0.5), (1, 1.5)]
    assert "kl" not in {tag for _, tag, _ in scalars(tmp_path / "new" / "run" / "tensorboard")}


def test_without_tensorboard(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"reward": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "metrics, message",
    [
        ({"step": 1.0}, "named .step"),
        ({"a": "1.0"}, "'a' is '1.0'"),
        ({"a": np.ones(2)}, "'a' is array"),
        ({"a": None}, "'a' is None"),
    ],
)
def test_a_value_that_is_not_a_metric_is_refused(tmp_path, metrics, message):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(0, {"fine": 1.0} | metrics)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"step": 3, "rew', b'{"step": 3}', b"\0\0\0", b"\xff", b"3", b'{"step": 3}\n']
)
@pytest.mark.parametrize("resume_step, kept", [(None, [0, 1, 2]), (5, [0, 1, 2]), (1, [0, 1]), (0, [0]), (-1, [])])
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path, torn, resume_step, kept):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(3):
            writer.write(step, {"reward": step / 3})
    path.write_bytes(path.read_bytes() + torn)
    kept = kept + [3] if b"}" in torn and resume_step in (None, 5) else kept
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=resume_step) as writer:
        assert [record["step"] for record in read_metrics(path)] == kept
        writer.write(9, {"reward": 0.1})
    assert [record["step"] for record in read_metrics(path)] == [*kept, 9]
    assert all(record["reward"] == record["step"] / 3 for record in read_metrics(path) if record["step"] < 3)
    assert path.read_bytes().endswith(b"\n") and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_tells_tensorboard(tmp_path):
    for resume_step in (None, 3):
        with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
            writer.write(4, {"reward": 1.0})
    starts = [event.step for event in events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [4]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match="Line 2 of .*metrics.jsonl is not a JSON object with a step"):
        read_metrics(path)
    with pytest.raises(ValueError, match="Line 2"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    assert path.read_text().count("\n") == 3
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "none.jsonl")


def test_a_killed_run_leaves_whole_lines(tmp_path):
    """After SIGKILL in the middle of a write, only the last line may be incomplete, and no written line is lost."""
    script = textwrap.dedent(
        """
        import sys
        from jaxrl_reason.runs.metrics_file import MetricsWriter
        writer = MetricsWriter(sys.argv[1], tensorboard=False)
        step = 0
        while True:
            writer.write(step, {"reward": 0.1, **{f"padding/{i}": i / 3 for i in range(50)}})
            print(step, flush=True)
            step += 1
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    announced = [int(process.stdout.readline()) for _ in range(200)]
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    announced += [int(line) for line in process.communicate()[0].split("\n")[:-1]]
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and len(steps) >= len(announced)


def sample_arrays(shape, **overrides):
    ones = np.ones(shape, np.float32)
    return (
        dict(rewards={"accuracy": ones}, total=ones, advantages=ones, lengths=ones.astype(int), truncated=ones > 2)
        | overrides
    )


def test_samples(tmp_path):
    arrays = dict(
        rewards={"accuracy": np.array([[1, np.nan]], np.float32), "format": np.array([[0.5, 0]], np.float32)},
        total=jnp.array([[1.5, 0.0]]), advantages=np.array([[0.75, -0.75]]), lengths=np.array([[3, 8]]), truncated=np.array([[False, True]]),
    )  # fmt: skip
    with SampleTable(tmp_path) as table:
        table.write(4, ["1 + 1?"], [["#### 2", "naïve\n\u2028\ud800"]], **arrays)
        table.write(5, ["a", "b"], [["x"], ["y"]], **sample_arrays((2, 1)))
    records = read_metrics(tmp_path / "samples.jsonl")
    assert records[:2] == [
        {"step": 4, "prompt": "1 + 1?", "completion": "#### 2", "rewards": {"accuracy": 1.0, "format": 0.5}, "total": 1.5, "advantage": 0.75, "length": 3, "truncated": False},
        {"step": 4, "prompt": "1 + 1?", "completion": "naïve\n\u2028\ud800", "rewards": {"accuracy": None, "format": 0.0}, "total": 0.0, "advantage": -0.75, "length": 8, "truncated": True},
    ]  # fmt: skip
    assert [(record["step"], record["prompt"], record["completion"]) for record in records[2:]] == [
        (5, "a", "x"),
        (5, "b", "y"),
    ]
    with SampleTable(tmp_path, resume_step=4) as table:
        assert read_metrics(tmp_path / "samples.jsonl") == records[:2]
        with pytest.raises(ValueError, match=r"advantages has shape \(1, 1, 5\); for 1 prompts x 1 completions"):
            table.write(5, ["a"], [["x"]], **sample_arrays((1, 1), advantages=np.ones((1, 1, 5))))


def test_accuracies_of_held_out_prompts(tmp_path):
    file = tmp_path / HELD_OUT_ACCURACY
    with HeldOutTable(tmp_path, 0) as table:
        for step in (0, 2, 4):
            table.write(step, iter([{"row": 0}]), np.array([1 / 3, step / 4]))
        table.write(4, iter([{"row": 0}]))  # predicted numbers are not correct or incorrect
    assert read_metrics(file)[1:] == [
        {"step": 2, "accuracy": [0.333333, 0.5]},
        {"step": 4, "accuracy": [0.333333, 1.0]},
    ]
    with HeldOutTable(tmp_path, 0, resume_step=2) as table:
        table.write(3, iter([]), [1.0])
    assert [(line["step"], line["accuracy"][-1]) for line in read_metrics(file)] == [(0, 0.0), (2, 0.5), (3, 1.0)]
    assert results.accuracies(tmp_path, 3) == [1.0] and results.accuracies(tmp_path, 4) == []
    assert results.accuracies(tmp_path / "elsewhere", 3) == []


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(categories=None), max_size=50))  # including lone surrogates and control characters
def test_any_text_is_read_back(text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("samples")
    with SampleTable(directory) as table:
        table.write(0, [text], [[text, "next"]], **sample_arrays((1, 2)))
    assert [record["completion"] for record in read_metrics(directory / "samples.jsonl")] == [text, "next"]
