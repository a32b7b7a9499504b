"""Where a trace's steps lie, by the marks that a run leaves in it."""

from __future__ import annotations

from collections.abc import Sequence

from lobra_jax.trace_steps import ISSUE_MARK, PAUSE_MARK, READY_MARK
from profiling.trace.events import Event, Mark
from profiling.trace.sweep import Window


def step_windows(marks: Sequence[Mark], events: Sequence[Event]) -> tuple[Window, ...]:
    """Each whole step's time, as `Engine.finish` counts it; without marks, all the time in which anything runs.

    A step begins when the one before it is ready, or when it is issued if the host did something else in between, and
    ends when its new adapters are on every replica. A step that was done again is where it succeeded.
    """
    issued: dict[int, float] = {}
    windows: dict[int, Window] = {}
    ready_before: float | None = None
    pauses = [mark.start_ns for mark in marks if mark.name == PAUSE_MARK]
    for mark in marks:
        if mark.step is None:
            continue
        if mark.name == ISSUE_MARK:
            issued[mark.step] = mark.start_ns
        elif mark.name == READY_MARK:
            start = issued.get(mark.step)
            if start is not None:
                paused = ready_before is not None and any(ready_before <= pause <= start for pause in pauses)
                if ready_before is not None and not paused:
                    start = ready_before
                windows[mark.step] = Window(step=mark.step, start_ns=start, end_ns=mark.start_ns)
            ready_before = mark.start_ns
    whole = tuple(windows[step] for step in sorted(windows) if windows[step].length_ns > 0)
    if whole or marks:
        return whole
    return (Window(step=None, start_ns=min(e.start_ns for e in events), end_ns=max(e.end_ns for e in events)),)
