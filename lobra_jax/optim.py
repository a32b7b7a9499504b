"""One optimiser step for all tasks: optax, vectorised over the task axis, every hyper-parameter an array [T].

Knows nothing of shardings. State is kept by layer, so that a layer can live on any device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperInputs:
    """Hyper-parameters of one step, each [T] float32; `active` [T] bool says which tasks train in this step."""

    learning_rate: Array
    weight_decay: Array
    beta1: Array
    beta2: Array
    epsilon: Array
    clip_norm: Array
    active: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptimizer:
    """One task's AdamW hyper-parameters and learning-rate schedule.

    Attributes:
      learning_rates: [steps] float32, the rate of each of the task's own steps.
      clip_norm: largest gradient norm of the task, inf for no clipping.
    """

    learning_rates: np.ndarray
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float


def learning_rates(kind: str, peak: float, *, steps: int, warmup_steps: int, final_fraction: float) -> np.ndarray:
    """[steps] float32: linear warm-up to `peak`, then constant, linear or cosine to `final_fraction` of it."""
    rest = max(steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * final_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final_fraction),
    }
    if kind not in after:
        raise ValueError(f"schedule kind = {kind!r}: expected one of {', '.join(after)}")
    # A task's first step already moves: warm-up step i of n runs at (i + 1) / n of the peak.
    warmup = peak * (np.arange(warmup_steps, dtype=np.float32) + 1) / max(warmup_steps, 1)
    decay = np.broadcast_to(np.asarray(after[kind]()(np.arange(rest, dtype=np.float32)), np.float32), (rest,))
    return np.concatenate([warmup, decay])[:steps].astype(np.float32)


def step_inputs(optimizers: Sequence[TaskOptimizer], task_steps: Sequence[int | None]) -> HyperInputs:
    """Gathers this step's values; a task step of None means the task does not train (finished or stopped)."""

    def column(values: list[float]) -> np.ndarray:
        return np.asarray(values, np.float32)

    rates = [0.0 if k is None else float(o.learning_rates[k]) for o, k in zip(optimizers, task_steps, strict=True)]
    return HyperInputs(
        learning_rate=column(rates),
        weight_decay=column([o.weight_decay for o in optimizers]),
        beta1=column([o.beta1 for o in optimizers]),
        beta2=column([o.beta2 for o in optimizers]),
        epsilon=column([o.epsilon for o in optimizers]),
        clip_norm=column([o.clip_norm for o in optimizers]),
        active=np.asarray([k is not None for k in task_steps], bool),
    )


def _adamw(hyper: HyperInputs) -> optax.GradientTransformation:
    return optax.adamw(
        hyper.learning_rate, b1=hyper.beta1, b2=hyper.beta2, eps=hyper.epsilon, weight_decay=hyper.weight_decay
    )


def init_state(parameters: Any, num_tasks: int) -> Any:
    """Optimiser state of a pytree of leaves [T, ...]; every leaf of the state has the task axis first too."""
    ones = jnp.ones((num_tasks,), jnp.float32)
    hyper = HyperInputs(**{field.name: ones for field in dataclasses.fields(HyperInputs)})
    return jax.vmap(lambda p, h: _adamw(h).init(p))(parameters, hyper)


def squared_norms(gradients: Any) -> Array:
    """[T] float32: sum of squares over everything but the task axis."""
    return sum(jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskState:
    """Adapters and optimiser state by layer, leaves [T, ...].

    Attributes:
      adapters: current.
      last_good: the adapters of the last step whose gradient was finite, what a task falls back to.
      moments: optax state.
    """

    adapters: dict[str, Any]
    last_good: dict[str, Any]
    moments: dict[str, Any]


def update(
    state: TaskState, gradients: dict[str, Any], hyper: HyperInputs, squared_norm: Array, alive: Array
) -> tuple[TaskState, Array, Array]:
    """One AdamW step of every task that is active, alive and has a finite gradient; the others keep all they have.

    A task whose gradient is not finite goes back to its last good adapters and is not alive any more.

    Args:
      state: of some layers, maybe not all.
      gradients: by layer.
      squared_norm: [T], over ALL of a task's adapter, wherever its layers live.
      alive: [T] bool, false for good once a task's gradient was not finite.

    Returns:
      (state, gradient norm before clipping [T], alive [T]).
    """
    norm = jnp.sqrt(squared_norm)
    trains = hyper.active & alive
    moves = trains & jnp.isfinite(norm)
    fails = trains & ~jnp.isfinite(norm)
    clip = jnp.minimum(1.0, hyper.clip_norm / (norm + CLIP_EPSILON))

    def one_task(p: Any, good: Any, s: Any, g: Any, h: HyperInputs, clip: Array, moves: Array, fails: Array) -> tuple:
        # optax raises the float32 beta to the integer count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, new_s = _adamw(h).update(jax.tree.map(lambda x: x * clip, g), s, p)
        moved = (optax.apply_updates(p, updates), p, new_s)
        kept = (jax.tree.map(lambda back, now: jnp.where(fails, back, now), good, p), good, s)
        return jax.tree.map(lambda after, before: jnp.where(moves, after, before), moved, kept)

    new = {
        layer: jax.vmap(one_task)(
            state.adapters[layer],
            state.last_good[layer],
            state.moments[layer],
            gradients[layer],
            hyper,
            clip,
            moves,
            fails,
        )
        for layer in state.adapters
    }
    adapters, last_good, moments = ({layer: parts[i] for layer, parts in new.items()} for i in range(3))
    return TaskState(adapters=adapters, last_good=last_good, moments=moments), norm, alive & ~fails
