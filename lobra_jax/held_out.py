"""What a task's held-out losses say of it: which step was its best, and whether it should go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lobra_jax.engine import Engine
    from lobra_jax.feeder import EvaluationChunk

MAX_EXPONENT = 700.0
"""Largest loss, in nats, whose exponential is still a float."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The lowest held-out loss of a task, the step after which it was measured, evaluations since without a lower.

    Infinite, of step -1, where no loss was a number.
    """

    loss: float
    step: int
    misses: int = 0


def held_out_losses(engine: Engine, chunks: Iterable[EvaluationChunk], num_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """([T] mean loss of each task's held-out tokens, NaN without any; [T] their number)."""
    totals, tokens = np.zeros(num_tasks), np.zeros(num_tasks, np.int64)
    for chunk in chunks:
        targets = chunk.batch.num_target_tokens
        totals += engine.evaluate(chunk.arrays) * targets
        tokens += targets
    return np.divide(totals, tokens, out=np.full(num_tasks, np.nan), where=tokens > 0), tokens


def perplexity(loss: float) -> float:
    """exp of the mean loss in nats a token."""
    return math.exp(min(loss, MAX_EXPONENT))


def after_evaluation(best: BestSoFar | None, *, loss: float, step: int) -> BestSoFar:
    """The best after one more evaluation; its `step` is this one's if the loss is lower than all before.

    A loss that is not a number is never the best.
    """
    best = BestSoFar(loss=math.inf, step=-1) if best is None else best
    if loss < best.loss:
        return BestSoFar(loss=loss, step=step)
    return dataclasses.replace(best, misses=best.misses + 1)


def is_spent(best: BestSoFar, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought nothing better."""
    return patience is not None and best.misses >= patience
