"""The plans that an explanation compares with: made in other ways, or for more devices or memory, in a limited time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence

from planner import one_kind
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.errors import UserError
from planner.more_memory import MORE_ROOM, extra_bytes, with_more_memory, with_more_room
from planner.plan import ParallelConfig, Plan
from planner.planners import PLANNERS, solver
from planner.problem import PlanningProblem, build_problem
from planner.workload import Workload

BEST = "planned anew (exact planner)"
ONE_KIND = "one kind of replica only"

BEST_SHARE = 0.5
"""Of the time for all other plans, what the best one may take at the most."""

EXACT_SHARES, LOBRA_SHARES = 2, 1
"""Equal shares of the time left that the search for one plan may take: ours mostly need less, LobRA's planners all."""

LEAST_TIME_S = 0.7
"""What every search has at the least."""

MOST_LEFT_OUT = 4
"""So many kinds of replica, those with the most devices, are left out in turn: the others make little difference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another plan on the same batch.

    Attributes:
      change: what is done otherwise.
      plan, step_s: the plan and its seconds a step, None if there is none; `note` then says why.
      same_devices: whether it has the devices of the plan explained, in number and memory.
      cut_short: whether the time was up before the search for it ended.
    """

    change: str
    plan: Plan | None
    step_s: float | None
    note: str = ""
    same_devices: bool = True
    cut_short: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """How to come by another plan.

    Attributes:
      build: makes its problem of the plan's own, which has the time limit.
      solve: finds it.
      allows: whether a plan on the same devices, found otherwise, would do too.
      shares: so many equal shares of the time left its search may take.
      same_devices: as `Alternative` has it.
    """

    change: str
    build: Callable[[PlanningProblem], PlanningProblem]
    solve: Callable[[PlanningProblem], Plan]
    allows: Callable[[Plan], bool]
    shares: int = EXACT_SHARES
    same_devices: bool = True


def _ways(plan: Plan, problem: PlanningProblem, workload: Workload) -> list[_Way]:
    """The best plan first, LobRA's planners last: they have the time that the others leave."""
    exact, one_more = solver("exact"), problem.num_devices + 1

    def same(given: PlanningProblem) -> PlanningProblem:
        return given

    def anything(_: Plan) -> bool:
        return True

    def without(config: ParallelConfig) -> _Way:
        return _Way(
            change=f"planned without {config}",
            build=lambda given: _without(given, config),
            solve=exact,
            allows=lambda other: not any(_is_left_out(group.config, config) for group in other.replicas),
        )

    return [
        _Way(change=BEST, build=same, solve=exact, allows=anything),
        _Way(
            change=ONE_KIND,
            build=same,
            solve=one_kind.solve,
            allows=lambda other: len({group.config for group in other.replicas}) == 1,
        ),
        *map(without, left_out(plan)),
        _Way(
            change=f"one more device ({one_more})",
            build=lambda given: _rebuilt(given, workload, given.costs, one_more),
            solve=exact,
            allows=anything,
            same_devices=False,
        ),
        _Way(
            change=_more_memory_text(problem.costs),
            build=lambda given: _rebuilt(given, workload, _with_more_memory(given.costs), given.num_devices),
            solve=exact,
            allows=anything,
            same_devices=False,
        ),
        *(
            _Way(
                change=f"planner {name}",
                build=same,
                solve=solver(name),
                allows=lambda _: False,
                shares=LOBRA_SHARES,
            )
            for name in PLANNERS
            if name != "exact"
        ),
    ]


def left_out(plan: Plan) -> list[ParallelConfig]:
    """The configs of a plan that are left out in turn, those with the most devices first."""
    devices: dict[ParallelConfig, int] = {}
    for group in plan.replicas:
        devices[group.config] = devices.get(group.config, 0) + group.num_devices
    return sorted(devices, key=lambda config: -devices[config])[:MOST_LEFT_OUT]


