"""What a task's config means to the adapters, the optimiser and the random streams."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lobra_jax.config import RunConfig, TaskConfig
from lobra_jax.data.batches import task_key
from lobra_jax.lora import LoraSpec
from lobra_jax.optim import TaskOptimizer, goes_back, learning_rates


def lora_spec(task: TaskConfig) -> LoraSpec:
    return LoraSpec(
        rank=task.rank,
        alpha=task.alpha,
        rslora=task.rslora,
        targets=tuple(task.targets),
        dropout=task.dropout,
        dora=task.dora,
    )


def adapter_seed(config: RunConfig, task: TaskConfig) -> int:
    """64 bits that the task's initial adapter is drawn from."""
    key = task_key(seed=config.training.seed, task_seed=task.seed, name=task.name, purpose="adapter")
    return key & 0xFFFF_FFFF_FFFF_FFFF


def task_optimizer(task: TaskConfig) -> TaskOptimizer:
    return TaskOptimizer(
        learning_rates=learning_rates(
            task.schedule.kind,
            task.lr,
            steps=task.steps,
            warmup_steps=task.schedule.warmup_steps,
            final_fraction=task.schedule.final_fraction,
            decay_fraction=task.schedule.decay_fraction,
        ),
        weight_decay=task.weight_decay,
        beta1=task.beta1,
        beta2=task.beta2,
        epsilon=task.epsilon,
        clip_norm=math.inf if task.clip_norm is None else task.clip_norm,
        kind=task.optimizer,
        momentum=task.momentum,
        b_ratio=task.lora_plus_ratio,
        rank=task.rank,
        ema_decay=task.ema_decay,
    )


def keep_last_good(tasks: Iterable[TaskConfig]) -> bool:
    """Whether a run of these tasks keeps the adapters before each step, for one that has to go back."""
    return not all(
        goes_back(task.optimizer, task.lr, b_ratio=task.lora_plus_ratio, weight_decay=task.weight_decay)
        for task in tasks
    )
