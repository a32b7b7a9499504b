"""The two matmuls of stacked adapters: into the rank and out of it, each row by its own tasks' factors.

Their inputs are rounded to the activations' dtype and their gradients come out in fp32, summed over rows in fp32, so
that no matmul over tokens runs in fp32. A backward keeps nothing but what it was given: factors are looked up again.

Where a mesh has an activation's tokens on several devices, it is gathered anyway for the base's product. What is of the
rank's size is then made of the gathered activation on every device, and gradients of each device's own tokens: a
collective of their own, however small, would cost more than either. Pins say where that is.

Shape letters as in `lora`; K slots: the tasks of a row, one where a row is a sequence (see `packed`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.sharding import UNSHARDED, Shard


@dataclasses.dataclass(frozen=True)
class Pin:
    """`shard` pins activations on a mesh; `cut` where the tokens of one lie on several of its devices."""

    shard: Shard = UNSHARDED
    cut: bool = False


NO_PIN = Pin()


@dataclasses.dataclass(frozen=True)
class Pins:
    """Of what linears read and of what they write."""

    read: Pin = NO_PIN
    written: Pin = NO_PIN


NO_PINS = Pins()

LOW_RANK = "low_rank"
"""What remat policies call values of the rank's size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Whose factors the tokens of each row use.

    Attributes:
      task_ids: [B, K] int32, the tasks of a row's slots.
      scales: [B, 1, 1, 1], or [B, L, 1, 1] by token, float32: alpha / rank.
      own: [B, L, K, 1] bool, each token's own slot; None where a row is a sequence and has one.
    """

    task_ids: Array
    scales: Array
    own: Array | None = None

    @property
    def shared(self) -> bool:
        """Whether tokens of several tasks meet in sums over a row."""
        return self.own is not None

    def whole(self, pin: Pin) -> Slots:
        """These with scales that are whole on every device."""
        return dataclasses.replace(self, scales=_whole(self.scales, pin))

    def scaled(self, h_BLKR: Array, dtype: jnp.dtype) -> Array:
        """Low-rank values times their task's scale, exact zeros in other slots; the scale is not rounded to bf16."""
        h_BLKR = h_BLKR * self.scales
        return (h_BLKR if self.own is None else jnp.where(self.own, h_BLKR, 0.0)).astype(dtype)


FINITE_LIMIT = 1e15
"""Larger magnitudes count as overflow where tasks meet in one sum: the product of two of them is still a float32."""


def bounded(x: Array) -> Array:
    """x with infinities, NaN and what would overflow in a product set to zero."""
    return jnp.where(jnp.abs(x) <= FINITE_LIMIT, x, jnp.zeros_like(x))


def own_factors(factors: Array, task_ids_BK: Array, dtype: jnp.dtype) -> Array:
    """[B, K, ...]: each row's factors, rounded."""
    return factors.astype(dtype)[task_ids_BK]


def by_task(d_factors_BK: Array, task_ids_BK: Array, num_tasks: int, pin: Pin) -> Array:
    """[T, ...]: the transpose of `own_factors`.

    On one device the first slot's are put into its task's place and the others' added. All could be added to zeros, but
    zeros depend on nothing: XLA makes those of all layers when a program starts, and they lie there until the backward.
    """
    if pin.shard.num_devices > 1:  # the first row may be another device's
        zeros = jnp.zeros((num_tasks, *d_factors_BK.shape[2:]), jnp.float32)
        return zeros.at[_whole(task_ids_BK, pin)].add(d_factors_BK)
    d_factors, task_ids = d_factors_BK.reshape(-1, *d_factors_BK.shape[2:]), task_ids_BK.reshape(-1)
    is_first = (jnp.arange(num_tasks, dtype=task_ids.dtype) == task_ids[0]).reshape(-1, *[1] * (d_factors.ndim - 1))
    return jnp.where(is_first, d_factors[0], 0.0).at[task_ids[1:]].add(d_factors[1:])


def _whole(x: Array, pin: Pin) -> Array:
    """What rows say of their tasks, on every device; XLA may else take a part to each and gather it again."""
    return pin.shard(x, *[None] * x.ndim)


