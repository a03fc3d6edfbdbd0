"""Runs that are killed, or whose disk is full or read-only, continue without a difference.

tests/chaos.py kills runs many times.
"""

import functools
import json
import pathlib
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import chaos
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.runs.metrics_file import MetricsWriter, read_metrics, SampleTable

pytestmark = pytest.mark.runs

# -- the comparison of two runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Writes the files of a finished run: two checkpoints, weights, metrics, samples and events."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    saver = checkpoints.Checkpoints(folder / "checkpoints", keep=2)
    for number in (4, 5):
        weights = {"a": jnp.arange(3.0) + number, "b": jnp.ones((2, 2), jnp.bfloat16)}
        saver.save(number, TrainState(jnp.int32(number), weights, {}, (), (), jnp.int32(number)))
    saver.close()
    checkpoints.save_params(folder / "start", {"a": jnp.arange(3.0)})
    with MetricsWriter(folder) as metrics, SampleTable(folder) as samples:
        for step in range(3):
            metrics.write(step, {"reward": step / 3, "perf/step_seconds": time.perf_counter()})
        one = np.ones((1, 1))
        samples.write(
            2, ["p"], [["c"]], rewards={"r": one}, total=one, advantages=one, lengths=one, truncated=one
        )  # fmt: skip
    write_json(folder / "self_reward.json", {"c_ref": -0.1})
    return folder


def other_weights(folder):
    """Changes the last bit of one weight of checkpoint 5."""
    shutil.rmtree(folder / "checkpoints")
    saver = checkpoints.Checkpoints(folder / "checkpoints", keep=2)
    for number in (4, 5):
        weights = jnp.arange(3.0) + number
        weights = weights.at[1].set(jnp.nextafter(weights[1], 9)) if number == 5 else weights
        weights = {"a": weights, "b": jnp.ones((2, 2), jnp.bfloat16)}
        saver.save(number, TrainState(jnp.int32(number), weights, {}, (), (), jnp.int32(number)))
    saver.close()


def edited(name, old, new, folder):
    path = folder / name
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def events_forgotten(folder):
    (path,) = (folder / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage, told",
    [
        (
            other_weights,
            ["checkpoints/5/default:['digests']['trained'] differs", "checkpoints/5/default:['trained']['a'] differs"],
        ),
        (lambda folder: shutil.rmtree(folder / "checkpoints" / "5"), ["checkpoints/5/default:['step'] is missing"]),
        (
            lambda folder: shutil.rmtree(folder / "start"),
            ["start:['digests']['params'] is missing", "start:['params']['a'] is missing"],
        ),
        (
            functools.partial(edited, "metrics.jsonl", b"0.3333333333333333", b"0.3333333333333334"),
            ["metrics.jsonl differs in line 2 of 3 and 3: reward 0.3333333333333333 != 0.3333333333333334"],
        ),
        (functools.partial(edited, "metrics.jsonl", b'{"step": 2', b'{"step": 1, "step": 2'), []),
        (functools.partial(edited, "samples.jsonl", b'"c"', b'"d"'), ["samples.jsonl differs in entry 1"]),
        (functools.partial(edited, "self_reward.json", b"-0.1", b"-0.10"), ["self_reward.json differs"]),
        (lambda folder: (folder / ".config.json.tmp").write_text("{"), [".config.json.tmp was left behind"]),
        (lambda folder: (folder / "checkpoints" / "6").mkdir(), ["checkpoints/6/ was left behind"]),
        (lambda folder: shutil.copytree(folder / "checkpoints" / "4", folder / "checkpoints" / "3"), []),
        (events_forgotten, ["tensorboard differs"]),
        (lambda folder: None, []),
    ],
    ids="weights checkpoint start metric same sample json scratch torn surplus events nothing".split(),
)
def test_everything_in_which_two_runs_differ_is_told(damage, told, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    found = chaos.differences(finished, tmp_path / "run")
    assert bool(found) == bool(told) and all(any(t in f for f in found) for t in told), found


# -- writing ---------------------------------------------------------------------------------------


def test_events_are_written_when_the_line_is_and_without_a_thread(tmp_path):
    threads = threading.active_count()
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"reward": step + 0.5, "perf/seconds": 1.0, "kl": np.nan})
            # The writer is neither flushed nor closed, as after a kill.
            expected = {"reward": {i: i + 0.5 for i in range(step + 1)}}
            assert chaos.scalars_of(tmp_path / "tensorboard") == expected
        assert threading.active_count() == threads
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {"reward": 9.0})
    assert chaos.scalars_of(tmp_path / "tensorboard") == {"reward": {0: 0.5, 1: 9.0}}


