"""Pipeline schedules as plain data: which stage does which micro-batch's forward or backward, in which order."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

FORWARD = "forward"
BACKWARD = "backward"
FUSED = "fused"
"""Forward and backward in one program: the last stage, where the backward follows at once."""

FORWARD_SHARE = 1 / 3
"""Part of a forward and a backward together that the forward is taken to be."""


@dataclasses.dataclass(frozen=True)
class Action:
    """One stage working on one micro-batch."""

    stage: int
    phase: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.phase[0].upper()}{self.micro_batch}"


def one_f_one_b(num_stages: int, num_micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """1F1B (Narayanan et al., 2019): each stage's actions in order.

    Stage p runs min(num_stages - 1 - p, num_micro_batches) forwards ahead, then alternates forward and backward, so
    it never holds more than num_stages - p micro-batches' activations. The last stage's pairs are fused.
    """
    if num_stages < 1 or num_micro_batches < 0:
        raise ValueError(f"num_stages = {num_stages}, num_micro_batches = {num_micro_batches}: expected >= 1 and >= 0")
    stages = []
    for stage in range(num_stages - 1):
        ahead = min(num_stages - 1 - stage, num_micro_batches)
        actions = [Action(stage, FORWARD, m) for m in range(ahead)]
        for m in range(num_micro_batches):
            if m + ahead < num_micro_batches:
                actions.append(Action(stage, FORWARD, m + ahead))
            actions.append(Action(stage, BACKWARD, m))
        stages.append(tuple(actions))
    stages.append(tuple(Action(num_stages - 1, FUSED, m) for m in range(num_micro_batches)))
    return tuple(stages)


def dependency(action: Action, num_stages: int) -> Action | None:
    """The other stage's action whose output this one needs; None for the first stage's forwards."""
    last = num_stages - 1
    if action.phase in (FORWARD, FUSED):
        if action.stage == 0:
            return None
        return Action(action.stage - 1, FORWARD, action.micro_batch)
    following = action.stage + 1
    return Action(following, FUSED if following == last else BACKWARD, action.micro_batch)


def issue_order(schedule: Sequence[Sequence[Action]]) -> tuple[Action, ...]:
    """One order in which a single controller can issue all stages' actions: every dependency comes first.

    Rounds over the stages, one action each where its input exists, keep all stages' queues filling evenly.
    """
    num_stages = len(schedule)
    queues = [deque(actions) for actions in schedule]
    done: set[Action] = set()
    order: list[Action] = []
    while any(queues):
        ready = [q for q in queues if q and dependency(q[0], num_stages) in done | {None}]
        if not ready:
            raise ValueError("the schedule deadlocks: no stage's next action has its input")
        for queue in ready:
            action = queue.popleft()
            order.append(action)
            done.add(action)
    return tuple(order)


def simulate(
    schedule: Sequence[Sequence[Action]], seconds: Sequence[Sequence[float]]
) -> dict[Action, tuple[float, float]]:
    """When each action would run, (start_s, end_s), if action a of stage p takes as long as `seconds` says.

    Args:
      schedule: as from `one_f_one_b`.
      seconds: [micro_batch][stage] of forward + backward; FORWARD_SHARE of it is the forward.
    """
    num_stages = len(schedule)
    free = [0.0] * num_stages
    times: dict[Action, tuple[float, float]] = {}
    share = {FORWARD: FORWARD_SHARE, BACKWARD: 1 - FORWARD_SHARE, FUSED: 1.0}
    for action in issue_order(schedule):
        needs = dependency(action, num_stages)
        start = max(free[action.stage], times[needs][1] if needs is not None else 0.0)
        end = start + seconds[action.micro_batch][action.stage] * share[action.phase]
        times[action] = (start, end)
        free[action.stage] = end
    return times
