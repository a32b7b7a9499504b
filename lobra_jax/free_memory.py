"""What devices have free now, and whether that is room for a replica's programs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lobra_jax.devices import HEAP_BYTES
from lobra_jax.memory import leaf_bytes, stage_bytes
from lobra_jax.out_of_memory import blaming
from lobra_jax.replica import Replica
from planner.lattice import Shape
from planner.plan import ReplicaGroup

ROW_BYTES = 1 << 20
"""Room is asked for in rows of so many bytes: a single dimension is at most 2^31 long."""


def shapes_in_use(replica: Replica, group: ReplicaGroup) -> list[Shape]:
    """Those compiled that the capacities of the replica's group in the plan still allow."""
    return [(rows, length) for rows, length in replica.training_shapes if rows * length <= group.capacity_of(length)]


def has_room(
    replica: Replica,
    shapes: Collection[Shape],
    *,
    beside: Mapping[Any, int],
    limit_bytes: int | None = None,
) -> bool:
    """Whether every device of a replica has room for a step of such micro-batches beside all that it holds now.

    Args:
      shapes: of the micro-batches, compiled; the replica's gradient sums are there already.
      beside: bytes by device of what there has to be room for as well.
      limit_bytes: what may be used of a device; None for all that it offers.

    Returns:
      True also where devices do not tell what they hold, as CPUs do not.
    """
    stages = [list(stage.mesh.devices.flat) for stage in replica.submesh.stages]
    free = [min(free_bytes(d, limit_bytes) - beside.get(d, 0) for d in devices) for devices in stages]
    if math.inf in free or not shapes:
        return True
    peaks = zip(*(stage_bytes(replica, shape) for shape in shapes), strict=True)
    held = [leaf_bytes(layout.params) + 2 * leaf_bytes(layout.adapters) for layout in replica.layouts]
    return all(max(own) - there <= room for own, there, room in zip(peaks, held, free, strict=True))


def check_room(replica: Replica, shapes: Collection[Shape]) -> None:
    """Asks for what each stage's largest program of these shapes needs for a while, on all its devices at once.

    Where one of several devices has no room for a program, the others wait for it in their first collective, and that
    forever: it has to be known before. Bytes in use do not tell it, as they may lie in pieces.

    Raises:
      OutOfMemoryError: some device of a stage on several does not have that much, in pieces as large as programs'.
    """
    for stage, sharding in enumerate(replica.submesh.stages):
        mesh = sharding.mesh
        if mesh.size == 1 or not shapes or math.inf in map(free_bytes, mesh.devices.flat):
            continue
        largest, shape = max((_temporary_bytes(replica, shape, stage), shape) for shape in shapes)
        piece = max(HEAP_BYTES, *(_largest_array_bytes(replica, own) for own in shapes))
        with blaming(replica.index, shape):
            jax.block_until_ready(on_each_device(mesh, largest, piece_bytes=piece))


def on_each_device(mesh: Mesh, num_bytes: int, *, piece_bytes: int) -> list[Array]:
    """At least so many bytes on each device of a mesh, in pieces.

    Each device makes its own: `jnp.zeros(device=...)` makes all on the default device first.
    """
    sizes = [min(piece_bytes, num_bytes - start) for start in range(0, num_bytes, piece_bytes)]
    return [_on_each_device(mesh, -(-size // ROW_BYTES))() for size in sizes]


@functools.cache
def _on_each_device(mesh: Mesh, num_rows: int) -> Callable[[], Array]:
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.jit(lambda: jnp.zeros((mesh.size * num_rows, ROW_BYTES), jnp.uint8), out_shardings=each)


def _largest_array_bytes(replica: Replica, shape: Shape) -> int:
    """A device's part of what the widest linear makes of a micro-batch."""
    model, layout = replica.model, replica.layouts[0]
    widest = max(fan_out for _, fan_out in model.target_shapes.values())
    return math.prod(shape) * widest * jnp.dtype(layout.dtype).itemsize // replica.parallel.tp


def _temporary_bytes(replica: Replica, shape: Shape, stage: int) -> int:
    return max(m.temp_size_in_bytes for m in replica.training_programs(shape)[stage].memory.values())


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """What the arrays of a tree take of each device."""
    total: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return total


def free_bytes(device: Any, limit_bytes: int | None = None) -> float:
    """What `limit_bytes` and the device leave beside what it holds now; infinite where it does not tell."""
    stats = device.memory_stats()
    if stats is None:
        return math.inf
    offered = stats["bytes_limit"]
    return (offered if limit_bytes is None else min(offered, limit_bytes)) - stats["bytes_in_use"]
