"""Random weights and adapters made on the devices that want them: no host has to fill the gigabytes of a base."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lobra_jax.lora import Adapters
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.replica import Replica

WEIGHT_STD = 0.02


def random_params(replica: Replica) -> list[dict[str, Any]]:
    """Weights of a base that is not quantised, by stage and name: norms one, the rest normal.

    A weight is the same however the model is cut into stages and shards.
    """

    def make(name: str, spec: jax.ShapeDtypeStruct) -> Any:
        if name.endswith("norm"):
            return jax.device_put(jnp.ones(spec.shape, spec.dtype), spec.sharding)
        return _normal(zlib.crc32(name.encode()), spec.shape, spec.dtype, WEIGHT_STD, spec.sharding)

    return [{name: make(name, spec) for name, spec in layout.params.items()} for layout in replica.layouts]


def random_like(tree: Any) -> Any:
    """Normal numbers for every abstract array of a tree, made where its sharding says."""
    return jax.tree.map(lambda leaf: _normal(leaf.size, leaf.shape, leaf.dtype, WEIGHT_STD, leaf.sharding), tree)


def random_adapters(replica: Replica, specs: Sequence[LoraSpec]) -> Adapters:
    """Both factors random on the first device, what is padding of a rank zero."""
    everywhere = jax.sharding.SingleDeviceSharding(replica.submesh.devices[0])
    adapters: Adapters = {}
    number = 0
    for layout in replica.layouts:
        for layer, pairs in layout.adapters.items():
            adapters[layer] = {}
            for target, pair in pairs.items():
                a, b = (
                    _normal(number + i, pair[name].shape, pair[name].dtype, WEIGHT_STD, everywhere)
                    for i, name in enumerate("ab")
                )
                kept = jnp.arange(a.shape[1])[None] < jnp.asarray([spec.rank for spec in specs])[:, None]
                adapters[layer][target] = {
                    name: jnp.where(kept[:, :, None], factor, jnp.zeros_like(factor))
                    for name, factor in (("a", a), ("b", b))
                }
                number += 2
    return adapters


def _normal(seed: int, shape: tuple[int, ...], dtype: Any, std: float, sharding: Any) -> Any:
    return _normal_program(shape, jnp.dtype(dtype), std, sharding)(np.uint32(seed))


@functools.cache
def _normal_program(shape: tuple[int, ...], dtype: Any, std: float, sharding: Any) -> Any:
    return jax.jit(
        lambda seed: (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * std).astype(dtype),
        out_shardings=sharding,
    )
