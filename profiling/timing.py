"""From stopwatch readings to the cost model's numbers: a slot's seconds and what a step costs on top.

A step of m equal micro-batches on a pipeline of pp stages takes

    T(m) = fixed + sum of the stages' slots + (m - 1) x the slowest stage's slot

so the difference of two T gives the slowest slot, whatever the stages' balance.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

MANY = 3
"""Micro-batches of the longer of the two timed steps."""
QUICK_RUN_S = 0.05
MANY_OF_QUICK = 12
"""As `MANY` for micro-batches quicker than `QUICK_RUN_S`, whose difference would drown in noise."""
SLOW_RUN_S = 0.25
"""Without a pipeline, one micro-batch this slow tells its slot alone: what a step costs besides is noise to it."""
SHAPE_BUDGET_S = 1.5
"""No further repeat of a shape is begun after this, where there are two that agree."""
AGREEMENT = 0.03
"""Readings agree if two of them are no further apart: one alone may have had the host look away for half a second."""
TO_BE_SURE = 3
"""Readings of which the median is taken even where no two agree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Median seconds, of two the fewer, of a step of one and of `many` micro-batches of one shape.

    `many_s` is None where not timed.
    """

    one_s: float
    many: int = 1
    many_s: float | None = None


def time_steps(run: Callable[[int], float], *, pp: int, repeats: int) -> StepTimes:
    """Times a shape; `run(m)` runs one step of m micro-batches and returns its seconds.

    The first run is not counted (buffers are allocated). There are fewer repeats where they take long. Unless
    one is asked for, two that agree are waited for, of three at most.
    """
    run(1)
    ones = [run(1)]
    many = MANY_OF_QUICK if ones[0] < QUICK_RUN_S else MANY
    manys = [] if pp == 1 and ones[0] >= SLOW_RUN_S else [run(many)]
    while _wants_another(ones, manys, repeats):
        ones.append(run(1))
        if manys:
            manys.append(run(many))
    if not manys:
        return StepTimes(one_s=statistics.median_low(ones))
    return StepTimes(one_s=statistics.median_low(ones), many=many, many_s=statistics.median_low(manys))


def _wants_another(ones: Sequence[float], manys: Sequence[float], repeats: int) -> bool:
    if len(ones) < repeats and sum(ones) + sum(manys) < SHAPE_BUDGET_S:
        return True
    is_unsure = not _agree(ones) or (len(manys) > 0 and not _agree(manys))
    return repeats > 1 and is_unsure and len(ones) < TO_BE_SURE


def _agree(readings: Sequence[float]) -> bool:
    return any(y <= (1 + AGREEMENT) * x for x, y in itertools.pairwise(sorted(readings)))


def slot_s(times: StepTimes, *, pp: int, fixed_s: float = 0.0) -> float:
    """Seconds of the slowest stage's slot; without a second reading, T(1) less the known fixed time, over pp.

    Never more than a whole step's share, and where noise hides the difference, the longer step's mean slot.
    """
    if times.many_s is None:
        return max(times.one_s - fixed_s, times.one_s / 2) / pp
    slope = (times.many_s - times.one_s) / (times.many - 1)
    if slope <= 0:
        return times.many_s / (times.many + pp - 1)
    return min(slope, times.many_s / times.many)


def fixed_s(times: Sequence[StepTimes], *, pp: int) -> float:
    """Seconds a step costs besides its slots: from the quickest shape, where they weigh most; 0 if never seen."""
    both = [t for t in times if t.many_s is not None]
    if not both:
        return 0.0
    quickest = min(both, key=lambda t: t.one_s)
    return max(quickest.one_s - pp * slot_s(quickest, pp=pp), 0.0)


def slots(times: Mapping[tuple[int, int], StepTimes], *, pp: int) -> tuple[dict[tuple[int, int], float], float]:
    """(slot seconds by shape, fixed seconds) of one config."""
    fixed = fixed_s(list(times.values()), pp=pp)
    return {shape: slot_s(t, pp=pp, fixed_s=fixed) for shape, t in times.items()}, fixed
