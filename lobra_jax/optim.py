"""One optimiser step for all tasks: optax, vectorised over the task axis, every hyper-parameter an array [T].

Each task has an optimiser of its own out of `OPTIMIZERS`. The one compiled step computes those that the run's tasks use
(their state says which) and each task takes its own. Knows nothing of shardings. State is kept by layer, so that a
layer can live on any device.

Ranks are padded with zeros, and padding must never reach a task's numbers: zero gradients give zero updates with every
optimiser here, and Adafactor's root mean squares are over a task's real elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as `torch.nn.utils.clip_grad_norm_` does."""


FACTOR_DIMS = 2
"""Of one task's a and b, which are padded in rank; a magnitude has one."""

ADAFACTOR_DECAY = 0.8
"""Of the second moment: step t keeps 1 - t ** -0.8 of it (Shazeer and Stern, 2018)."""
ADAFACTOR_CLIP = 1.0
"""Largest root mean square of an Adafactor update before it is scaled."""
ADAFACTOR_MIN_SCALE = 1e-3
"""Smallest root mean square of a parameter that an Adafactor update is scaled by."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperInputs:
    """Hyper-parameters of one step, each [T] float32.

    Attributes:
      b_ratio: learning rate of b over that of a (LoRA+).
      rank_share: the task's rank over the padded rank.
      average_weight: of this step's adapter in the average of all; 1 for a task that keeps none.
      kind: [T] int32, place of the task's optimiser in `OPTIMIZERS`.
      active: [T] bool, which tasks train in this step.
    """

    learning_rate: Array
    weight_decay: Array
    beta1: Array
    beta2: Array
    epsilon: Array
    momentum: Array
    clip_norm: Array
    b_ratio: Array
    rank_share: Array
    average_weight: Array
    kind: Array
    active: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptimizer:
    """One task's optimiser, its hyper-parameters and learning-rate schedule.

    Attributes:
      learning_rates: [steps] float32, the rate of each of the task's own steps.
      weight_decay: decoupled and times the rate; with sgd added to the gradient, as torch does.
      beta1, beta2: of adamw and lion; `epsilon` of adamw; `momentum` of sgd.
      clip_norm: largest gradient norm of the task, inf for no clipping.
      kind: one of `OPTIMIZERS`.
      b_ratio: learning rate of b over that of a (LoRA+, Hayou et al., 2024).
      rank: of the task's adapter; adafactor needs it, whose arrays are padded to the largest.
      ema_decay: an exponential moving average of the adapter is kept; None for none.
    """

    learning_rates: np.ndarray
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    kind: str = "adamw"
    momentum: float = 0.0
    b_ratio: float = 1.0
    rank: int | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise ValueError(f"TaskOptimizer.kind = {self.kind!r}: expected one of {', '.join(OPTIMIZERS)}")
        if self.kind == "adafactor" and self.rank is None:
            raise ValueError("TaskOptimizer.rank is None: adafactor needs it")


def learning_rates(
    kind: str, peak: float, *, steps: int, warmup_steps: int, final_fraction: float, decay_fraction: float = 0.1
) -> np.ndarray:
    """[steps] float32: linear warm-up to `peak`, then constant, or linear or cosine to `final_fraction` of it.

    "wsd" (warm-up, stable, decay) stays at the peak and falls in a line over the last `decay_fraction` of all steps.
    """
    rest = max(steps - warmup_steps, 1)
    falling = min(max(round(decay_fraction * steps), 1), rest)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * final_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final_fraction),
        "wsd": lambda: optax.linear_schedule(peak, peak * final_fraction, falling, transition_begin=rest - falling),
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
    max_rank = max((o.rank or 1 for o in optimizers), default=1)
    names = list(OPTIMIZERS)
    return HyperInputs(
        learning_rate=column(rates),
        weight_decay=column([o.weight_decay for o in optimizers]),
        beta1=column([o.beta1 for o in optimizers]),
        beta2=column([o.beta2 for o in optimizers]),
        epsilon=column([o.epsilon for o in optimizers]),
        momentum=column([o.momentum for o in optimizers]),
        clip_norm=column([o.clip_norm for o in optimizers]),
        b_ratio=column([o.b_ratio for o in optimizers]),
        rank_share=column([(o.rank or max_rank) / max_rank for o in optimizers]),
        average_weight=column([_average_weight(o.ema_decay, k) for o, k in zip(optimizers, task_steps, strict=True)]),
        kind=np.asarray([names.index(o.kind) for o in optimizers], np.int32),
        active=np.asarray([k is not None for k in task_steps], bool),
    )


def _average_weight(decay: float | None, task_step: int | None) -> float:
    """What the step's adapter weighs beside the average so far: (1 - d) / (1 - d^n) at the n-th step.

    The average is then sum_i d^(n-i) p_i / sum_i d^(n-i), without a bias to the start.
    """
    if decay is None or task_step is None or decay == 0:
        return 1.0
    return (1 - decay) / (1 - decay ** (task_step + 1))


def no_inputs(num_tasks: int) -> HyperInputs:
    """Of a step in which no task trains."""
    ones = np.ones(num_tasks, np.float32)
    return HyperInputs(
        **{f.name: ones for f in dataclasses.fields(HyperInputs) if f.name not in ("kind", "active")},
        kind=np.zeros(num_tasks, np.int32),
        active=np.zeros(num_tasks, bool),
    )


def _adamw(hyper: HyperInputs) -> optax.GradientTransformation:
    adamw = optax.adamw(
        hyper.learning_rate, b1=hyper.beta1, b2=hyper.beta2, eps=hyper.epsilon, weight_decay=hyper.weight_decay
    )
    return optax.chain(adamw, _remembering(hyper.learning_rate))


def _remembering(rate: Array) -> optax.GradientTransformation:
    """Changes nothing; its state is the rate of the step before."""
    return optax.GradientTransformation(lambda _: jnp.zeros_like(rate), lambda updates, *_: (updates, rate))


def _before_adamw(hyper: HyperInputs, state: Any, parameters: Any) -> Any:
    """The parameters that the last step of `state` started from, to float32 rounding.

    What AdamW adds is told by its state alone, and with usual betas it is no more than a few times the rate, so that
    little cancels.
    """
    (adam, *_), rate = state
    means, squares = (
        optax.tree.bias_correction(moment, beta, jnp.maximum(adam.count, 1))
        for moment, beta in ((adam.mu, hyper.beta1), (adam.nu, hyper.beta2))
    )
    rates = _with_ratio(jax.tree.map(lambda _: rate, parameters), hyper.b_ratio)

    def before(p: Array, rate: Array, mean: Array, square: Array) -> Array:
        return (p + rate * mean / (jnp.sqrt(square) + hyper.epsilon)) / (1 - rate * hyper.weight_decay)

    return jax.tree.map(before, parameters, rates, means, squares)


def _sgd(hyper: HyperInputs) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(hyper.weight_decay),
        optax.trace(hyper.momentum),
        optax.scale_by_learning_rate(hyper.learning_rate),
    )


def _lion(hyper: HyperInputs) -> optax.GradientTransformation:
    return optax.lion(hyper.learning_rate, b1=hyper.beta1, b2=hyper.beta2, weight_decay=hyper.weight_decay)


def _adafactor(hyper: HyperInputs) -> optax.GradientTransformation:
    """Adafactor with whole second moments: factors would save little of an adapter, whose one side is its rank."""

    def root_mean_square(x: Array) -> Array:
        share = hyper.rank_share if x.ndim == FACTOR_DIMS else 1.0
        return jnp.sqrt(jnp.sum(jnp.square(x)) / (x.size * share))

    def scaled(update: Array, parameter: Array) -> Array:
        clipped = update / jnp.maximum(1.0, root_mean_square(update) / ADAFACTOR_CLIP)
        return clipped * jnp.maximum(root_mean_square(parameter), ADAFACTOR_MIN_SCALE)

    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=ADAFACTOR_DECAY),
        optax.stateless(lambda updates, parameters: jax.tree.map(scaled, updates, parameters)),
        optax.add_decayed_weights(hyper.weight_decay),
        optax.scale_by_learning_rate(hyper.learning_rate),
    )


OPTIMIZERS: Mapping[str, Callable[[HyperInputs], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
}
"""Optimiser by name; the numbers of a task's `HyperInputs.kind` count in this order."""

