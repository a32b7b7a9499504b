"""Times a plan's own micro-batches, of which a cost table otherwise knows what is fitted to a few other shapes.

What is fitted is smooth in rows and length. Real micro-batches are not: matmuls of 16,192 tokens fill a GPU's
multiprocessors less evenly than those of 16,384, and one may run up to a tenth longer than is foretold, another not
(profiling/results/h200_x4_experiment_mixed.json).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from planner.config_cost import ShapeTime
from planner.cost import CostTable
from planner.lattice import Shape
from planner.plan import ParallelConfig, Plan
from profiling.config_cost import together
from profiling.measure import Bench, Setup
from profiling.rounds import rounds_of
from profiling.timing import slot_s, time_steps

Timed = tuple[ParallelConfig, tuple[ShapeTime, ...]]


def wanted_shapes(plan: Plan) -> dict[ParallelConfig, tuple[Shape, ...]]:
    """The (rows, length) that the plan's replicas may be asked to run, by the config of the policy that runs them."""
    wanted: dict[ParallelConfig, set[Shape]] = {}
    for group in plan.replicas:
        for shape in group.shapes(plan.buckets, num_options=plan.row_options):
            wanted.setdefault(group.config.with_remat(group.remat_of(shape[1])), set()).add(shape)
    return {config: tuple(sorted(shapes, key=lambda s: (s[0] * s[1], s))) for config, shapes in wanted.items()}


def time_shapes(
    setup: Setup,
    wanted: Mapping[ParallelConfig, Sequence[Shape]],
    costs: CostTable,
    on_config: Callable[[ParallelConfig], object] = lambda _: None,
) -> dict[ParallelConfig, tuple[ShapeTime, ...]]:
    """Slot seconds of the shapes of each config, as many configs side by side as there are devices for.

    What a step costs besides, `fixed_s` of `costs`, is left out of them. `on_config` is told of each config done.

    More rows of a length are never told to take less: a smaller micro-batch could as well be run as the larger.
    """
    found: dict[ParallelConfig, tuple[ShapeTime, ...]] = {}

    def keep(timed: Timed) -> None:
        config, found[config] = timed
        on_config(config)

    for placed in rounds_of(setup, list(wanted)):
        benches = [
            Bench(setup, config, copies=setup.share(config).copies, first_device=first) for config, first in placed
        ]
        for (config, _), bench in zip(placed, benches, strict=True):
            bench.compile(wanted[config], copies=setup.share(config).copies)
        together(
            benches,
            [functools.partial(_run_once, b, wanted[c]) for (c, _), b in zip(placed, benches, strict=True)],
            [
                functools.partial(_time, setup, c, b, wanted[c], costs[c].fixed_s)
                for (c, _), b in zip(placed, benches, strict=True)
            ],
            keep,
        )
    return found


def refined(costs: CostTable, plan: Plan, times: Mapping[ParallelConfig, tuple[ShapeTime, ...]]) -> CostTable:
    """The table with these times in place of all that it had of a plan's micro-batches; it says whose they are."""
    configs = tuple(dataclasses.replace(cost, timed=times.get(cost.config, ())) for cost in costs.configs)
    provenance = {**costs.provenance, "timed_plan": str(plan)}
    return dataclasses.replace(costs, configs=configs, provenance=provenance)


def _run_once(bench: Bench, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        bench.step_s(shape, 1)


def _time(setup: Setup, config: ParallelConfig, bench: Bench, shapes: Sequence[Shape], fixed_s: float) -> Timed:
    factor = setup.share(config).factor
    seconds: dict[Shape, float] = {}
    for shape in shapes:
        times = time_steps(lambda m, shape=shape: bench.step_s(shape, m), pp=config.pp, repeats=setup.repeats)
        seconds[shape] = slot_s(times, pp=config.pp, fixed_s=fixed_s / factor)
    longest: dict[int, float] = {}
    out = []
    for rows, length in sorted(seconds):
        longest[length] = max(seconds[rows, length] * factor, longest.get(length, 0.0))
        out.append(ShapeTime(rows=rows, length=length, seconds=longest[length]))
    return config, tuple(out)