def other_plans(
    plan: Plan,
    step_s: float,
    problem: PlanningProblem,
    workload: Workload,
    timed: Callable[[Plan, PlanningProblem], float],
    on_progress: Callable[[str], None],
) -> list[Alternative]:
    """Plans made in other ways, or with more devices or memory, timed on the same batch as the plan's `step_s` was.

    All of them have the problem's time limit together. Where a plan that was found otherwise does as well and is
    sooner done, that is taken.
    """
    found = []
    known = {_key(plan, problem): step_s}
    deadline = time.perf_counter() + problem.time_limit_s
    ways = _ways(plan, problem, workload)
    for index, way in enumerate(ways):
        on_progress(way.change)
        share = BEST_SHARE if way.change == BEST else min(1.0, way.shares / (len(ways) - index))
        limit_s = max(share * (deadline - time.perf_counter()), LEAST_TIME_S)
        try:
            changed = way.build(dataclasses.replace(problem, time_limit_s=limit_s))
            made = way.solve(changed)
        except UserError as error:
            found.append(
                Alternative(change=way.change, plan=None, step_s=None, note=str(error), same_devices=way.same_devices)
            )
            continue
        key = _key(made, changed)
        if key not in known:
            known[key] = timed(made, changed)
        found.append(
            Alternative(
                change=way.change,
                plan=made,
                step_s=known[key],
                same_devices=way.same_devices,
                cut_short=made.predicted is not None and made.predicted.status == "time limit",
            )
        )
    on_these = [(plan, step_s)] + [(a.plan, a.step_s) for a in found if a.same_devices and a.plan is not None]
    return [
        _sooner(alternative, [(other, other_s) for other, other_s in on_these if way.allows(other)])
        for way, alternative in zip(ways, found, strict=True)
    ]


def _sooner(alternative: Alternative, others: Sequence[tuple[Plan, float]]) -> Alternative:
    """The alternative with the soonest of its own plan and these; the bound that its own search proved is kept."""
    if alternative.plan is None or not others:
        return alternative
    other, other_s = min(others, key=lambda item: item[1])
    if other_s >= alternative.step_s:
        return alternative
    other = dataclasses.replace(other, num_devices=alternative.plan.num_devices, predicted=alternative.plan.predicted)
    return dataclasses.replace(alternative, plan=other, step_s=other_s)


def _key(plan: Plan, problem: PlanningProblem) -> Hashable:
    """What the time of a plan's step on the expected batch follows from: replicas with their capacities, the batch."""
    return plan.replicas, problem.buckets, problem.counts


def _more_memory_text(costs: CostTable) -> str:
    if not _tells_bytes(costs):
        return f"memory for {MORE_ROOM - 1:.0%} more tokens (the costs tell no bytes)"
    extra = extra_bytes(costs)
    unit, size = ("GiB", 1024**3) if extra >= 1024**3 else ("MiB", 1024**2)
    return f"{extra / size:.4g} {unit} more memory a device"


def _with_more_memory(costs: CostTable) -> CostTable:
    return with_more_memory(costs) if _tells_bytes(costs) else with_more_room(costs)


def _tells_bytes(costs: CostTable) -> bool:
    """Whether the devices' memory is known, and of some config what two sizes of micro-batch took of it."""
    sizes = ({point.rows * point.length for point in cost.points if point.peak_bytes} for cost in costs.configs)
    return costs.hardware.get("memory_bytes") is not None and any(len(own) > 1 for own in sizes)


def _is_left_out(config: ParallelConfig, left_out: ParallelConfig) -> bool:
    """Whether it is that one, or of several policies and of its width where that is of several policies."""
    mixed = len(left_out.remats) > 1
    return config == left_out or (mixed and config.tp == left_out.tp and len(config.remats) > 1)


def _without(problem: PlanningProblem, config: ParallelConfig) -> PlanningProblem:
    """Without a config, and if it has several policies without any other such of its width."""
    kept = tuple(usable for usable in problem.configs if not _is_left_out(usable.config, config))
    last = len(problem.buckets) - 1
    if not any(usable.fits(last) for usable in kept):
        raise UserError(f"no other config holds {problem.buckets[-1]} tokens on {problem.num_devices} devices")
    return dataclasses.replace(problem, configs=kept)


def _rebuilt(problem: PlanningProblem, workload: Workload, costs: CostTable, num_devices: int) -> PlanningProblem:
    """The problem with another cost table or number of devices, its buckets and settings the same."""
    return build_problem(
        workload,
        costs,
        num_devices,
        buckets=problem.buckets,
        row_options=problem.row_options,
        constraints=Constraints(mix_remats=any(len(usable.config.remats) > 1 for usable in problem.configs)),
        time_limit_s=problem.time_limit_s,
    )
