"""Which steps of a run are traced, and what a trace's marks are called. Imports no JAX."""

from __future__ import annotations

import dataclasses
import re

from planner.errors import UserError

ISSUE_MARK = "lobra issue"
"""The host issues a step, whose number is the mark's `step_num`."""

READY_MARK = "lobra ready"
"""A step's new adapters are on every replica."""

PAUSE_MARK = "lobra pause"
"""The host turns to something else than steps: the next begins when it is issued."""

FIRST_TRACEABLE = 2
"""The first step still is a warm-up: it runs on the state as it was made, others as updates leave it."""

_FORM = re.compile(r"(\d+)-(\d+)")
_EXPECTED = "FIRST-LAST, such as 3-4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedSteps:
    """Steps `first` to `last`, both included, the run's first being 1."""

    first: int
    last: int

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def parse_steps(text: str) -> TracedSteps:
    """The steps that `--trace` names; UserError unless it is FIRST-LAST."""
    found = _FORM.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError("not a range of steps", key="--trace", value=text, expected=_EXPECTED)
    return TracedSteps(first=int(found[1]), last=int(found[2]))


def check_steps(steps: TracedSteps, *, done: int, num_steps: int) -> None:
    """Refuses steps that a run which has done `done` of its `num_steps` steps does not make, or makes first."""
    earliest = done + FIRST_TRACEABLE
    if earliest <= steps.first and steps.last <= num_steps:
        return
    expected = f"steps from {earliest}, as the first is a warm-up, to {num_steps}"
    raise UserError("steps that cannot be traced", key="--trace", value=str(steps), expected=expected)
