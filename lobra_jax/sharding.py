"""Which mesh axis each logical axis of the model lies on: the one place that turns names into shardings.

| logical axis | what | mesh axis |
|---|---|---|
| heads, kv_heads, mlp | column-parallel outputs, row-parallel inputs | tensor |
| vocab | embedding and head; logits | tensor; weights only where it divides |
| length | positions, in the norm regions (sequence parallelism) | tensor, where it divides and rows do not |
| batch | rows | tensor in the norm regions, where it divides |
| hidden, rank, task, position | features between linears; adapters | none |

`position` is the length axis inside attention and the feed-forward, where heads or mlp take the mesh axis. The norm
regions are cut by rows where these divide: what a device has is then in one piece, and gathers and scatters need no
transposed copies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lobra_jax.devices import compiler_options

TENSOR = "tensor"

RULES: dict[str, str | None] = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "length": TENSOR,
    "batch": None,
    "hidden": None,
    "rank": None,
    "task": None,
    "position": None,
}

TARGET_AXES: dict[str, tuple[str, str]] = {
    "q": ("hidden", "heads"),
    "k": ("hidden", "kv_heads"),
    "v": ("hidden", "kv_heads"),
    "o": ("heads", "hidden"),
    "gate": ("hidden", "mlp"),
    "up": ("hidden", "mlp"),
    "down": ("mlp", "hidden"),
}
"""Logical (in, out) axes of each linear; its adapters follow them: a (task, rank, in), b (task, rank, out),
m (task, out)."""


WHOLE_IF_UNEVEN = ("length", "vocab")
"""Axes that are left whole where they do not divide: short buckets, and vocabularies of any size, as added tokens make
them."""


class Shard(Protocol):
    """Pins activations by their logical axes."""

    @property
    def num_devices(self) -> int: ...

    def __call__(self, x: Array, *axes: str | None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """A `Shard` of one device."""

    num_devices: int = 1

    def __call__(self, x: Array, *axes: str | None) -> Array:
        return x


UNSHARDED = Unsharded()


@dataclasses.dataclass(frozen=True)
class StageSharding:
    """Shardings of one stage's mesh, whose only axis is "tensor". A `Shard`: a call pins an activation.

    `by_rows` cuts norm regions by rows where these divide, so that what is gathered lies in one piece, else by
    positions: what each row has of its own, as with dropout and DoRA, would be gathered in hundreds of little pieces.
    """

    mesh: Mesh
    by_rows: bool = True

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def compiler_options(self) -> dict[str, int]:
        return compiler_options(self.mesh.devices.flat[0])

    def named(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """The sharding of an array with these logical axes.

        With `shape`, axes of `WHOLE_IF_UNEVEN` that do not divide are left whole; any other must divide. With `by_rows`
        rows take the place of their `length` where they divide.
        """
        size = self.mesh.shape[TENSOR]
        rules = RULES
        has_rows = self.by_rows and shape is not None and "length" in axes and "batch" in axes
        if has_rows and shape[axes.index("batch")] % size == 0:
            rules = RULES | {"batch": TENSOR, "length": None}
        spec: list[str | None] = []
        for dim, axis in enumerate(axes):
            rule = None if axis is None else rules[axis]
            if rule is not None and shape is not None and shape[dim] % size:
                if axis not in WHOLE_IF_UNEVEN:
                    raise ValueError(f"axis {axis!r} of {tuple(shape)}: {shape[dim]} is not a multiple of tp = {size}")
                rule = None
            spec.append(rule)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def __call__(self, x: Array, *axes: str | None) -> Array:
        """Pins an activation inside a jitted function.

        Logits are shared out over uneven vocabularies too, which XLA pads: a device has the whole head and uses a part.
        """
        if self.mesh.size == 1:
            return x
        shape = None if "vocab" in axes else x.shape
        return jax.lax.with_sharding_constraint(x, self.named(axes, shape))

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def adapters(
        self, layers: Sequence[int], targets: Sequence[str], *, dora: bool
    ) -> dict[str, dict[str, dict[str, NamedSharding]]]:
        """Shardings of the adapters (and of their gradients) of these layers and linears; `dora`: with magnitudes."""
        pair = {
            target: {
                "a": self.named(("task", "rank", fan_in)),
                "b": self.named(("task", "rank", fan_out)),
                **({"m": self.named(("task", fan_out))} if dora else {}),
            }
            for target, (fan_in, fan_out) in ((target, TARGET_AXES[target]) for target in targets)
        }
        return {str(layer): pair for layer in layers}
