"""The memory of a host while it writes a checkpoint: its share of the state, once as a copy and once in orbax's writer."""

from collections.abc import Sequence
import math
from typing import Any

import jax

# A copy of the arrays of the devices, and the compressed pieces that orbax holds until they are on the disk. CPUs have no copy.
COPIES = 2
_ONE_HOST = 8  # v5e and v6e: chips of the largest slice that has one host


def chips_per_host(topology: str, devices: Sequence[jax.Device]) -> int:
    """Returns the number of devices of a host of a slice such as "v5e:2x4"; `devices` may belong to several slices."""
    kind, _, shape = topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    if kind in ("v5e", "v6e") and chips <= _ONE_HOST:
        return chips  # libtpu describes hosts of four chips
    return sum(device.process_index == devices[0].process_index for device in devices)


def checkpoint_bytes(state: Any, devices: Sequence[jax.Device], per_host: int) -> float:
    """Returns the bytes that the host with most of them writes, for a tree of ShapeDtypeStructs with shardings.

    Of equal shards, the first device writes one. Hosts hold `per_host` of the devices each, in order.
    """
    host = {device: i // per_host for i, device in enumerate(sorted(devices, key=lambda d: (d.process_index, d.id)))}
    written = dict.fromkeys(host.values(), 0.0)
    for x in jax.tree.leaves(state):
        first: dict[str, Any] = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            first.setdefault(str(index), device)
        for device in first.values():
            written[host[device]] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return max(written.values())