BEFORE: Mapping[str, Callable[[HyperInputs, Any, Any], Any]] = {"adamw": _before_adamw}
"""By optimiser: the parameters before its last step, of its state and those after it. Of the others one cannot tell, or
not well: SGD may move far."""

LARGEST_RATE_BACK, LARGEST_DECAY_BACK = 0.1, 0.1
"""Up to this rate, and this rate times weight decay, AdamW's steps are gone back over: what cancels is then about 1e-7.
Which runs keep their last good adapters depends on both, so that a change of them is one of `run_state.LAYOUT`."""


def goes_back(kind: str, rate: float, *, b_ratio: float, weight_decay: float) -> bool:
    """Whether `BEFORE` tells well enough where a step at this rate, or a smaller one, started."""
    largest = rate * max(b_ratio, 1.0)
    return kind in BEFORE and largest <= LARGEST_RATE_BACK and largest * weight_decay <= LARGEST_DECAY_BACK


def init_state(parameters: Any, num_tasks: int, kinds: tuple[str, ...] = ("adamw",)) -> dict[str, Any]:
    """{kind: state} over a pytree of leaves [T, ...]; every leaf of the state has the task axis first too."""
    hyper = jax.tree.map(jnp.asarray, no_inputs(num_tasks))
    return {kind: jax.vmap(lambda p, h, k=kind: OPTIMIZERS[k](h).init(p))(parameters, hyper) for kind in kinds}


