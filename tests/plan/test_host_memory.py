"""Tests a host's memory while it writes a checkpoint: the shards that it writes, and the peak of a real process."""

import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jaxrl_reason.plan.host_memory import checkpoint_bytes, chips_per_host, COPIES


class Device(types.SimpleNamespace):
    def __hash__(self):
        return self.id


def slice_of(count, per_process=4):
    return [Device(id=i, process_index=i // per_process) for i in range(count)]


class Sharding:
    """Splits the first axis over `ways` devices, and repeats the parts over the other devices."""

    def __init__(self, devices, ways):
        self.devices, self.ways = devices, ways

    def shard_shape(self, shape):
        return (shape[0] // self.ways, *shape[1:])

    def devices_indices_map(self, shape):
        rows = shape[0] // self.ways
        return {d: (slice(i % self.ways * rows, (i % self.ways + 1) * rows),) for i, d in enumerate(self.devices)}


@pytest.mark.parametrize(
    "topology, count, expected",
    [
        ("v5e:2x4", 8, 8),
        ("v6e:2x2", 4, 4),
        ("v5e:1x1", 1, 1),
        ("v5e:4x4", 16, 4),
        ("v5p:2x2x2", 8, 4),
        ("v5e:2x4", 16, 8),
    ],
)
def test_chips_of_a_host(topology, count, expected):
    assert chips_per_host(topology, slice_of(count)) == expected


@pytest.mark.parametrize(
    "ways, per_host, expected",
    [
        (8, 8, 4 * 32),  # one host writes all shards
        (8, 4, 4 * 16),  # each of two hosts writes a half
        (4, 4, 4 * 32),  # the second host has copies of the first one's shards
        (1, 4, 4 * 32),
    ],
)
def test_a_host_writes_each_of_its_shards_once(ways, per_host, expected):
    devices = slice_of(8)
    array = types.SimpleNamespace(shape=(8, 4), dtype=jnp.dtype("float32"), sharding=Sharding(devices, ways))
    assert checkpoint_bytes({"a": array}, devices, per_host) == expected


def test_arrays_add_up_on_real_shardings():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    state = {"a": of((3, 5), jnp.float32), "b": (of((7,), jnp.bfloat16), of((), jnp.int32))}
    assert checkpoint_bytes(state, jax.devices()[:1], 1) == 60 + 14 + 4


SAVING = """
import os, pathlib, sys, threading
import jax, jax.numpy as jnp
from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.runs import digests
from jaxrl_reason.runs.checkpoints import Checkpoints

mib = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
params = {f"w{i}": jax.random.normal(jax.random.key(i), (50 * 2**18,)) for i in range(6)}  # 50 MiB each
saver, state = Checkpoints(pathlib.Path(sys.argv[1]), 1), TrainState(jnp.int32(0), params, {}, {}, (), jnp.int32(0))
digests.of({"trained": params})  # compiles
base, peak, ended = mib(), [0.0], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], mib())
thread = threading.Thread(target=watch)
thread.start()
saver.save(1, state)
ended.set()
thread.join()
print("peak", peak[0] - base)
"""


@pytest.mark.slow
def test_a_real_checkpoint_needs_no_more(tmp_path):
    """On a CPU, the host already holds the arrays, so only one of the two copies remains."""
    done = subprocess.run([sys.executable, "-c", SAVING, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(re.search(r"peak (\S+)", done.stdout)[1])
    assert 0.5 * 300 < peak < (COPIES - 1) * 300 * 1.15
