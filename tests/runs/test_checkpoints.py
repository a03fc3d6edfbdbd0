"""Checkpoints are complete or absent, and damage is recognised."""

import gc
import logging
import os
import resource
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import runs
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.runs import checkpoints, digests

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # the callbacks of the reader cause it
)


def checkpoint_names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def a_state():
    """Returns a state whose weights fill a file of their own. They are large and too random to be compressed."""
    weights = {"large": jax.random.normal(jax.random.key(0), (200, 200)), "small": jnp.ones(3, jnp.bfloat16)}
    return TrainState(jnp.int32(1), weights, {}, ({"mu": jnp.zeros(3)},), (), jnp.int32(1))


def flipped(content):
    """Returns the content with one wrong bit in the middle."""
    content = bytearray(content)
    content[len(content) // 2] ^= 1
    return bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a state as checkpoints 1 and 2, and its weights in start/."""
    directory, state = tmp_path_factory.mktemp("saved"), a_state()
    saver = checkpoints.Checkpoints(directory / "checkpoints", keep=2)
    for number in (1, 2):
        saver.save(number, state)
    saver.close()
    checkpoints.save_params(directory / "start", state.params)
    return directory


def damaged_copies(saved, part, folder):
    """Yields (a copy, its damage) for each file under `part` and each kind of damage."""
    files = sorted(path.relative_to(saved) for path in (saved / part).rglob("*") if path.is_file())
    assert len(files) > 8
    for file in files:
        for how, damage in DAMAGES.items():
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(saved, copy)
            damage(copy / file)
            yield copy, f"{file} {how}"


@pytest.mark.runs
def test_damage_of_any_file_is_noticed_or_harmless(saved, tmp_path, caplog):
    state, skipped = a_state(), set()
    for directory, what in damaged_copies(saved, "checkpoints/2", tmp_path):
        caplog.clear()
        saver = checkpoints.Checkpoints(directory / "checkpoints", keep=2)
        number, found = saver.restore(state)
        saver.close()
        chex.assert_trees_all_equal(found, state, custom_message=what)
        told = [record for record in caplog.records if record.name == checkpoints.__name__]
        assert bool(told) == (number == 1), what
        skipped |= {what} if number == 1 else set()
    largest = max((saved / "checkpoints/2").rglob("d/*"), key=lambda path: path.stat().st_size)
    assert {f"{largest.relative_to(saved)} {how}" for how in DAMAGES} <= skipped and len(skipped) > 12
    gc.collect()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_data_file_is_one_sentence(how, saved, tmp_path, caplog):
    state = a_state()
    shutil.copytree(saved, tmp_path / "run")
    for part in ("checkpoints/2", "start"):
        DAMAGES[how](max((tmp_path / "run" / part).rglob("d/*"), key=lambda path: path.stat().st_size))
    with caplog.at_level(logging.WARNING):
        number, params = runs.load_weights(
            tmp_path / "run",
            None,
            state.params,
            ModelConfig(vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8),
        )
    assert number == 1 and f"{tmp_path / 'run/checkpoints/2'} cannot be read: " in caplog.text
    chex.assert_trees_all_equal(params, state.params)
    with pytest.raises(checkpoints.CheckpointError, match="^The weights .*start cannot be read: ") as fault:
        checkpoints.load_params(tmp_path / "run" / "start", state.params)
    if how == "flipped":
        assert str(fault.value).endswith("params.large differs from the saved array: its file is damaged.")
        assert "trained.large differs from the saved array" in caplog.text
    gc.collect()


def test_other_shapes_and_other_weights_are_named(saved):
    read = lambda **weights: checkpoints.load_params(saved / "start", a_state().params | weights)
    with pytest.raises(checkpoints.CheckpointError, match=r"params.small is \(3,\) there and \(4,\) here"):
        read(small=jnp.ones(4))
    with pytest.raises(checkpoints.CheckpointError, match="params.more is missing there"):
        read(more=jnp.ones(4))
    with pytest.raises(checkpoints.CheckpointError, match=r"params.small is \(3,\) there and missing here"):
        checkpoints.load_params(saved / "start", {"large": a_state().params["large"]})


def test_weights_have_the_requested_dtypes(saved):
    like = {"large": jnp.zeros((200, 200), jnp.bfloat16), "small": jnp.zeros(3)}
    found = checkpoints.load_params(saved / "start", like)
    chex.assert_trees_all_equal_dtypes(found, like)
    chex.assert_trees_all_equal(found["large"], a_state().params["large"].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "file",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("_METADATA", "_sharding", "manifest.ocdbt")),
        "array_metadatas/process_0",
    ],
)
def test_a_wrong_bit_in_a_description_costs_one_checkpoint_at_most(file, saved, tmp_path):
    state, rng = a_state(), np.random.default_rng(0)
    path, numbers = tmp_path / "checkpoints" / "2" / "default" / file, []
    for _ in range(12):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        number, parts, faults = checkpoints.read_newest(tmp_path / "checkpoints", [2, 1], state._asdict())
        chex.assert_trees_all_equal(parts, state._asdict())
        assert (number == 1) == bool(faults)
        numbers.append(number)
    assert 1 in numbers or file.startswith("array_metadatas")


LEFT_BEHIND = """
import gc, pathlib, sys, time
import jax
from jaxrl_reason.runs import checkpoints
folder = pathlib.Path(sys.argv[1])
weights = {f"w{i}": jax.random.normal(jax.random.key(i), (100, 100)) for i in range(9)}
checkpoints.save_params(folder / "7" / "default", weights)
*_, largest = sorted(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])  # half of the arrays can be read
before = len(jax.live_arrays())
number, _, faults = checkpoints.read_newest(folder, [7], {"params": weights})
for _ in range(300):  # orbax may still be reading
    gc.collect()
    if len(jax.live_arrays()) == before:
        break
    time.sleep(0.1)
