"""An XLA profiler trace of some steps of a run, the marks by which `lobra trace` finds the steps in it, and beside it
what a trace does not know: which devices are which replica's stage, and what the cost model predicted.

Marks and annotations take a few microseconds each while nothing is traced, so they are always made.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lobra_jax.host import host_cores
from lobra_jax.replica import Replica
from lobra_jax.run_folder import TRACE_FOLDER, TRACED_RUN_FILE
from lobra_jax.trace_steps import TracedSteps
from planner.files import write_whole

LIBRARIES = ("jax", "jaxlib")


def describe(replicas: Sequence[Replica]) -> dict[str, Any]:
    """Hardware, versions, date, and for each replica the devices of its stages as a trace numbers them."""
    first = replicas[0].submesh.devices[0]
    hardware = f"{sum(len(r.submesh.devices) for r in replicas)} x {first.device_kind}"
    return {
        "hardware": f"{hardware} (host cores: {host_cores()})" if first.platform == "cpu" else hardware,
        "platform": first.platform,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "date": datetime.date.today().isoformat(),
        "model": replicas[0].model.name,
        "replicas": [
            {
                "name": str(replica),
                "config": str(replica.parallel),
                "stages": [list(map(_ordinal, stage.mesh.devices.flat)) for stage in replica.submesh.stages],
            }
            for replica in replicas
        ],
    }


def _ordinal(device: Any) -> int:
    """The number by which this host's driver and profiler know a device."""
    return device.id if device.local_hardware_id is None else device.local_hardware_id


def _start(folder: Path) -> None:
    options = jax.profiler.ProfileOptions()
    # Every Python call would otherwise become an event, and issuing a step slower.
    options.python_tracer_level = 0
    # Ten times the rest of the trace, and nothing that `lobra trace` reads.
    options.enable_hlo_proto = False
    folder.mkdir(parents=True, exist_ok=True)
    jax.profiler.start_trace(str(folder), profiler_options=options)


def _stop(folder: Path, replicas: Sequence[Replica], timelines: Iterable[dict[str, Any]]) -> None:
    try:
        text = json.dumps({**describe(replicas), "timelines": [*timelines]}) + "\n"
        write_whole(folder / TRACED_RUN_FILE, text)
    finally:
        jax.profiler.stop_trace()


@contextlib.contextmanager
def traced(folder: Path, replicas: Sequence[Replica]) -> Iterator[None]:
    """Traces what is done inside into `folder`."""
    _start(folder)
    try:
        yield
    finally:
        _stop(folder, replicas, ())


class StepTracer:
    """Traces some steps of a run into RUN/trace; a context manager that stops a trace which is still going on.

    The trace starts before the first of the steps is issued, while the step before it still runs, and ends after the
    last has been recorded, when the next has been issued: so no traced step runs otherwise than it does untraced. One
    that follows may wait while the profiler writes.

    Args:
      run: the run directory.
      steps: which; None for none.
      replicas: whose steps.
      say: receives lines for the user.
    """

    def __init__(
        self, run: Path, steps: TracedSteps | None, replicas: Sequence[Replica], say: Callable[[str], None]
    ) -> None:
        self.folder = run / TRACE_FOLDER
        self.steps = steps
        self.replicas = replicas
        self.say = say
        self._timelines: dict[int, dict[str, Any]] = {}
        self._is_on = False

    def __enter__(self) -> StepTracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._is_on:
            self._stop()
        elif self.steps is not None:
            self.say(f"no step was traced: the run ended before step {self.steps.first}")

    def before_issue(self, step: int) -> None:
        """Call it with the number of a step, the first being 1, that is issued next."""
        if self.steps is not None and not self._is_on and step in self.steps:
            _start(self.folder)
            self._is_on = True

    def wants(self, step: int) -> bool:
        """Whether `after_record` wants this step's timeline."""
        return self._is_on and self.steps is not None and step in self.steps

    def after_record(self, step: int, timeline: dict[str, Any]) -> None:
        """Call it when a step that is wanted has been recorded."""
        assert self.steps is not None
        self._timelines[step] = timeline
        if step == self.steps.last:
            self._stop()

    def _stop(self) -> None:
        self._is_on, self.steps = False, None
        _stop(self.folder, self.replicas, self._timelines.values())
        numbers = ", ".join(map(str, self._timelines)) or "none that was finished"
        self.say(f"traced steps: {numbers}; read them by lobra trace {self.folder.parent}")