def squared_norms(gradients: Any) -> Array:
    """[T] float32: sum of squares over everything but the task axis."""
    return sum(jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients))


def _choose(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)


def _before(parameters: Any, states: Mapping[str, Any], hyper: HyperInputs) -> Any:
    """The parameters that one task's last step started from; `BEFORE` has all its optimisers."""
    back = parameters
    for kind, state in states.items():
        with jax.numpy_dtype_promotion("standard"):
            earlier = BEFORE[kind](hyper, state, parameters)
        back = _choose(hyper.kind == list(OPTIMIZERS).index(kind), earlier, back)
    return back


def _with_ratio(updates: Any, b_ratio: Array) -> Any:
    """Updates are proportional to the learning rate, so b's own rate is a factor on b's updates (and on m's: PEFT)."""

    def scaled(path: tuple[Any, ...], update: Array) -> Array:
        return update if path[-1] == jax.tree_util.DictKey("a") else update * b_ratio

    return jax.tree_util.tree_map_with_path(scaled, updates)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskState:
    """Adapters and optimiser state by layer, leaves [T, ...].

    Attributes:
      adapters: current.
      last_good: the adapters of the last step whose gradient was finite, what a task falls back to; an empty tree for
        each layer where `BEFORE` tells them of all tasks.
      moments: optax state by optimiser, of those that the run's tasks use.
      averages: moving averages of the adapters, the adapters themselves for a task that keeps none; an empty tree for
        each layer where no task does.
    """

    adapters: dict[str, Any]
    last_good: dict[str, Any]
    moments: dict[str, Any]
    averages: dict[str, Any]

    @property
    def averaged(self) -> dict[str, Any]:
        """The adapters to evaluate and to export."""
        return self.averages if jax.tree.leaves(self.averages) else self.adapters

    def by_tree(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> TaskState:
        """The state of `function` of each of its trees."""
        return TaskState(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})


def update(
    state: TaskState, gradients: dict[str, Any], hyper: HyperInputs, squared_norm: Array, alive: Array
) -> tuple[TaskState, Array, Array]:
    """One step of every task that is active, alive and has a finite gradient; the others keep all they have.

    A task whose gradient is not finite goes back to its last good adapters, to float32 rounding where `BEFORE` tells
    them, and is not alive any more.

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

    def one_task(
        p: Any, good: Any, s: Any, average: Any, g: Any, h: HyperInputs, clip: Array, moves: Array, fails: Array
    ) -> tuple:
        clipped = jax.tree.map(lambda x: x * clip, g)
        moved, states = p, {}
        for kind, before in s.items():
            chosen = moves & (h.kind == list(OPTIMIZERS).index(kind))
            # optax raises the float32 beta to the integer count, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                updates, after = OPTIMIZERS[kind](h).update(clipped, before, p)
            new_p = optax.apply_updates(p, _with_ratio(updates, h.b_ratio))
            moved, states[kind] = _choose(chosen, (new_p, after), (moved, before))
        back = good or _before(p, s, h)
        new_p = _choose(moves, moved, _choose(fails, back, p))
        new_good = good and _choose(moves, p, good)
        if average:
            mean = jax.tree.map(lambda x, y: (1 - h.average_weight) * x + h.average_weight * y, average, new_p)
            average = _choose(moves, mean, _choose(fails, new_p, average))
        return new_p, new_good, states, average

    new = {
        layer: jax.vmap(one_task)(
            state.adapters[layer],
            state.last_good[layer],
            state.moments[layer],
            state.averages[layer],
            gradients[layer],
            hyper,
            clip,
            moves,
            fails,
        )
        for layer in state.adapters
    }
    adapters, last_good, moments, averages = ({layer: parts[i] for layer, parts in new.items()} for i in range(4))
    after = TaskState(adapters=adapters, last_good=last_good, moments=moments, averages=averages)
    return after, norm, alive & ~fails
