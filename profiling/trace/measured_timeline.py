"""A step's timeline with the times at which devices worked, in place of those at which the host saw results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lobra_jax.program_names import Program, program_of
from lobra_jax.schedule import BACKWARD, FORWARD, FORWARD_SHARE, FUSED
from profiling.trace.events import Event
from profiling.trace.sweep import Window, union_ns

NS = 1e-9


def measured_timeline(
    timeline: Mapping[str, Any],
    replicas: Sequence[Mapping[str, Any]],
    by_device: Mapping[int, Sequence[Event]],
    window: Window,
) -> dict[str, Any]:
    """`timeline` (as `lobra_jax.timeline` makes it) with each stage's bars from its first device's work.

    A replica's `measured_by` says "devices", or "host" where the work on a stage does not match what was issued, so
    that the host's times are left as they are.
    """
    changed = []
    last_end_s = 0.0
    for replica, described in zip(timeline["replicas"], replicas, strict=True):
        stages = [
            _stage(bars, by_device.get(devices[0], ()), window, is_last=number == len(described["stages"]) - 1)
            for number, (bars, devices) in enumerate(zip(replica["stages"], described["stages"], strict=True))
        ]
        found = all(stage is not None for stage in stages)
        own = stages if found else replica["stages"]
        ends = [bar["end_s"] for stage in own for bar in stage]
        last_end_s = max([last_end_s, *ends])
        changed.append(
            {
                **replica,
                "stages": own,
                "measured_s": max(ends, default=0.0),
                "measured_by": "devices" if found else "host",
            }
        )
    step_s = window.length_ns * NS
    return {
        **timeline,
        "step_s": step_s,
        "sum_update_s": max(0.0, step_s - last_end_s),
        "replicas": changed,
    }


def _stage(
    bars: Sequence[Mapping[str, Any]], events: Sequence[Event], window: Window, *, is_last: bool
) -> list[dict[str, Any]] | None:
    """The stage's bars at the times of the device's work; None where the work is not what the bars say."""
    actions = list(_actions(bars, is_last))
    executions = _executions(events, window, [_program(action) for action in actions])
    if executions is None:
        return None
    out = []
    for action, (start_ns, end_ns) in zip(actions, executions, strict=True):
        start_s, end_s = ((at - window.start_ns) * NS for at in (start_ns, end_ns))
        middle_s = start_s + (end_s - start_s) * FORWARD_SHARE
        spans = [(start_s, end_s)] if len(action) == 1 else [(start_s, middle_s), (middle_s, end_s)]
        out += [{**bar, "start_s": a, "end_s": b} for bar, (a, b) in zip(action, spans, strict=True)]
    return out


def _actions(bars: Sequence[Mapping[str, Any]], is_last: bool) -> Iterator[Sequence[Mapping[str, Any]]]:
    """The bars of each program: the last stage's fused ones are drawn as a forward and a backward."""
    size = 2 if is_last else 1
    for start in range(0, len(bars), size):
        yield bars[start : start + size]


def _program(action: Sequence[Mapping[str, Any]]) -> Program:
    first = action[0]
    phase = first["phase"] if len(action) == 1 else FUSED
    return Program(phase=phase, shape=(first["rows"], first["length"]))


Run = tuple[Program | None, list[Event]]
"""Work of one program in a row on a device: of one execution, or of several where they cannot be told apart."""


def _executions(
    events: Sequence[Event], window: Window, expected: Sequence[Program]
) -> list[tuple[float, float]] | None:
    """(start, end) of each expected execution, in order; None if what ran cannot be split up like that.

    The host notes a step's end a little late, so that work of the next one lies in the window: the executions are those
    of the expected programs in the expected order that cover most of it. On CPUs executions carry numbers. On GPUs
    kernels of one program in a row are cut into as many equal parts as executions of it are expected in a row.
    """
    if not expected:
        return []
    if any(event.run_id is not None for event in events):
        runs, wanted = _numbered(events), [(program, 1) for program in expected]
    else:
        runs, wanted = _consecutive(events), _in_a_row(expected)
    programs = [program for program, _ in wanted]
    places = [
        runs[start : start + len(wanted)]
        for start in range(len(runs) - len(wanted) + 1)
        if [program for program, _ in runs[start : start + len(wanted)]] == programs
    ]
    best = max(places, key=lambda place: _covered_ns(place, window), default=[])
    if _covered_ns(best, window) == 0:
        return None
    spans: list[tuple[float, float]] = []
    for (_, own), (_, count) in zip(best, wanted, strict=True):
        size, rest = divmod(len(own), count)
        if rest:
            return None
        spans += [_span(own[start : start + size]) for start in range(0, len(own), size)]
    return spans


def _numbered(events: Sequence[Event]) -> list[Run]:
    runs: dict[tuple[str, int | None], list[Event]] = {}
    for event in events:
        if _working(event) is not None:
            runs.setdefault((str(event.module), event.run_id), []).append(event)
    return sorted(((_working(own[0]), own) for own in runs.values()), key=lambda run: _span(run[1]))


def _consecutive(events: Sequence[Event]) -> list[Run]:
    in_programs = (event for event in events if event.module is not None)
    runs = [(program, list(own)) for program, own in itertools.groupby(in_programs, key=_working)]
    return [run for run in runs if run[0] is not None]


def _working(event: Event) -> Program | None:
    """The program of a micro-batch's forward or backward that an event belongs to."""
    program = None if event.module is None else program_of(event.module)
    return program if program is not None and program.phase in (FORWARD, BACKWARD, FUSED) else None


def _in_a_row(programs: Sequence[Program]) -> list[tuple[Program, int]]:
    return [(program, len(list(same))) for program, same in itertools.groupby(programs)]


def _span(events: Sequence[Event]) -> tuple[float, float]:
    return min(event.start_ns for event in events), max(event.end_ns for event in events)


def _covered_ns(runs: Sequence[Run], window: Window) -> float:
    return union_ns([event for _, own in runs for event in own], window)
