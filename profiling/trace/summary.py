"""Sums up a trace: seconds by kernel class, replica, stage and phase, idle share of each device, top kernels.

Every number is of the traced steps' time. A device's classes add up to the time in which it was busy, its phases too,
and busy and idle to the whole; work that overlaps on a device counts once (`sweep.exclusive_ns`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lobra_jax.program_names import program_of
from lobra_jax.run_folder import TRACE_FOLDER, TRACED_RUN_FILE
from lobra_jax.schedule import FUSED
from planner.errors import UserError
from profiling.trace.events import Event, Trace, find_trace, read_trace
from profiling.trace.kernel_classes import CLASSES, TRANSFER, kernel_class
from profiling.trace.measured_timeline import measured_timeline
from profiling.trace.steps import step_windows
from profiling.trace.sweep import Window, exclusive_ns, union_ns

VERSION = 1
FUSED_FORWARD, FUSED_BACKWARD = f"{FUSED} forward", f"{FUSED} backward"
TRANSFER_PHASE = "transfer"
UNATTRIBUTED = "unattributed"
"""Phase of work that neither belongs to a program nor copies memory."""

_BACKWARD_PATH = "transpose("
"""What JAX puts into the path of a primitive that came out of differentiating."""

_NUMBER = re.compile(r"([._]\d+)+$")
"""What tells XLA's fusions of one kind apart, one or more for each layer."""

NS = 1e-9
DIGITS = 9
"""Seconds are written to the nanosecond."""


def summarise(path: Path, *, top: int) -> dict[str, Any]:
    """The summary of a run directory's trace, of a trace folder or of a trace file.

    Args:
      top: how many kinds of kernels are named, alike but for XLA's numbers.

    Raises:
      UserError: no trace, a damaged one, or one without a whole step.
    """
    folder = path / TRACE_FOLDER if (path / TRACE_FOLDER).is_dir() else path
    trace = read_trace(find_trace(folder))
    run = _traced_run(folder)
    windows = step_windows(trace.marks, trace.events)
    timelines = {timeline["step"]: timeline for timeline in run.get("timelines", ())}
    if timelines:
        windows = tuple(window for window in windows if window.step in timelines)
    if not windows:
        raise UserError("no whole step in the trace", file=trace.file, expected="a run that went on to their end")
    return {
        "version": VERSION,
        "what": "where the time of traced steps went on their devices, in seconds",
        "command": f"lobra trace {path.name}",
        **Summary(trace, run, windows).as_json(timelines, top),
    }


def _traced_run(folder: Path) -> dict[str, Any]:
    """What the run wrote beside its trace; empty for a trace of something else."""
    path = folder / TRACED_RUN_FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", file=path, expected="what lobra train --trace wrote") from error


