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
from jax import Array
from jax.sharding import SingleDeviceSharding

from lobra_jax import optim
from lobra_jax.lora import Adapters
from lobra_jax.optim import HyperInputs
from lobra_jax.replica import Replica


@dataclasses.dataclass(kw_only=True)
class AdapterState:
    """Master adapters and moments by layer, and which tasks are alive; each layer on its home device."""

    adapters: Adapters
    moments: dict[str, Any]
    alive: Array


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


_update = jax.jit(optim.update, donate_argnums=(1,))


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
        init_state = jax.jit(optim.init_state, static_argnums=1)
        placed = {layer: jax.device_put(pairs, self.home_of(layer).sharding) for layer, pairs in adapters.items()}
        return AdapterState(
            adapters=placed,
            moments={layer: init_state(pairs, self.num_tasks) for layer, pairs in placed.items()},
            alive=jax.device_put(jnp.ones((self.num_tasks,), bool), self.homes[0].sharding),
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
            contributions = [
                {layer: by_layer[layer][i] for layer in home.layers} for i in range(len(self.replicas))
            ]
            total, norm = _sum_gradients(contributions)
            sums.append(total)
            norms.append(jax.device_put(norm, self.homes[0].sharding))
        squared_norm = _add_up(norms)
        new = AdapterState(adapters={}, moments={}, alive=state.alive)
        for home, total in zip(self.homes, sums, strict=True):
            inputs = jax.device_put((hyper, squared_norm, state.alive), home.sharding)
            adapters, moments, norm, alive = _update(
                {layer: state.adapters[layer] for layer in home.layers},
                {layer: state.moments[layer] for layer in home.layers},
                total,
                *inputs,
            )
            new.adapters.update(adapters)
            new.moments.update(moments)
            if home is self.homes[0]:
                new.alive, first_norm = alive, norm
        return new, first_norm
