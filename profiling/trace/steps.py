"""Where a trace's steps lie, by the marks that a run leaves in it and by the devices' work."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from lobra_jax.program_names import UPDATE, program_of
from lobra_jax.trace_steps import ISSUE_MARK, PAUSE_MARK
from profiling.trace.events import Event, Mark
from profiling.trace.sweep import Window


def step_windows(marks: Sequence[Mark], events: Sequence[Event]) -> tuple[Window, ...]:
    """Each whole step's time; without marks, all the time in which anything runs.

    A step begins when the one before it is ready, or when it is issued if the host did something else in between, and
    ends when it is ready itself, as in `Engine.finish`. The host notes that its new adapters are on every replica, and
    notes it late where it is busy: ready is when the devices finished the last program of the update before that. A
    step that was done again is where it succeeded.
    """
    updates = _update_ends(events)
    issued: dict[int, float] = {}
    windows: dict[int, Window] = {}
    noted_before, ready_before = float("-inf"), None
    pauses = [mark.start_ns for mark in marks if mark.name == PAUSE_MARK]
    for mark in marks:
        if mark.step is None:
            continue
        if mark.name == ISSUE_MARK:
            issued[mark.step] = mark.start_ns
            continue
        ready = _last_between(updates, noted_before, mark.start_ns)
        start = issued.get(mark.step)
        if start is not None:
            if ready_before is not None and not any(ready_before <= pause <= start for pause in pauses):
                start = ready_before
            windows[mark.step] = Window(step=mark.step, start_ns=start, end_ns=ready)
        noted_before, ready_before = mark.start_ns, ready
    whole = tuple(windows[step] for step in sorted(windows) if windows[step].length_ns > 0)
    if whole or marks:
        return whole
    return (Window(step=None, start_ns=min(e.start_ns for e in events), end_ns=max(e.end_ns for e in events)),)


def _update_ends(events: Sequence[Event]) -> list[float]:
    """When programs of the update ended, ascending."""
    is_update = {
        module: (program := program_of(module)) is not None and program.phase == UPDATE
        for module in {event.module for event in events if event.module is not None}
    }
    return sorted(event.end_ns for event in events if event.module is not None and is_update[event.module])


def _last_between(ends: Sequence[float], after: float, until: float) -> float:
    """The last of the ascending `ends` after the one time and not after the other, which it is if there is none."""
    at = bisect.bisect_right(ends, until) - 1
    return ends[at] if at >= 0 and ends[at] > after else until
