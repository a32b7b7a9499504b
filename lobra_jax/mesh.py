"""Cutting the devices into submeshes, one a replica, and the model's layers into stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lobra_jax.models.config import LlamaConfig
from lobra_jax.sharding import TENSOR, StageSharding
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submesh:
    """The devices of one replica: `stages[p]` shards stage p over its tp devices."""

    parallel: ParallelConfig
    stages: tuple[StageSharding, ...]

    @property
    def devices(self) -> list[Any]:
        return [device for stage in self.stages for device in stage.mesh.devices.flat]


def make_submesh(parallel: ParallelConfig, devices: Sequence[Any]) -> Submesh:
    """A submesh on exactly tp x pp devices, a stage's devices adjacent."""
    if len(devices) != parallel.num_devices:
        raise ValueError(f"{parallel} on {len(devices)} devices: expected {parallel.num_devices}")
    grid = np.array(devices, dtype=object).reshape(parallel.pp, parallel.tp)
    return Submesh(
        parallel=parallel,
        stages=tuple(StageSharding(Mesh(row, (TENSOR,), axis_types=(AxisType.Auto,))) for row in grid),
    )


def cut(plan: Plan, devices: Sequence[Any] | None = None) -> tuple[Submesh, ...]:
    """One submesh a replica, in the order of `plan.expanded()`.

    The widest tensor-parallel replicas get the first devices, so that powers of two stay aligned within a host.
    Devices left over stay idle.
    """
    devices = jax.devices() if devices is None else devices
    if plan.used_devices > len(devices):
        raise UserError(
            "the plan needs more devices than there are",
            key="plan.replicas",
            value=plan.used_devices,
            expected=f"at most {len(devices)}",
        )
    configs = [group.config for group in plan.expanded()]
    start = 0
    submeshes: dict[int, Submesh] = {}
    for index in sorted(range(len(configs)), key=lambda i: (-configs[i].tp, -configs[i].pp, i)):
        stop = start + configs[index].num_devices
        submeshes[index] = make_submesh(configs[index], devices[start:stop])
        start = stop
    return tuple(submeshes[index] for index in range(len(configs)))


def layer_weight(config: LlamaConfig) -> tuple[float, float]:
    """Work of one layer and of the vocabulary projection, as multiply-adds a token."""
    layer = sum(fan_in * fan_out for fan_in, fan_out in config.target_shapes.values())
    return float(layer), float(config.hidden_size * config.vocab_size)


def split_layers(config: LlamaConfig, num_stages: int) -> tuple[range, ...]:
    """Consecutive layers for each stage, at least one each, so that the heaviest stage is as light as can be.

    The vocabulary projection counts on the last stage; embedding is a lookup and counts nothing. Among equally good
    splits the last stage gets the most layers, as earlier ones hold more micro-batches in flight.
    """
    if not 1 <= num_stages <= config.num_layers:
        raise UserError(
            f"pp must be between 1 and the number of layers of {config.name}",
            key="pp",
            value=num_stages,
            expected=f"1 to {config.num_layers}",
        )
    layer, head = layer_weight(config)
    best: tuple[float, int] | None = None
    for on_last in range(1, config.num_layers - num_stages + 2):
        others = config.num_layers - on_last
        if num_stages == 1:
            if others:
                continue
            heaviest = 0
        else:
            heaviest = -(-others // (num_stages - 1))
        load = max(heaviest * layer, on_last * layer + head)
        if best is None or load <= best[0]:
            best = (load, on_last)
    assert best is not None, "the loop covers every feasible split"
    on_last = best[1]
    sizes = [on_last]
    if num_stages > 1:
        base, extra = divmod(config.num_layers - on_last, num_stages - 1)
        sizes = [base] * (num_stages - 1 - extra) + [base + 1] * extra + [on_last]
    stops = np.cumsum(sizes).tolist()
    return tuple(range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


def check_model_fits(config: LlamaConfig, parallel: ParallelConfig) -> None:
    """Refuses a tp that does not divide the model, or a pp beyond its layers."""
    if not config.supports_tp(parallel.tp):
        raise UserError(
            f"tp does not divide {config.name}: heads {config.num_heads}, key/value heads {config.num_kv_heads}, "
            f"feed-forward {config.intermediate_size}",
            key="tp",
            value=parallel.tp,
            expected="a common divisor",
        )
    split_layers(config, parallel.pp)
