"""The only traffic between replicas: gradients in, new adapters out.

Each layer's adapters and moments have one home device (layers go round the plan's devices). A step ends with: every
replica sends its gradients to their layers' homes; the home sums; squared norms of all homes are added up, so that
clipping sees a task's whole gradient; each home updates its layers; new adapters go back to every replica.

What travels between a stage and a home is one flat array, packed and unpacked by jitted functions: a transfer for each
of the hundreds of small factors would cost the host more time than the devices. Nothing is packed for a home that is
the stage's only device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, SingleDeviceSharding

from lobra_jax import optim
from lobra_jax.lora import Adapters
from lobra_jax.memory import travelling_bytes
from lobra_jax.optim import HyperInputs, TaskState
from lobra_jax.program_names import GRADIENT_SUM, UPDATE, named
from lobra_jax.replica import Replica
from lobra_jax.stage import StageLayout


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Route:
    """A stage's exchange with the homes of its layers, one flat array each way and home elsewhere.

    `collect` packs the stage's gradients, whole on each of its devices; `distribute` unpacks and cuts new adapters.
    `local` is the home that needs none of it, `local_layers` its layers: they go to and fro as they are.
    """

    homes: tuple[Home, ...]
    layers: tuple[Layers, ...]
    whole: NamedSharding
    collect: Callable[[Adapters], list[Array]]
    distribute: Callable[[list[Array]], Adapters]
    local: Home | None
    local_layers: Layers


def assign_homes(num_layers: int, devices: Sequence[Any]) -> tuple[Home, ...]:
    """Layers round the devices; at most one home a layer."""
    used = devices[: min(len(devices), num_layers)]
    return tuple(
        Home(device, tuple(str(layer) for layer in range(start, num_layers, len(used))))
        for start, device in enumerate(used)
    )


Layers = tuple[str, ...]

UPDATED_LAYERS = 4
"""Layers of one call of the update. On a CPU the first sum and update of 32 layers took 14 s with all of them in one
program and 3 s four at a time, later ones 24 and 17 ms (profiling/results/h100_tries.json)."""


def pack(tree: Adapters, layers: Layers) -> Array:
    """The adapters (or gradients) of these layers as one flat float32 array."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves([tree[layer] for layer in layers])])


def unpack(flat: Array, like: Adapters, layers: Layers) -> Adapters:
    """Undoes `pack`; `like` has the layers' shapes."""
    leaves, tree = jax.tree.flatten([like[layer] for layer in layers])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
    parts = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(flat, ends), leaves, strict=True)]
    return dict(zip(layers, jax.tree.unflatten(tree, parts), strict=True))


def _sum_home(
    contributions: list[Array | Adapters], like: Adapters, layers: tuple[Layers, ...]
) -> tuple[Adapters, Array]:
    """(sum, squared norms [T]) of contributions, flat or not, the i-th holding `layers[i]`, in their order."""
    total: Adapters = {}
    for part, own in zip(contributions, layers, strict=True):
        for layer, pairs in (part if isinstance(part, dict) else unpack(part, like, own)).items():
            total[layer] = pairs if layer not in total else jax.tree.map(jnp.add, total[layer], pairs)
    return total, optim.squared_norms(total)


def _sum_gradients(
    contributions: list[Array | Adapters], like: Adapters, layers: tuple[Layers, ...]
) -> tuple[Adapters, Array]:
    """`_sum_home`; a home's only contribution is its sum, without a copy, where it is not packed."""
    if len(contributions) == 1 and isinstance(contributions[0], dict):
        return contributions[0], _squared_norms(contributions[0])
    return _sum_packed(contributions, like, layers)


def _add(norms: list[Array]) -> Array:
    return sum(norms[1:], start=norms[0])


