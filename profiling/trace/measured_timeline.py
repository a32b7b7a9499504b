"""A step's timeline with the times at which devices worked, in place of those at which the host saw results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lobra_jax.program_names import Program, program_of
from lobra_jax.schedule import BACKWARD, FORWARD, FUSED
from lobra_jax.timeline import FORWARD_SHARE
from profiling.trace.events import Event
from profiling.trace.sweep import Window

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


def _executions(
    events: Sequence[Event], window: Window, expected: Sequence[Program]
) -> list[tuple[float, float]] | None:
    """(start, end) of each expected execution, in order; None if what ran cannot be split up like that.

    On CPUs executions carry numbers. On GPUs kernels of one program that follow each other are cut into as many equal
    parts as executions of it are expected in a row.
    """
    work = [
        (event, program)
        for event in events
        if event.module is not None and window.start_ns <= event.start_ns < window.end_ns
        for program in [program_of(event.module)]
        if program is not None and program.phase in (FORWARD, BACKWARD, FUSED)
    ]
    if any(event.run_id is not None for event, _ in work):
        by_run: dict[Any, list[tuple[Event, Program]]] = {}
        for event, program in work:
            by_run.setdefault((event.module, event.run_id), []).append((event, program))
        groups = sorted(by_run.values(), key=lambda group: min(event.start_ns for event, _ in group))
        return _spans(groups, expected)
    groups, at = [], 0
    for program, count in _in_a_row(expected):
        end = at
        while end < len(work) and work[end][1] == program:
            end += 1
        size, rest = divmod(end - at, count)
        if size == 0 or rest:
            return None
        groups += [work[start : start + size] for start in range(at, end, size)]
        at = end
    return _spans(groups, expected) if at == len(work) else None


def _in_a_row(programs: Sequence[Program]) -> list[tuple[Program, int]]:
    runs: list[tuple[Program, int]] = []
    for program in programs:
        if runs and runs[-1][0] == program:
            runs[-1] = (program, runs[-1][1] + 1)
        else:
            runs.append((program, 1))
    return runs


def _spans(
    groups: Sequence[Sequence[tuple[Event, Program]]], expected: Sequence[Program]
) -> list[tuple[float, float]] | None:
    if [group[0][1] for group in groups] != list(expected):
        return None
    return [(min(e.start_ns for e, _ in group), max(e.end_ns for e, _ in group)) for group in groups]
