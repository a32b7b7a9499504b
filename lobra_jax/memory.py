"""Bytes that a replica's programs and arrays take of a device, by their shapes and by XLA's analysis."""

from __future__ import annotations

import math
from typing import Any

import jax

from lobra_jax.replica import Replica
from lobra_jax.schedule import BACKWARD, FORWARD, FUSED
from planner.lattice import Shape


def leaf_bytes(leaves: Any) -> int:
    """Bytes on one device of arrays with shardings, abstract or not."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves)
    )


def whole_bytes(leaves: Any) -> int:
    """Bytes of arrays, abstract or not, that are whole on a device."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def travelling_bytes(adapters: Any) -> int:
    """What gradients and new adapters of a stage on several devices take of each: both whole on their way, and the new
    ones in parts where they arrive."""
    return 2 * whole_bytes(adapters) + leaf_bytes(adapters)


def memory_bytes(replica: Replica, shape: Shape) -> int:
    """Bytes the fullest device of a replica needs at the peak of a step of such micro-batches, by XLA's analysis."""
    return max(stage_bytes(replica, shape))


def stage_bytes(replica: Replica, shape: Shape) -> list[int]:
    """Of a device of each stage.

    Weights, adapters, gradients and inputs (the arguments), outputs that alias none of them, temporaries, and the
    residuals of every micro-batch that 1F1B keeps in flight on the stage.
    """
    num_stages = replica.parallel.pp
    peaks = []
    for stage, program in enumerate(replica.training_programs(shape)):
        sizes = {name: _program_bytes(memory) for name, memory in program.memory.items()}
        if program.fused is not None:
            peaks.append(sizes[FUSED])
            continue
        in_flight = num_stages - stage
        residual_bytes = program.memory[FORWARD].output_size_in_bytes
        # The forward does not take the gradient sums as an argument, and they are there all the same.
        forward = sizes[FORWARD] + leaf_bytes(replica.layouts[stage].adapters)
        peaks.append(max(forward, sizes[BACKWARD]) + (in_flight - 1) * residual_bytes)
    return peaks


def _program_bytes(m: Any) -> int:
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
