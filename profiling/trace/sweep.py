"""Splits overlapping work so that no instant counts twice."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Sequence

from profiling.trace.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """A step's time; `step` is None where a trace has no marks of steps. Nanoseconds from the trace's start."""

    step: int | None
    start_ns: float
    end_ns: float

    @property
    def length_ns(self) -> float:
        return self.end_ns - self.start_ns


def union_ns(events: Iterable[Event], window: Window) -> float:
    """Nanoseconds of the window in which any of the events runs."""
    spans = sorted(
        (max(event.start_ns, window.start_ns), min(event.end_ns, window.end_ns))
        for event in events
        if event.start_ns < window.end_ns and event.end_ns > window.start_ns
    )
    total, reached = 0.0, window.start_ns
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def exclusive_ns(events: Sequence[Event], ranks: Sequence[int], window: Window) -> list[float]:
    """Nanoseconds of each event within the window that are its own; they add up to `union_ns`.

    Where several events run at once the time is that of the lowest rank, and among those of the latest start, which is
    the innermost of nested ones.
    """
    own = [0.0] * len(events)
    inside = [i for i, e in enumerate(events) if e.start_ns < window.end_ns and e.end_ns > window.start_ns]
    inside.sort(key=lambda i: events[i].start_ns)
    bounds = {window.start_ns, window.end_ns}
    for i in inside:
        bounds |= {max(events[i].start_ns, window.start_ns), min(events[i].end_ns, window.end_ns)}
    times = sorted(bounds)
    running: list[tuple[int, float, int]] = []
    following = 0
    for start, end in itertools.pairwise(times):
        while following < len(inside) and events[inside[following]].start_ns <= start:
            i = inside[following]
            heapq.heappush(running, (ranks[i], -events[i].start_ns, i))
            following += 1
        while running and events[running[0][2]].end_ns <= start:
            heapq.heappop(running)
        if running:
            own[running[0][2]] += end - start
    return own