def _gathered(x_BLI: Array, pin: Pin) -> Array:
    return pin.shard(x_BLI, "batch", "position", "hidden") if pin.cut else x_BLI


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def into_ranks(x_BLI: Array, a_TRI: Array, task_ids_BK: Array, shared: bool, pin: Pin = NO_PIN) -> Array:
    """x a^T for every slot of the row: [B, L, K, R] fp32.

    With `shared` rows, tokens of several tasks meet in the gradient's sum: what is not finite there is left out, as
    0 x inf is not 0. Its own task sees it all the same, in its cotangents. `pin` says where x's tokens lie.
    """
    a_BKRI = own_factors(a_TRI, _whole(task_ids_BK, pin), x_BLI.dtype)
    x_BLI = _gathered(x_BLI, pin)
    return jnp.einsum("bli,bkri->blkr", x_BLI, a_BKRI, preferred_element_type=jnp.float32)


def _into_fwd(
    x_BLI: Array, a_TRI: Array, task_ids_BK: Array, shared: bool, pin: Pin
) -> tuple[Array, tuple[Array, ...]]:
    return into_ranks(x_BLI, a_TRI, task_ids_BK, shared, pin), (x_BLI, a_TRI, task_ids_BK)


def _into_bwd(shared: bool, pin: Pin, saved: tuple[Array, ...], d_h_BLKR: Array) -> tuple[Array, Array, None]:
    x_BLI, a_TRI, task_ids_BK = saved
    d_h = d_h_BLKR.astype(x_BLI.dtype)  # zero in all slots but the token's own
    d_h = pin.shard(d_h, "batch", "length", None, "rank") if pin.cut else d_h
    d_x = jnp.einsum("blkr,bkri->bli", d_h, own_factors(a_TRI, _whole(task_ids_BK, pin), x_BLI.dtype))
    x_BLI = bounded(x_BLI) if shared else x_BLI
    d_a_BKRI = jnp.einsum("blkr,bli->bkri", d_h, x_BLI, preferred_element_type=jnp.float32)
    return d_x, by_task(d_a_BKRI, task_ids_BK, a_TRI.shape[0], pin), None


into_ranks.defvjp(_into_fwd, _into_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def out_of_ranks(h_BLKR: Array, b_TRO: Array, task_ids_BK: Array, shared: bool, pin: Pin = NO_PIN) -> Array:
    """h b summed over the row's slots: [B, L, O] in the dtype of h; `shared` as in `into_ranks`.

    `pin` says where the tokens of what comes out lie.
    """
    return jnp.einsum("blkr,bkro->blo", h_BLKR, own_factors(b_TRO, _whole(task_ids_BK, pin), h_BLKR.dtype))


def _out_fwd(
    h_BLKR: Array, b_TRO: Array, task_ids_BK: Array, shared: bool, pin: Pin
) -> tuple[Array, tuple[Array, ...]]:
    return out_of_ranks(h_BLKR, b_TRO, task_ids_BK, shared, pin), (h_BLKR, b_TRO, task_ids_BK)


def _out_bwd(shared: bool, pin: Pin, saved: tuple[Array, ...], d_y_BLO: Array) -> tuple[Array, Array, None]:
    """A gradient that is not finite still reaches its own task through d_h and so its `a`, which stops the task."""
    h_BLKR, b_TRO, task_ids_BK = saved
    d_h = jnp.einsum(
        "blo,bkro->blkr", _gathered(d_y_BLO, pin), own_factors(b_TRO, _whole(task_ids_BK, pin), d_y_BLO.dtype)
    )
    d_h = pin.shard(d_h, "batch", "position", None, "rank") if pin.cut else d_h
    d_y_BLO = bounded(d_y_BLO) if shared else d_y_BLO
    d_b_BKRO = jnp.einsum("blkr,blo->bkro", h_BLKR, d_y_BLO, preferred_element_type=jnp.float32)
    return d_h, by_task(d_b_BKRO, task_ids_BK, b_TRO.shape[0], pin), None


out_of_ranks.defvjp(_out_fwd, _out_bwd)
