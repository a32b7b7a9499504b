"""Measures packed micro-batches of one parallel config: their capacity, their times with short and long sequences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lobra_jax.data.batches import MicroBatchArrays, Segments
from planner.config_cost import PackedCost, PackedPoint
from planner.fit import fit_packed
from planner.lattice import Shape
from planner.packing import max_segments, max_tasks, packed_shapes
from planner.plan import ParallelConfig
from profiling.config_cost import Searched, together
from profiling.grid import align_capacity
from profiling.measure import Bench, Setup, made_up_batch, program_limit_bytes
from profiling.timing import slots, time_steps

SHRINK = 0.9
"""A capacity whose packed programs do not fit is followed by so much of it."""
MAX_TRIES = 4
"""Capacities that are tried at most; without one that fits the config has no packed times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedPacked(Searched):
    """A config whose packed capacity was found; `batches` are to be timed, by (shape, tokens of a sequence)."""

    batches: Mapping[tuple[Shape, int], MicroBatchArrays]


def measure_packed(setup: Setup, config: ParallelConfig, capacity_tokens: int) -> PackedCost | None:
    """Packed times of one config, from the capacity of its padded micro-batches downwards; None where nothing fits."""
    found = search_packed(setup, config, capacity_tokens)
    if found is None:
        return None
    costs: dict[ParallelConfig, PackedCost] = {}
    time_packed(setup, [found], costs.__setitem__)
    return costs[config]


def search_packed(
    setup: Setup, config: ParallelConfig, capacity_tokens: int, *, first_device: int = 0
) -> SearchedPacked | None:
    """Compiles what there is to time, for the devices from `first_device` on; None where nothing fits."""
    share = setup.share(config)
    bench = Bench(setup, config, copies=share.copies, packed=True, first_device=first_device)
    limit_bytes = program_limit_bytes(setup, bench.replicas[0], platform=setup.devices[0].platform)
    found = _shapes_that_fit(setup, bench, capacity_tokens, limit_bytes)
    if found is None:
        return None
    capacity, sizes = found
    bench.compile(list(sizes), copies=share.copies)
    full = max(sizes, key=lambda shape: shape[0] * shape[1])
    mixes = [(shape, _segment_length(shape[1], setup.lengths[0])) for shape in sizes]
    mixes.append((full, _segment_length(full[1], setup.lengths[-1])))
    batches = {mix: packed_batch(setup, *mix) for mix in dict.fromkeys(mixes)}
    return SearchedPacked(bench=bench, config=config, capacity_tokens=capacity, sizes=sizes, batches=batches)


def time_packed(
    setup: Setup, found: Sequence[SearchedPacked], keep: Callable[[ParallelConfig, PackedCost], object]
) -> None:
    """As `config_cost.time_configs`, of packed micro-batches."""
    together(
        [searched.bench for searched in found],
        [functools.partial(_warm_up, searched) for searched in found],
        [functools.partial(_time_packed, setup, searched) for searched in found],
        lambda timed: keep(*timed),
    )


def _warm_up(searched: SearchedPacked) -> None:
    for batch in searched.batches.values():
        searched.bench.run_s([batch])


def _time_packed(setup: Setup, searched: SearchedPacked) -> tuple[ParallelConfig, PackedCost]:
    bench, config, batches, sizes = searched.bench, searched.config, searched.batches, searched.sizes
    share = setup.share(config)
    times = {
        mix: time_steps(lambda m, batch=batch: bench.run_s([batch] * m), pp=config.pp, repeats=setup.repeats)
        for mix, batch in batches.items()
    }
    seconds, _ = slots(times, pp=config.pp)
    points = tuple(
        PackedPoint(
            rows=shape[0],
            length=shape[1],
            squares=shape[0] * sum(n**2 for n in _segments(shape[1], segment)),
            seconds=seconds[shape, segment] * share.factor,
            peak_bytes=sizes[shape],
        )
        for shape, segment in batches
    )
    cost = PackedCost(capacity_tokens=searched.capacity_tokens, coefficients=fit_packed(points), points=points)
    return config, cost


def _shapes_that_fit(
    setup: Setup, bench: Bench, capacity_tokens: int, limit_bytes: int
) -> tuple[int, dict[Shape, int]] | None:
    capacity = capacity_tokens
    for _ in range(MAX_TRIES):
        shapes = packed_shapes(capacity, min(setup.lengths[-1], capacity))
        sizes = dict(zip(shapes, bench.bytes(shapes), strict=True))
        if max(sizes.values()) <= limit_bytes:
            return capacity, sizes
        capacity = align_capacity(SHRINK * capacity)
        if capacity < setup.lengths[0]:
            break
    return None


def _segment_length(length: int, wanted: int) -> int:
    """The wanted length of sequences, or what a row's segments and its length allow."""
    return min(max(wanted, -(-length // (max_segments(length) - 1))), length)


def _segments(length: int, segment: int) -> list[int]:
    """Lengths of the sequences of a full row, equal but for the last."""
    whole, rest = divmod(length, segment)
    return [segment] * whole + ([rest] if rest else [])


def packed_batch(setup: Setup, shape: Shape, segment: int) -> MicroBatchArrays:
    """Random tokens in full rows of equal sequences, tasks in turn over the sequences of a row."""
    rows, length = shape
    padded = made_up_batch(setup, shape)
    num_slots = max_tasks(setup.num_tasks)
    counts = _segments(length, segment)
    ids = np.repeat(np.arange(len(counts)), counts)
    slots_of = (np.arange(max_segments(length)) % num_slots).astype(np.int32)

    def every_row(values: np.ndarray) -> np.ndarray:
        return np.tile(values, (rows, 1))

    return MicroBatchArrays(
        tokens=padded.tokens,
        targets=padded.targets,
        loss_weights=padded.loss_weights,
        task_ids=every_row(np.arange(num_slots, dtype=np.int32)),
        dropout_ids=np.arange(rows * len(slots_of), dtype=np.uint32).reshape(rows, -1),
        segments=Segments(
            segment_ids=every_row(ids.astype(np.int32)),
            positions=every_row(np.concatenate([np.arange(n) for n in counts]).astype(np.int32)),
            slots=every_row(slots_of),
        ),
    )
