"""`lobra profile --estimate`: a cost table of devices that are not there, in the format of measured ones."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cost import CostTable
from planner.errors import UserError
from profiling.device_specs import DeviceSpec, Efficiency, device_spec
from profiling.grid import default_max_tokens
from profiling.table import Header, Progress

if TYPE_CHECKING:
    from rich.console import Console

    from lobra_jax.config import RunConfig
    from profiling.measure import Setup

DEFAULT_NUM_DEVICES = 8
"""Devices of a host, where the config names no number."""


def run_estimate(
    config: RunConfig, out: Path, console: Console, *, device: str, num_devices: int | None, **options: Any
) -> CostTable:
    """Estimates, saves to `out` and prints. Sets JAX up itself: simulated devices stand for those that are not there.

    Raises:
      UserError: an unknown device, or no config fits its memory.
    """
    from lobra_jax.config import DevicesConfig
    from lobra_jax.devices import configure
    from profiling.cli import make_setup, print_summary, wanted_configs
    from profiling.estimate import Estimator
    from profiling.memory import DoesNotFitError

    started = time.perf_counter()
    spec, efficiency = device_spec(device), Efficiency()
    count = num_devices or config.devices.num_devices or config.devices.simulated or DEFAULT_NUM_DEVICES
    limit_bytes = config.devices.memory_bytes or int(efficiency.allocatable * spec.memory_bytes)
    stand_ins = DevicesConfig(simulated=count, memory_bytes=limit_bytes)
    configure(stand_ins, cache_dir=config.data.cache_dir)
    names = options.pop("configs")
    max_tokens = options.pop("max_tokens")
    setup = make_setup(config.model_copy(update={"devices": stand_ins}), max_tokens=max_tokens, **options)
    largest = max_tokens or default_max_tokens(setup.lengths[-1], "gpu")
    setup = dataclasses.replace(setup, max_tokens=largest, cores=None, packed=False)
    estimator = Estimator(setup, spec, efficiency)
    progress = Progress(measured={}, dropped={})
    wanted = wanted_configs(config, setup, names)
    for parallel in wanted:
        try:
            cost = estimator.estimate(parallel)
            progress = dataclasses.replace(progress, measured={**progress.measured, parallel: cost})
        except DoesNotFitError as error:
            progress = dataclasses.replace(progress, dropped={**progress.dropped, parallel: str(error)})
    if not progress.measured:
        raise UserError(
            f"no config fits a {device}'s memory",
            key="devices.memory_bytes",
            value=limit_bytes,
            expected=f"more: of {wanted[-1]} {progress.dropped[wanted[-1]]}",
        )
    header = _header(setup, spec, efficiency, device)
    table = header.table(list(progress.measured.values()), estimator.step_overhead_s())
    table.save(out)
    print_summary(console, table, progress.dropped, out, time.perf_counter() - started)
    console.print(table.estimate_note, highlight=False)
    return table


def _header(setup: Setup, spec: DeviceSpec, efficiency: Efficiency, name: str) -> Header:
    from profiling.cli import make_header

    measured = make_header(setup, ())
    return Header(
        model=measured.model,
        model_fingerprint=measured.model_fingerprint,
        hardware={
            "platform": "gpu",
            "device_kind": spec.kind,
            "num_devices": len(setup.devices),
            "memory_bytes": setup.limit_bytes,
        },
        provenance={
            **measured.provenance,
            "command": "lobra profile --estimate",
            "estimated": {"device": name, **dataclasses.asdict(spec), "efficiency": dataclasses.asdict(efficiency)},
        },
    )