class Summary:
    """The sums over a trace's windows.

    Args:
      trace: what ran.
      run: as `traced_run.json` has it, or empty.
      windows: the steps.
    """

    def __init__(self, trace: Trace, run: Mapping[str, Any], windows: Sequence[Window]) -> None:
        self.trace = trace
        self.run = run
        self.windows = windows
        self.window_s = sum(window.length_ns for window in windows) * NS
        self.places = {
            device: (index, stage)
            for index, replica in enumerate(run.get("replicas", ()))
            for stage, devices in enumerate(replica["stages"])
            for device in devices
        }
        by_device: dict[int, list[Event]] = {device: [] for device in self.places}
        for event in trace.events:
            by_device.setdefault(event.device, []).append(event)
        self.by_device = {
            device: own for device, own in sorted(by_device.items()) if not self.places or device in self.places
        }
        self.kernels: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.unattributed: dict[str, float] = defaultdict(float)
        for device in by_device.keys() - self.by_device.keys():
            busy_ns = sum(union_ns(by_device[device], window) for window in windows)
            if busy_ns > 0:
                self.unattributed[f"device {device}, of no replica"] = busy_ns * NS

    def as_json(self, timelines: Mapping[int, Any], top: int) -> dict[str, Any]:
        devices, stages = [], {}
        for device, events in self.by_device.items():
            row, table = self._device(device, events)
            devices.append(row)
            place = self.places.get(device)
            stages.setdefault(place, []).append(table)
        busy_s = sum(row["busy_s"] for row in devices)
        last = max(timelines, default=None)
        drawn = last if any(window.step == last for window in self.windows) else None
        return {
            "hardware": self.run.get("hardware") or self._hardware(),
            "platform": self.trace.platform,
            "versions": self.run.get("versions") or self._versions(),
            "date": self.run.get("date"),
            "model": self.run.get("model"),
            "steps": [_window_json(window, self.windows[0].start_ns) for window in self.windows],
            "window_s": _round(self.window_s),
            "devices": devices,
            "busy_s": _round(busy_s),
            "idle_share": _round(1 - busy_s / (self.window_s * len(devices))),
            "classes": {name: _round(sum(row["classes"].get(name, 0.0) for row in devices)) for name in CLASSES},
            "stages": [self._stage(place, tables) for place, tables in stages.items()],
            "top_kernels": self._top(top, busy_s),
            "unattributed": {name: _round(s) for name, s in sorted(self.unattributed.items(), key=lambda x: -x[1])},
            "unread_lines": self.trace.unread,
            "timeline": None if drawn is None else measured_timeline(
                timelines[drawn], self.run["replicas"], self.by_device, self._window(drawn)
            ),
        }  # fmt: skip

    def _window(self, step: int) -> Window:
        return next(window for window in self.windows if window.step == step)

    def _device(self, device: int, events: Sequence[Event]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """(the device's row, [phase][class] seconds)."""
        classes = [kernel_class(e.name, e.hlo_op, in_program=e.module is not None) for e in events]
        phases = [_phase(event, found) for event, found in zip(events, classes, strict=True)]
        ranks = [CLASSES.index(name) for name in classes]
        table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        hidden: dict[str, float] = defaultdict(float)
        busy_ns = 0.0
        for window in self.windows:
            busy_ns += union_ns(events, window)
            for event, found, phase, own_ns in zip(
                events, classes, phases, exclusive_ns(events, ranks, window), strict=True
            ):
                if event.start_ns >= window.end_ns or event.end_ns <= window.start_ns:
                    continue
                inside_ns = min(event.end_ns, window.end_ns) - max(event.start_ns, window.start_ns)
                table[phase][found] += own_ns * NS
                hidden[found] += (inside_ns - own_ns) * NS
                self._count(event, found, phase, own_ns * NS, begins=event.start_ns >= window.start_ns)
        sums = {name: sum(own.get(name, 0.0) for own in table.values()) for name in CLASSES}
        row = {
            "device": device,
            **self._place(device),
            "busy_s": _round(busy_ns * NS),
            "idle_s": _round(self.window_s - busy_ns * NS),
            "idle_share": _round(1 - busy_ns * NS / self.window_s),
            "classes": {name: _round(s) for name, s in sums.items() if s > 0},
            "overlapped": {name: _round(s) for name, s in hidden.items() if s > 0},
            "phases": {phase: _round(sum(own.values())) for phase, own in table.items()},
        }
        return row, table

    def _count(self, event: Event, found: str, phase: str, own_s: float, *, begins: bool) -> None:
        kernel = self.kernels.setdefault(
            (_NUMBER.sub("", event.name), found, phase), {"seconds": 0.0, "count": 0, "names": set()}
        )
        kernel["seconds"] += own_s
        kernel["count"] += begins
        kernel["names"].add(event.name)
        if phase == UNATTRIBUTED:
            self.unattributed[event.name] += own_s

    def _place(self, device: int) -> dict[str, Any]:
        place = self.places.get(device)
        if place is None:
            return {"replica": None, "stage": None, "config": None}
        return {"replica": place[0], "stage": place[1], "config": self.run["replicas"][place[0]]["config"]}

    def _stage(self, place: tuple[int, int] | None, tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict:
        """A stage's device-seconds, [phase][class], summed over its devices."""
        phases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for table in tables:
            for phase, own in table.items():
                for name, seconds in own.items():
                    phases[phase][name] += seconds
        return {
            "replica": None if place is None else place[0],
            "stage": None if place is None else place[1],
            "config": None if place is None else self.run["replicas"][place[0]]["config"],
            "num_devices": len(tables),
            "phases": {
                phase: {name: _round(own[name]) for name in CLASSES if own.get(name, 0.0) > 0}
                for phase, own in phases.items()
            },
        }

    def _top(self, count: int, busy_s: float) -> list[dict[str, Any]]:
        ranked = sorted(self.kernels.items(), key=lambda item: -item[1]["seconds"])
        return [
            {
                "name": name,
                "class": found,
                "phase": phase,
                "names": len(kernel["names"]),
                "count": kernel["count"],
                "seconds": _round(kernel["seconds"]),
                "share": _round(kernel["seconds"] / busy_s),
            }
            for (name, found, phase), kernel in ranked[:count]
        ]

    def _hardware(self) -> str:
        names = set(self.trace.device_names.values()) or {self.trace.platform}
        return f"{len(self.by_device)} x {', '.join(sorted(names))}"

    def _versions(self) -> dict[str, str]:
        found = {key.removesuffix("_version"): value for key, value in self.trace.environment.items()}
        return {name: found[name] for name in ("jax", "jaxlib") if name in found}


def _phase(event: Event, found: str) -> str:
    """What the program is for, or its name; of a fused one which half, where the trace tells."""
    if event.module is None:
        return TRANSFER_PHASE if found == TRANSFER else UNATTRIBUTED
    program = program_of(event.module)
    if program is None:
        return event.module
    if program.phase != FUSED or not event.op_name:
        return program.phase
    return FUSED_BACKWARD if _BACKWARD_PATH in event.op_name else FUSED_FORWARD


def _window_json(window: Window, origin_ns: float) -> dict[str, Any]:
    start, end = (_round((at - origin_ns) * NS) for at in (window.start_ns, window.end_ns))
    return {"step": window.step, "start_s": start, "end_s": end}


def _round(value: float) -> float:
    return round(value, DIGITS)
