"""A trace file as plain data: what ran on devices, and the marks by which the run says where its steps lie.

On GPUs each device is a plane whose lines are CUDA streams; lines that were derived from them are left out, or time
would count twice. Simulated CPU devices run their instructions in threads of the host's plane, each event telling its
device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lobra_jax.trace_steps import ISSUE_MARK, PAUSE_MARK, READY_MARK
from planner.errors import UserError

XPLANE_ENDING = ".xplane.pb"
SESSIONS = "plugins/profile"
"""Where below a trace folder JAX puts a folder for each trace."""

GPU_PLANE = re.compile(r"/device:GPU:(\d+)")
HOST_PLANE = "/host:CPU"
ENVIRONMENT_PLANES = ("/host:metadata", "Task Environment")
WORK_STATS = {"kernel_details", "memcpy_details", "Memset_details", "cuda_graph_exec_id"}
"""What CUPTI says of work on a device, and of no allocation, overhead or counter beside it."""

DERIVED_LINES = (
    "XLA Modules",
    "XLA Ops",
    "Async XLA Ops",
    "Steps",
    "Framework",
    "Launch Stats",
    "Source code",
    "Host Offload Ops",
    "_counters_",
)
"""First words of lines of a device that hold no work of their own."""

MARKS = (ISSUE_MARK, READY_MARK, PAUSE_MARK)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One piece of work on one device, times in nanoseconds from the trace's start.

    Attributes:
      device: its number on the host.
      name: the kernel's.
      module: the compiled program that ran it; None for work outside programs.
      hlo_op: the instruction it ran for.
      op_name: the path of JAX's primitive, as far as the trace has it.
      run_id: tells executions of one program apart, on CPUs.
    """

    device: int
    name: str
    start_ns: float
    end_ns: float
    module: str | None = None
    hlo_op: str | None = None
    op_name: str | None = None
    run_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A mark of `lobra_jax.trace_steps`; `step` is None for a pause."""

    name: str
    step: int | None
    start_ns: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What a trace file holds of interest.

    Attributes:
      platform: "gpu", or "cpu" for simulated devices.
      device_names: what the devices call themselves, by number; empty where they do not.
      unread: lines of devices with events that are no work as far as is known, and their number.
      environment: what the profiler says of itself: versions, and when it started.
    """

    file: Path
    platform: str
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]
    device_names: dict[int, str]
    unread: dict[str, int]
    environment: dict[str, str]


def find_trace(path: Path) -> Path:
    """The newest trace file of a trace folder, or the file itself.

    Raises:
      UserError: there is none, or the newest trace has several files, one for each host.
    """
    if path.is_file():
        return path
    sessions: dict[Path, list[Path]] = {}
    for file in path.rglob(f"*{XPLANE_ENDING}"):
        sessions.setdefault(file.parent, []).append(file)
    if not sessions:
        expected = f"a run of lobra train --trace, or a folder with {SESSIONS}/*/*{XPLANE_ENDING}"
        raise UserError("no trace", file=path, expected=expected)
    files = max(sessions.items(), key=lambda item: item[0].name)[1]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise UserError("traces of several hosts", file=files[0].parent, value=names, expected="one of these files")
    return files[0]


def read_trace(file: Path) -> Trace:
    """Raises UserError when the file is no trace, or of no device."""
    from jax.profiler import ProfileData

    try:
        planes = list(ProfileData.from_file(str(file)).planes)
    except Exception as error:  # whatever the profiler's reader throws
        raise UserError(f"cannot read the trace: {error}", file=file, expected=f"a whole *{XPLANE_ENDING}") from error
    events: list[Event] = []
    marks: list[Mark] = []
    names: dict[int, str] = {}
    unread: dict[str, int] = {}
    environment: dict[str, str] = {}
    host = None
    for plane in planes:
        found = GPU_PLANE.fullmatch(plane.name)
        if found is not None:
            device = int(found[1])
            if "gpu_device_name" in (stats := dict(_stats(plane))):
                names[device] = str(stats["gpu_device_name"])
            events += _gpu_events(plane, device, unread)
        elif plane.name == HOST_PLANE:
            host = plane
        elif plane.name in ENVIRONMENT_PLANES:
            environment |= {key: str(value) for key, value in _stats(plane)}
    platform = "gpu" if events or any(GPU_PLANE.fullmatch(plane.name) for plane in planes) else "cpu"
    if host is not None:
        for event in _all_events(host):
            if event.name in MARKS:
                step = dict(_stats(event)).get("step_num")
                marks.append(Mark(name=event.name, step=None if step is None else int(step), start_ns=event.start_ns))
            elif platform == "cpu":
                events += _cpu_event(event)
    if not events:
        raise UserError("the trace has no work of any device", file=file, expected="a trace of a GPU or of CPU devices")
    return Trace(
        file=file,
        platform=platform,
        events=tuple(sorted(events, key=lambda event: (event.device, event.start_ns))),
        marks=tuple(sorted(marks, key=lambda mark: mark.start_ns)),
        device_names=names,
        unread=unread,
        environment=environment,
    )


def _all_events(plane: Any) -> Iterator[Any]:
    for line in plane.lines:
        yield from line.events


def _stats(holder: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in holder.stats if key is not None)


def _gpu_events(plane: Any, device: int, unread: dict[str, int]) -> Iterator[Event]:
    for line in plane.lines:
        if line.name.startswith(DERIVED_LINES):
            continue
        for event in line.events:
            stats = dict(_stats(event))
            if not stats.keys() & WORK_STATS:
                unread[line.name] = unread.get(line.name, 0) + 1
                continue
            yield Event(
                device=device,
                name=event.name,
                start_ns=event.start_ns,
                end_ns=event.start_ns + event.duration_ns,
                module=stats.get("hlo_module"),
                hlo_op=stats.get("hlo_op"),
                op_name=stats.get("name") or stats.get("op_name"),
            )


def _cpu_event(event: Any) -> Iterator[Event]:
    stats = dict(_stats(event))
    if "hlo_op" in stats and "device_ordinal" in stats:
        yield Event(
            device=int(stats["device_ordinal"]),
            name=event.name,
            start_ns=event.start_ns,
            end_ns=event.start_ns + event.duration_ns,
            module=stats.get("hlo_module"),
            hlo_op=stats["hlo_op"],
            run_id=stats.get("run_id"),
        )
