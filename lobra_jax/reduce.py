"""The only traffic between replicas: gradients in, new adapters out.

Each layer's adapters and moments have one home device (layers go round the plan's devices). A step ends with: every
replica sends its gradient of a layer to the layer's home; the home sums; squared norms of all homes are added up, so
that clipping sees a task's whole gradient; each home updates its layers; new adapters go back to every replica.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from lobra_jax import optim
from lobra_jax.lora import Adapters
from lobra_jax.optim import HyperInputs, TaskState
from lobra_jax.replica import Replica


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterState:
    """What training changes: each layer's part on its home, and on the first home which tasks are alive."""

    tasks: TaskState
    alive: Array

    @property
    def adapters(self) -> Adapters:
        return self.tasks.adapters


@dataclasses.dataclass(frozen=True)
class Home:
    """One device and the layers whose adapters live there."""

    device: Any
    layers: tuple[str, ...]

    @property
    def sharding(self) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.device)


def assign_homes(num_layers: int, devices: Sequence[Any]) -> tuple[Home, ...]:
    """Layers round the devices; at most one home a layer."""
    used = devices[: min(len(devices), num_layers)]
    return tuple(
        Home(device, tuple(str(layer) for layer in range(start, num_layers, len(used))))
        for start, device in enumerate(used)
    )


@jax.jit
def _sum_gradients(contributions: list[Any]) -> tuple[Any, Array]:
    total = contributions[0]
    for other in contributions[1:]:
        total = jax.tree.map(jnp.add, total, other)
    return total, optim.squared_norms(total)


@jax.jit
def _add_up(norms: list[Array]) -> Array:
    return sum(norms[1:], start=norms[0])


_update = jax.jit(optim.update)
_init_moments = jax.jit(optim.init_state, static_argnums=1)


class GradientSum:
    """Sums gradients over replicas of unlike sharding, updates, and spreads the new adapters."""

    def __init__(self, replicas: Sequence[Replica], num_layers: int, num_tasks: int) -> None:
        self.replicas = replicas
        self.num_tasks = num_tasks
        self.homes = assign_homes(num_layers, [d for replica in replicas for d in replica.submesh.devices])
        self._gather = {}
        self._scatter = {}
        for replica in replicas:
            for stage, layout in enumerate(replica.layouts):
                if replica.parallel.tp > 1:
                    placement = jax.tree.map(lambda leaf: leaf.sharding, layout.adapters)
                    whole = layout.functions.sharding.replicated
                    key = replica.index, stage
                    self._gather[key] = jax.jit(lambda tree: tree, out_shardings=whole)
                    self._scatter[key] = jax.jit(lambda tree: tree, out_shardings=placement)

    def home_of(self, layer: str) -> Home:
        return self.homes[int(layer) % len(self.homes)]

    def init(self, adapters: Adapters) -> AdapterState:
        """Places fresh adapters (NumPy or arrays) on their homes, with zero moments."""
        placed = {layer: jax.device_put(pairs, self.home_of(layer).sharding) for layer, pairs in adapters.items()}
        # Zeros depend on no argument's values, so XLA would leave them on the default device.
        moments = {
            layer: jax.device_put(_init_moments(pairs, self.num_tasks), self.home_of(layer).sharding)
            for layer, pairs in placed.items()
        }
        return AdapterState(
            tasks=TaskState(adapters=placed, last_good=placed, moments=moments),
            alive=jax.device_put(np.ones(self.num_tasks, bool), self.homes[0].sharding),
        )

    def spread(self, adapters: Adapters) -> list[list[Adapters]]:
        """The adapters on every replica, [replica][stage]: whole to each device, then cut where the stage shards."""
        spread = []
        for replica in self.replicas:
            stages = []
            for stage, (layers, layout) in enumerate(zip(replica.stage_layers, replica.layouts, strict=True)):
                whole = {str(layer): adapters[str(layer)] for layer in layers}
                placed = jax.device_put(whole, layout.functions.sharding.replicated)
                cut = self._scatter.get((replica.index, stage))
                stages.append(placed if cut is None else cut(placed))
            spread.append(stages)
        return spread

    def step(
        self, state: AdapterState, gradients: Sequence[Sequence[Adapters]], hyper: HyperInputs
    ) -> tuple[AdapterState, Array]:
        """Sums [replica][stage] gradients and updates; returns the new state and gradient norms [T]."""
        by_layer: dict[str, list[Any]] = {layer: [] for layer in state.adapters}
        for replica, stages in zip(self.replicas, gradients, strict=True):
            for stage, tree in enumerate(stages):
                gather = self._gather.get((replica.index, stage))
                for layer, pairs in (tree if gather is None else gather(tree)).items():
                    by_layer[layer].append(jax.device_put(pairs, self.home_of(layer).sharding))
        sums, norms = [], []
        for home in self.homes:
            contributions = [{layer: by_layer[layer][i] for layer in home.layers} for i in range(len(self.replicas))]
            total, norm = _sum_gradients(contributions)
            sums.append(total)
            norms.append(jax.device_put(norm, self.homes[0].sharding))
        squared_norm = _add_up(norms)
        parts, alive, first_norm = [], state.alive, squared_norm
        for home, total in zip(self.homes, sums, strict=True):
            own = TaskState(
                **{
                    field.name: {layer: getattr(state.tasks, field.name)[layer] for layer in home.layers}
                    for field in dataclasses.fields(TaskState)
                }
            )
            inputs = jax.device_put((hyper, squared_norm, state.alive), home.sharding)
            part, norm, still_alive = _update(own, total, *inputs)
            parts.append(part)
            if home is self.homes[0]:
                alive, first_norm = still_alive, norm
        merged = TaskState(
            **{
                field.name: {layer: tree for part in parts for layer, tree in getattr(part, field.name).items()}
                for field in dataclasses.fields(TaskState)
            }
        )
        return AdapterState(tasks=merged, alive=alive), first_norm
