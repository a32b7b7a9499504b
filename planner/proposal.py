"""LobRA's configuration proposal (paper, section 4): plan with a few good parallel configs instead of all of them.

Configs that can serve the same buckets compete with each other. Of each such group two stay: the one with the best
throughput per device, measured at the longest bucket that they serve, and the one that needs the fewest devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.problem import PlanningProblem, UsableConfig

PROPOSAL_MICRO_BATCHES = 16
"""Micro-batches a step when throughputs are compared, as in the original: they share the filling of the pipeline."""


def tokens_per_device_second(usable: UsableConfig, bucket: int, length: int) -> float:
    """Padded tokens a device works off in a second when the replica runs full micro-batches of one bucket."""
    slots = PROPOSAL_MICRO_BATCHES + usable.config.pp - 1
    tokens = PROPOSAL_MICRO_BATCHES * usable.full_rows(bucket) * length
    seconds = usable.cost.fixed_s + slots * usable.slot_s[bucket][-1]
    return tokens / (seconds * usable.num_devices)


def longest_bucket(usable: UsableConfig) -> int:
    """Number (from 0) of the longest bucket within the config's capacity."""
    return max(bucket for bucket in range(len(usable.rows)) if usable.fits(bucket))


def propose(problem: PlanningProblem) -> tuple[int, ...]:
    """Numbers (ascending, into `problem.configs`) of the configs to plan with; all of them if `proposal` is off."""
    if not problem.proposal:
        return tuple(range(len(problem.configs)))
    rivals: dict[int, list[int]] = {}
    for number, usable in enumerate(problem.configs):
        rivals.setdefault(longest_bucket(usable), []).append(number)
    kept = {pick for bucket, numbers in rivals.items() for pick in _best_two(problem, bucket, numbers)}
    return tuple(sorted(kept))


def _best_two(problem: PlanningProblem, bucket: int, numbers: Sequence[int]) -> tuple[int, int]:
    configs = problem.configs

    def throughput(number: int) -> float:
        return tokens_per_device_second(configs[number], bucket, problem.buckets[bucket])

    fastest = max(numbers, key=lambda n: (throughput(n), -configs[n].num_devices))
    narrowest = min(numbers, key=lambda n: (configs[n].num_devices, -throughput(n)))
    return fastest, narrowest
