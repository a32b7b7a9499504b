"""Measures parallel configs: capacity from compiled programs' bytes, then times, then a fit."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from lobra_jax.at_once import at_once
from lobra_jax.compilation import after_start
from planner.config_cost import ConfigCost, CostPoint
from planner.fit import fitted_cost
from planner.lattice import Shape
from planner.plan import ParallelConfig
from profiling.grid import held_out_shape
from profiling.measure import Bench, Setup, fixed_bytes, program_limit_bytes
from profiling.memory import Capacity, DoesNotFitError, find_capacity
from profiling.timing import slots, time_steps

Cost = TypeVar("Cost")

FEW_LAYERS = (2, 4)
"""Of a stage of the models from whose programs a capacity is foretold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """A config whose capacity was found: `bench` has the programs, `sizes` the bytes of each shape to be timed."""

    bench: Bench
    config: ParallelConfig
    capacity_tokens: int
    sizes: Mapping[Shape, int]


def measure_config(setup: Setup, config: ParallelConfig) -> ConfigCost:
    """Capacity, times and fit of one config, padded. Raises `DoesNotFitError` if it holds no micro-batch at all."""
    costs: list[ConfigCost] = []
    time_configs(setup, [search_capacity(setup, config)], costs.append)
    return costs[0]


def search_capacity(setup: Setup, config: ParallelConfig, *, first_device: int = 0) -> Searched:
    """Compiles what there is to time, for the devices from `first_device` on; places no weights.

    Raises `DoesNotFitError`.
    """
    bench = Bench(setup, config, copies=setup.share(config).copies, first_device=first_device)
    replica = bench.replicas[0]
    limit_bytes = program_limit_bytes(setup, replica, platform=setup.devices[0].platform)
    if fixed_bytes(replica) > limit_bytes:
        needed = fixed_bytes(replica) + setup.limit_bytes - limit_bytes
        raise DoesNotFitError(f"weights, adapters and their state need {needed:,} bytes of {setup.limit_bytes:,}")
    search = functools.partial(
        find_capacity,
        limit_bytes=limit_bytes,
        fixed_bytes=fixed_bytes(replica),
        lengths=setup.lengths,
        max_tokens=setup.max_tokens,
    )
    capacity = search(bench.bytes, expected=_expected_capacity(setup, config, search))
    sizes = {
        shape: size
        for shape, size in capacity.bytes.items()
        if size <= limit_bytes and shape[0] * shape[1] <= capacity.tokens
    }
    return Searched(bench=bench, config=config, capacity_tokens=capacity.tokens, sizes=sizes)


def _expected_capacity(setup: Setup, config: ParallelConfig, search: Callable[..., Capacity]) -> int | None:
    """The capacity that is known already, else the one that `search` finds for bytes foretold from few layers.

    None where there are few anyway, and on simulated devices, whose host has no cores to spare.

    Models of few layers compile in a fraction of the time, and bytes grow by the layer: what two and four layers
    foretell of Llama-2 7B's 32 is right to 0.6 % (profiling/results/h100_tries.json). The capacity is then confirmed on
    the model itself.
    """
    known = min(setup.expected.get(config, 0), setup.max_tokens)
    if known >= setup.lengths[0]:
        return known
    layers = -(-setup.model.num_layers // config.pp)
    if setup.cores is not None or layers <= 2 * max(FEW_LAYERS):
        return None
    few = [
        Bench(
            dataclasses.replace(setup, model=dataclasses.replace(setup.model, num_layers=n * config.pp)),
            config,
            copies=1,
        )
        for n in FEW_LAYERS
    ]

    def foretold_bytes(shapes: Sequence[Shape]) -> list[int]:
        with ThreadPoolExecutor(len(few), thread_name_prefix="few-layers") as executor:
            small, large = executor.map(lambda bench: bench.bytes(shapes), few)
        by_layer = [(y - x) / (FEW_LAYERS[1] - FEW_LAYERS[0]) for x, y in zip(small, large, strict=True)]
        return [round(y + each * (layers - FEW_LAYERS[1])) for y, each in zip(large, by_layer, strict=True)]

    try:
        return search(foretold_bytes, expected=setup.max_tokens).tokens
    except DoesNotFitError:
        return None


def time_configs(setup: Setup, found: Sequence[Searched], keep: Callable[[ConfigCost], object]) -> None:
    """Times and fits of configs on disjoint devices, all at the same time; nothing else may run or compile meanwhile.

    `keep` is called with each config's, in order; those of others are kept before a failure is raised.
    """
    for searched in found:
        searched.bench.compile(list(searched.sizes), copies=setup.share(searched.config).copies)
    together(
        [searched.bench for searched in found],
        [functools.partial(_warm_up, searched) for searched in found],
        [functools.partial(_time_config, setup, searched) for searched in found],
        keep,
    )


def together(
    benches: Sequence[Bench],
    warm_ups: Sequence[Callable[[], None]],
    timings: Sequence[Callable[[], Cost]],
    keep: Callable[[Cost], object],
) -> None:
    """Places benches on disjoint devices and runs their timings at the same time, keeping what each returns.

    As in a run, where every device works and one host issues to all. What one runs for the first time, another one's
    clock would notice: where there are several, all have run everything once before any is timed.
    """
    with ThreadPoolExecutor(max(len(benches), 1), thread_name_prefix="config") as executor:
        at_once(executor, [bench.place for bench in benches])
        if len(benches) > 1:
            at_once(executor, warm_ups)
        gc.collect()
        with after_start():
            futures = [executor.submit(timing) for timing in timings]
            wait(futures)
    for future in futures:
        if future.exception() is None:
            keep(future.result())
    for future in futures:
        future.result()


def _ascending(searched: Searched) -> list[Shape]:
    return sorted(searched.sizes, key=lambda shape: shape[0] * shape[1])


def _warm_up(searched: Searched) -> None:
    for shape in _ascending(searched):
        searched.bench.step_s(shape, 1)


def _time_config(setup: Setup, searched: Searched) -> ConfigCost:
    bench, config, sizes = searched.bench, searched.config, searched.sizes
    share = setup.share(config)
    times = {
        shape: time_steps(lambda m, shape=shape: bench.step_s(shape, m), pp=config.pp, repeats=setup.repeats)
        for shape in _ascending(searched)
    }
    seconds, fixed = slots(times, pp=config.pp)
    held_out = held_out_shape(setup.lengths, searched.capacity_tokens, sizes)
    points = [
        CostPoint(
            rows=shape[0],
            length=shape[1],
            seconds=seconds[shape] * share.factor,
            peak_bytes=sizes[shape],
            held_out=shape == held_out,
        )
        for shape in seconds
    ]
    return fitted_cost(config, searched.capacity_tokens, points, fixed_s=fixed * share.factor)