@pytest.mark.parametrize("limit", range(2000, 2100, 9))
def test_a_line_for_which_there_is_half_the_room_is_a_sentence_and_no_torn_line_later(limit, tmp_path):
    """No file may grow beyond the limit: the system then takes the part of a write that fits, without an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, written = tmp_path / "metrics.jsonl", 0
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                OSError, match=rf"^{path} cannot be written: File too large\. Once it can, give the same command again"
            ):
                for written in range(1000):
                    writer.write(written, {"reward": 0.123456789})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # The error is about the line that is cut.
    assert len(path.read_bytes()) == limit and path.read_bytes().count(b"\n") == written
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=written - 2) as writer:
        writer.write(written - 1, {"reward": 0.5})
    assert [line["step"] for line in map(json.loads, path.read_bytes().splitlines())] == list(range(written))


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shared_programs):
    """Returns a function that runs a configuration of chaos undisturbed, and returns the case and its seconds."""
    folder = tmp_path_factory.mktemp("chaos")
    compiled = pathlib.Path(shared_programs["jax_compilation_cache_dir"])

    @functools.cache
    def run(name, **changes):
        case = chaos.prepare(name, folder, compiled, **changes)
        return case, chaos.run_straight(case)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", chaos.CONFIGS)
def test_a_run_killed_at_random_ends_bit_for_bit_as_one_never_killed(name, straight):
    case, seconds = straight(name)
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, done = random.Random(seed), 0
    while done < 3:
        killed, found = chaos.kill_until_through(case, seconds, rng, 3 - done, print)
        assert not found, found
        done += killed


@pytest.mark.slow
def test_sigterm_while_the_reward_model_is_trained_saves_it_first(straight):
    """SIGTERM ends the command with code 143. The same command then makes the model of an undisturbed training."""
    case, _ = straight("hero")
    begun, run = case.folder / "alone", case.folder / "ended"
    command = lambda workdir: [
        *(sys.executable, "-m", "jaxrl_reason.reward_training", f"--config={case.folder / 'recipe.py'}"),
        *(f"--workdir={workdir}", "--config.reward_model.steps=400", "--config.checkpoint.every=1000"),
    ]
    call = functools.partial(subprocess.Popen, env=chaos.environment(case), stdout=-1, stderr=-1, text=True)
    whole = call(command(begun))
    assert whole.communicate(timeout=200) and whole.returncode == 0
    process, metrics = call(command(run)), run / "reward_model" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    done = read_metrics(metrics)[-1]["step"]
    assert process.returncode == 143 and done < 400, err
    assert err.strip().endswith(
        f"Asked to end, and saved after step {done} of the reward model: the same command continues from there."
    )
    again = call(command(run))
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0 and f"checkpoints/{done}" in out, err
    assert not chaos.differences(begun / "reward_model", run / "reward_model")


def in_a_mount(case, options, script):
    """Runs a shell script with a new file system at the folder of the killed run. Returns stdout and stderr."""
    shutil.rmtree(case.killed, ignore_errors=True)
    case.killed.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(case.killed))}"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("This machine lets nobody mount a small file system (unshare --map-root-user --mount).")
    result = subprocess.run(
        [*alone, f"{mount} && {script}"], env=chaos.environment(case), capture_output=True, text=True, timeout=400
    )
    return result.stdout, result.stderr


# The disk is full at the tokenizer, the supervised metrics, a first and a second checkpoint, and one of the last files.
@pytest.mark.slow
@pytest.mark.parametrize("kilobytes, code", [(8, 2), (20, 1), (150, 1), (400, 1), (632, 1)])
def test_a_full_disk_ends_a_run_in_a_sentence_and_with_room_it_goes_on(kilobytes, code, straight):
    case, _ = straight("grpo")
    command, after = shlex.join(chaos.command(case, case.killed)), case.folder / "after"
    shutil.rmtree(after, ignore_errors=True)
    out, err = in_a_mount(
        case,
        f"size={kilobytes}k",
        f"{{ {command}; echo ended with $?; mount -o remount,size=100m {case.killed}; "
        f"echo again >&2; {command} && cp -a {case.killed} {after}; }}",
    )
    first, _, _ = err.partition("again\n")
    assert f"ended with {code}\n" in out, out + err
    lines = first.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and f"{case.killed}/" in lines[0], first
    assert "cannot be written: " in lines[0] and "Traceback" not in err
    assert chaos.differences(case.straight, after) == []


@pytest.mark.slow
def test_a_read_only_disk_is_a_sentence_and_the_run_goes_on_when_it_is_writable(straight):
    """The disk is read-only at the start, and again after step 4, which has an evaluation in any case."""
    case, _ = straight("grpo")
    command, after = shlex.join(chaos.command(case, case.killed)), case.folder / "after"
    shutil.rmtree(after, ignore_errors=True)
    mode = lambda mode: f"mount -o remount,{mode} {case.killed}"
    out, err = in_a_mount(
        case,
        "size=100m",
        f"{{ {mode('ro')}; {command}; echo first $?; {mode('rw')}; {command} --config.steps=4 >/dev/null; {mode('ro')}; "
        f"{command}; echo second $?; {mode('rw')}; {command} && cp -a {case.killed} {after}; }}",
    )
    assert "first 2\n" in out and "second 2\n" in out, out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(f"{case.killed}/run.lock cannot be written: Read-only" in e for e in errors), err
    assert "Traceback" not in err and chaos.differences(case.straight, after) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "tensorboard", "self_reward.json", "learning_curve"]
)
def test_whatever_cannot_be_written_is_named(name, straight):
    """A full device, a folder or a text file takes the place of the file or folder that the run writes."""
    case, _ = straight("laser")
    shutil.rmtree(case.killed, ignore_errors=True)
    case.killed.mkdir()
    path = case.killed / {"self_reward.json": ".self_reward.json.tmp", "learning_curve": "learning_curve.tmp"}.get(
        name, name
    )
    if path.suffix == ".tmp":
        path.symlink_to("/dev/full")
    elif path.suffix == ".jsonl":
        path.mkdir()
    else:
        path.write_text("no folder")
    (process,) = chaos.start(case, case.killed)
    code = process.wait(timeout=200)
    said = chaos.said(case)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "Traceback" not in said, said[-3000:]
    assert str(case.killed / name) in errors[0] and "cannot be written: " in errors[0]
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert chaos.go_through(case, case.killed) and chaos.differences(case.straight, case.killed) == []
