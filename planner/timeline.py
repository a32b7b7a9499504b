"""One simulated step as a timeline: what every replica does when, by the cost model, as text and as data.

A replica first pays its fixed time, then fills its pipeline, as long as its largest micro-batch takes on all stages but
one, then runs its micro-batches. All wait for the slowest, then gradients are summed and adapters updated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost import CostTable
from planner.dispatch import Dispatch
from planner.plan import Plan

WIDTH = 64
"""Characters of a line of text, all of the step."""

START, UPDATE, WAIT = "~", "+", "."
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

MOST_LINES = 24
"""With more replicas only the quickest and the slowest of each kind are drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """`rows` x `length` tokens from `start_s` to `end_s`; 0 x 0 is fixed time and pipeline filling."""

    start_s: float
    end_s: float
    rows: int = 0
    length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step. `spans` of each replica in the order of `plan.expanded()`; seconds count from the step's start.

    `work_s` is when the slowest replica is done, `step_s` when the adapters are updated.
    """

    step: int
    spans: tuple[tuple[Span, ...], ...]
    work_s: float
    step_s: float


def step_timeline(step: int, plan: Plan, costs: CostTable, dispatched: Dispatch) -> Timeline:
    """The timeline of a dispatched step."""
    spans = []
    for group, micro_batches in zip(plan.expanded(), dispatched.replicas, strict=True):
        cost, own = costs.of(group), []
        slots = [micro.slot_s(cost) for micro in micro_batches]
        clock = cost.fixed_s + (group.config.pp - 1) * max(slots) if slots else 0.0
        if clock > 0:
            own.append(Span(start_s=0.0, end_s=clock))
        for micro, slot_s in zip(micro_batches, slots, strict=True):
            own.append(Span(start_s=clock, end_s=clock + slot_s, rows=micro.rows, length=micro.length))
            clock += slot_s
        spans.append(tuple(own))
    work_s = max((own[-1].end_s for own in spans if own), default=0.0)
    return Timeline(step=step, spans=tuple(spans), work_s=work_s, step_s=work_s + costs.step_overhead_s)


def timeline_lines(timeline: Timeline, names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """A line a replica, time from left to right, a letter a padded length; then what the signs mean.

    Args:
      names, kinds: of each replica, what its line begins with and which replicas are alike.
    """
    lengths = sorted({span.length for own in timeline.spans for span in own if span.length})
    letters = {length: LETTERS[index % len(LETTERS)] for index, length in enumerate(lengths)}
    shown = _shown(timeline, kinds)
    margin = max(len(names[index]) for index in shown)
    lines = [f"{names[index]:<{margin}} |{_line(timeline, timeline.spans[index], letters)}|" for index in shown]
    if len(shown) < len(names):
        lines.append(f"(of {len(names)} replicas the quickest and the slowest of each kind)")
    legend = [f"{letter} to {length}" for length, letter in letters.items()]
    signs = [f"{START} start-up and pipeline filling", f"{WAIT} waits", f"{UPDATE} gradient sum and update"]
    return [*lines, f"padded tokens: {', '.join(legend)}; {', '.join(signs)}"]


def _shown(timeline: Timeline, kinds: Sequence[str]) -> list[int]:
    if len(kinds) <= MOST_LINES:
        return list(range(len(kinds)))
    ends = [own[-1].end_s if own else 0.0 for own in timeline.spans]
    shown = set()
    for kind in dict.fromkeys(kinds):
        members = [index for index, other in enumerate(kinds) if other == kind]
        shown |= {min(members, key=ends.__getitem__), max(members, key=ends.__getitem__)}
    return sorted(shown)


def _line(timeline: Timeline, own: Sequence[Span], letters: dict[int, str]) -> str:
    """What the replica does in the middle of each of WIDTH equal parts of the step."""
    out = []
    for column in range(WIDTH):
        at_s = (column + 0.5) / WIDTH * timeline.step_s
        span = next((span for span in own if span.start_s <= at_s < span.end_s), None)
        if span is not None:
            out.append(letters.get(span.length, START))
        else:
            out.append(WAIT if at_s < timeline.work_s else UPDATE)
    return "".join(out)
