"""What a task's held-out losses say of it: which step was its best, and whether it should go on."""

from __future__ import annotations

import dataclasses
import math

MAX_EXPONENT = 700.0
"""Largest loss, in nats, whose exponential is still a float."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The lowest held-out loss of a task, the step after which it was measured, evaluations since without a lower."""

    loss: float
    step: int
    misses: int = 0


def perplexity(loss: float) -> float:
    """exp of the mean loss in nats a token."""
    return math.exp(min(loss, MAX_EXPONENT))


def after_evaluation(best: BestSoFar | None, *, loss: float, step: int) -> BestSoFar:
    """The best after one more evaluation; its `step` is this one's if the loss is lower than all before.

    A loss that is not a number is never the best.
    """
    if best is None or loss < best.loss or math.isnan(best.loss):
        return BestSoFar(loss=loss, step=step)
    return dataclasses.replace(best, misses=best.misses + 1)


def is_spent(best: BestSoFar, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought nothing better."""
    return patience is not None and best.misses >= patience