print(number, len(jax.live_arrays()) - before, len(faults))
"""


def test_an_unreadable_checkpoint_leaves_no_arrays_and_prints_nothing(tmp_path):
    """Orbax reads several arrays at once, and does not wait for all of them after an error."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LEFT_BEHIND, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "None 0 1\n" and done.stderr == "", done.stdout + done.stderr


def in_python(x):
    """Computes the digest element by element, from its definition."""

    def mixed(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    bits = np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}").ravel().tolist()
    return sum(mixed(b ^ mixed(i)) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_the_digest_depends_on_bits_and_indices(dtype):
    x = 100 * jax.random.normal(jax.random.key(1), (4, 3, 5))
    x = x > 0 if dtype == "bool" else x.astype(dtype)
    digest = jax.jit(digests.digest)
    assert int(digest(x)) == in_python(x) != int(digest(x[::-1]))
    assert int(digest(x[0, 0, 0])) == in_python(x[0, 0, 0])


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from jaxrl_reason.runs import digests
from jaxrl_reason.models import sharding
x = jax.random.normal(jax.random.key(1), (8, 3, 16))
mesh = sharding.make_mesh(2, 2, 2)
for spec in (jax.P(), jax.P("fsdp"), jax.P(("data", "tensor"), None, "fsdp")):
    tree = {"x": jax.device_put(x, jax.NamedSharding(mesh, spec))}
    print(*digests.of({"params": tree})["params"])
"""


@pytest.mark.processes
def test_the_digest_is_the_same_on_every_mesh():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 3 * [str(in_python(jax.random.normal(jax.random.key(1), (8, 3, 16))))]


def test_a_full_disk_is_a_sentence_and_costs_no_checkpoint(tmp_path):
    """No file may grow beyond 20 kB while the second checkpoint is written."""
    large = jax.random.normal(jax.random.key(0), (200, 200))
    state = TrainState(jnp.int32(1), {"weights": large}, {}, (), (), jnp.int32(1))
    saver = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=1)
    saver.save(1, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(checkpoints.CheckpointError, match="^Checkpoint .*checkpoints/2 cannot be written: "):
            saver.save(2, state)
        with pytest.raises(checkpoints.CheckpointError, match="^The weights .*start cannot be written: "):
            checkpoints.save_params(tmp_path / "start", state.params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "1" in checkpoint_names(tmp_path) and "2" not in checkpoint_names(tmp_path)
    again = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=1)
    assert again.restore(state)[0] == 1
    again.save(2, state)
    assert checkpoint_names(tmp_path) == ["2"]
    gc.collect()


def saved_three_times(directory):
    """Saves checkpoints 1, 2 and 3 of one state, keeps two of them, and returns the state."""
    state = TrainState(jnp.int32(1), {"weights": jnp.ones(3)}, {}, (), (), jnp.int32(1))
    saver = checkpoints.Checkpoints(directory, keep=2)
    for number in (1, 2, 3):
        saver.save(number, state)
    saver.close()
    return state


def test_a_kill_during_a_removal_leaves_nothing_to_offer_and_the_next_run_removes_it(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path):
        next(path.rglob("_METADATA")).unlink()  # the first of its files
        raise Killed

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        saved_three_times(tmp_path / "checkpoints")
    assert runs.checkpoint_numbers(tmp_path) == [3, 2] and checkpoint_names(tmp_path) == ["2", "3", "removed"]
    monkeypatch.setattr(shutil, "rmtree", remove)
    checkpoints.Checkpoints(tmp_path / "checkpoints", keep=2).close()
    assert checkpoint_names(tmp_path) == ["2", "3"]


@pytest.mark.parametrize("part", ["default", "default/_METADATA", "default/manifest.ocdbt", "default/d"])
def test_what_earlier_kills_have_left_is_removed_at_the_start_of_a_run(part, tmp_path):
    directory = tmp_path / "checkpoints"
    state = saved_three_times(directory)
    shutil.copytree(directory / "2", directory / "1")  # an earlier version removed a part of it
    shutil.rmtree(directory / "1" / part) if (directory / "1" / part).is_dir() else (directory / "1" / part).unlink()
    shutil.copytree(directory / "2", directory / "4.orbax-checkpoint-tmp")
    (directory / "damaged-7").mkdir()
    saver = checkpoints.Checkpoints(directory, keep=2)
    assert checkpoint_names(tmp_path) == ["2", "3", "damaged-7"]
    assert saver.restore(state)[0] == 3
    saver.save(4, state)
    saver.close()
    assert checkpoint_names(tmp_path) == ["3", "4", "damaged-7"]


@pytest.mark.parametrize("content", [b"null", b"[" * 100_000])
def test_a_checkpoint_with_invalid_metadata_does_not_hide_the_others(content, tmp_path):
    state = TrainState(jnp.int32(1), {"weights": jnp.ones(3)}, {}, (), (), jnp.int32(1))
    saver = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=2)
    for number in (1, 2):
        saver.save(number, state)
    saver.close()
    for file in (tmp_path / "checkpoints" / "2").rglob("_METADATA"):
        file.write_bytes(content)
    saver = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=2)
    assert saver.restore(state)[0] == 1
    assert checkpoint_names(tmp_path) == ["1", "damaged-2"]


def test_an_empty_checkpoint_does_not_hide_the_others(tmp_path):
    state = TrainState(jnp.int32(1), {"weights": jnp.ones(3)}, {}, (), (), jnp.int32(1))
    saver = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=2)
    for number in (1, 2):
        saver.save(number, state)
    saver.close()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "default")
    saver = checkpoints.Checkpoints(tmp_path / "checkpoints", keep=2)
    assert saver.restore(state)[0] == 1
    assert checkpoint_names(tmp_path) == ["1", "damaged-2"]