_sum_packed = jax.jit(named(_sum_home, GRADIENT_SUM, "home"), static_argnums=2)
_add_up = jax.jit(named(_add, GRADIENT_SUM, "add_norms"))
_squared_norms = jax.jit(named(optim.squared_norms, GRADIENT_SUM, "norms"))
_update = jax.jit(named(optim.update, UPDATE, "home"))
_update_in_place = jax.jit(named(optim.update, UPDATE, "home"), donate_argnums=0)
_pack_some = jax.jit(named(pack, UPDATE, "pack"), static_argnums=1)
_init_moments = jax.jit(optim.init_state, static_argnums=(1, 2))


class GradientSum:
    """Sums gradients over replicas of unlike sharding, updates, and spreads the new adapters."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        num_layers: int,
        num_tasks: int,
        optimizers: tuple[str, ...] = ("adamw",),
        *,
        averages: bool = False,
        last_good: bool = False,
    ) -> None:
        self.replicas = replicas
        self.averages = averages
        self.last_good = last_good or any(kind not in optim.BEFORE for kind in optimizers)
        self.num_tasks = num_tasks
        self.optimizers = optimizers
        self.homes = assign_homes(num_layers, [d for replica in replicas for d in replica.submesh.devices])
        self._routes = {
            (replica.index, stage): self._route(layout, layers)
            for replica in replicas
            for stage, (layout, layers) in enumerate(zip(replica.layouts, replica.stage_layers, strict=True))
        }

    def _route(self, layout: StageLayout, stage_layers: Sequence[int]) -> _Route:
        """What a stage exchanges with each home that has layers of it."""
        names = {str(layer) for layer in stage_layers}
        shared = [(home, tuple(x for x in home.layers if x in names)) for home in self.homes]
        devices = list(layout.functions.sharding.mesh.devices.flat)
        local = next(((home, own) for home, own in shared if own and devices == [home.device]), None)
        shared = [(home, own) for home, own in shared if own and (local is None or home is not local[0])]
        layers = tuple(own for _, own in shared)
        placement = jax.tree.map(lambda leaf: leaf.sharding, layout.adapters)
        whole = layout.functions.sharding.replicated

        def collect(tree: Adapters) -> list[Array]:
            return [pack(tree, own) for own in layers]

        def distribute(flats: list[Array]) -> Adapters:
            parts = [unpack(flat, layout.adapters, own) for flat, own in zip(flats, layers, strict=True)]
            return {layer: pairs for part in parts for layer, pairs in part.items()}

        return _Route(
            homes=tuple(home for home, _ in shared),
            layers=layers,
            whole=whole,
            collect=jax.jit(named(collect, GRADIENT_SUM, "pack"), out_shardings=whole),
            distribute=jax.jit(
                named(distribute, UPDATE, "unpack"),
                out_shardings={layer: placement[layer] for own in layers for layer in own},
            ),
            local=None if local is None else local[0],
            local_layers=() if local is None else local[1],
        )

    def home_of(self, layer: str) -> Home:
        return self.homes[int(layer) % len(self.homes)]

    def init(self, adapters: Adapters) -> AdapterState:
        """Places fresh adapters (NumPy or arrays) on their homes, with zero moments; no two parts share an array."""

        def place() -> Adapters:
            return {
                layer: jax.device_put(pairs, self.home_of(layer).sharding, may_alias=False)
                for layer, pairs in adapters.items()
            }

        placed, nothing = place(), {layer: {} for layer in adapters}
        # Zeros depend on no argument's values, so XLA would leave them on the default device.
        moments = {
            layer: jax.device_put(_init_moments(pairs, self.num_tasks, self.optimizers), self.home_of(layer).sharding)
            for layer, pairs in placed.items()
        }
        return AdapterState(
            tasks=TaskState(
                adapters=placed,
                last_good=place() if self.last_good else nothing,
                moments=moments,
                averages=place() if self.averages else nothing,
            ),
            alive=jax.device_put(np.ones(self.num_tasks, bool), self.homes[0].sharding),
        )

    def spread(self, adapters: Adapters) -> list[list[Adapters]]:
        """The adapters on every replica, [replica][stage], placed as the stage's layout says."""
        packed: dict[Layers, Array] = {}
        for route in self._routes.values():
            for layers in route.layers:
                if layers not in packed:
                    packed[layers] = _pack_some({layer: adapters[layer] for layer in layers}, layers)
        return [
            [
                self._receive(self._routes[replica.index, stage], packed, adapters)
                for stage in range(replica.parallel.pp)
            ]
            for replica in self.replicas
        ]

    def _receive(self, route: _Route, packed: Mapping[Layers, Array], adapters: Adapters) -> Adapters:
        own = {layer: adapters[layer] for layer in route.local_layers}
        if not route.layers:
            return own
        return own | route.distribute([jax.device_put(packed[layers], route.whole) for layers in route.layers])

    def travel_bytes(self) -> dict[Any, int]:
        """By device of stages on several: what gradients and new adapters take there on their way, and arrived."""
        total: dict[Any, int] = {}
        for (index, stage), route in self._routes.items():
            layout = self.replicas[index].layouts[stage]
            devices = list(layout.functions.sharding.mesh.devices.flat)
            if len(devices) > 1:
                own = {layer: layout.adapters[layer] for layers in route.layers for layer in layers}
                total |= dict.fromkeys(devices, travelling_bytes(own))
        return total

    def step(
        self,
        state: AdapterState,
        gradients: Sequence[Sequence[Adapters]],
        hyper: HyperInputs,
        *,
        in_place: bool = False,
    ) -> tuple[AdapterState, Array]:
        """Sums [replica][stage] gradients and updates; returns the new state and gradient norms [T].

        With `in_place` the new state takes the arrays of the old, which is gone.
        """
        update = _update_in_place if in_place else _update
        arrived: dict[Home, list[tuple[Layers, Array | Adapters]]] = {home: [] for home in self.homes}
        for replica, stages in zip(self.replicas, gradients, strict=True):
            for stage, tree in enumerate(stages):
                route = self._routes[replica.index, stage]
                if route.local is not None:
                    own = {layer: tree[layer] for layer in route.local_layers}
                    arrived[route.local].append((route.local_layers, own))
                flats = route.collect(tree) if route.layers else []
                for home, layers, flat in zip(route.homes, route.layers, flats, strict=True):
                    arrived[home].append((layers, jax.device_put(flat, home.sharding)))
        sums, norms = [], []
        for home, parts in arrived.items():
            like = {layer: state.adapters[layer] for layer in home.layers}
            total, norm = _sum_gradients([part for _, part in parts], like, tuple(layers for layers, _ in parts))
            sums.append(total)
            norms.append(jax.device_put(norm, self.homes[0].sharding))
        squared_norm = _add_up(norms)
        parts, alive, first_norm = [], state.alive, squared_norm
        for home, total in zip(self.homes, sums, strict=True):
            inputs = jax.device_put((hyper, squared_norm, state.alive), home.sharding)
            for start in range(0, len(home.layers), UPDATED_LAYERS):
                layers = home.layers[start : start + UPDATED_LAYERS]
                own = state.tasks.by_tree(lambda tree, layers=layers: _numbered(tree, layers))
                part, norm, still_alive = update(own, _numbered(total, layers), *inputs)
                parts.append((layers, part))
                if home is self.homes[0]:
                    alive, first_norm = still_alive, norm
        return AdapterState(tasks=_named_again(parts), alive=alive), first_norm


def _numbered(tree: Mapping[str, Any], layers: Layers) -> dict[str, Any]:
    """Some layers' parts of a tree, by number, so that all groups of as many layers are updated by one program."""
    return {str(number): tree[layer] for number, layer in enumerate(layers)}


def _named_again(parts: Sequence[tuple[Layers, TaskState]]) -> TaskState:
    """One state of the states of groups of layers, which are by number."""

    def joined(field: str) -> dict[str, Any]:
        trees = ((layers, getattr(part, field)) for layers, part in parts)
        return {layer: tree[str(number)] for layers, tree in trees for number, layer in enumerate(layers)}

    return TaskState(**{field.name: joined(field.name) for field in dataclasses.fields(TaskState)})
