"""Configs that some other does all for: no plan needs them, so the exact planner leaves them out.

Config v does all for u where it takes no more devices and no more fixed seconds, fits every bucket that u fits, and
serves the sequences of any slot of u in slots of its own that take no longer in all, nor, the largest of them times
pp - 1, add more to the bubble. A replica of u's can then be one of v's, whatever it runs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from planner.problem import PlanningProblem, UsableConfig

ROUNDING = 1e-12
"""Relative difference up to which seconds are the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table:
    """All configs' slots: `rows`, `slot_s` [C, J, O], ascending, the last repeated; rows 0 where a bucket does not
    fit."""

    rows: np.ndarray
    slot_s: np.ndarray
    bubbles: np.ndarray
    fixed_s: np.ndarray
    devices: np.ndarray

    @classmethod
    def of(cls, configs: tuple[UsableConfig, ...]) -> _Table:
        width = max(len(options) for usable in configs for options in usable.rows)

        def padded(options: tuple[float, ...]) -> tuple[float, ...]:
            return options + options[-1:] * (width - len(options)) if options else (0,) * width

        return cls(
            rows=np.array([[padded(own) for own in usable.rows] for usable in configs], dtype=np.int64),
            slot_s=np.array([[padded(own) for own in usable.slot_s] for usable in configs], dtype=np.float64),
            bubbles=np.array([usable.config.pp - 1.0 for usable in configs]),
            fixed_s=np.array([usable.cost.fixed_s for usable in configs]),
            devices=np.array([usable.num_devices for usable in configs]),
        )


def undominated(problem: PlanningProblem) -> np.ndarray:
    """[C] bool: what is left when no config is there that another which is left does all for; all that are pinned."""
    table, counts = _Table.of(problem.configs), np.array(problem.counts)
    counts[-1] = max(counts[-1], 1)  # some replica has to fit the last bucket, used or not
    kept = np.ones(len(problem.configs), dtype=bool)
    for config in reversed(range(len(kept))):  # of two that do all for each other the first stays
        if not problem.pinned_counts[config]:
            kept[config] = False  # it does all for itself
            kept[config] = not (_does_all_for(table, config, counts) & kept).any()
    return kept


def _does_all_for(table: _Table, config: int, counts: np.ndarray) -> np.ndarray:
    """[C] which configs do all for this one."""
    buckets = np.flatnonzero((counts > 0) & (table.rows[config, :, -1] > 0))
    wanted = np.minimum(table.rows[config, buckets], counts[buckets, None])  # [j, O]
    allowed_s = table.slot_s[config, buckets] * (1 + ROUNDING)
    full = table.rows[:, buckets, -1:]  # [C, j, 1]
    num_full, rest = np.divmod(wanted, np.maximum(full, 1))  # [C, j, O]
    option = (table.rows[:, buckets, None, :] < rest[..., None]).sum(axis=-1)  # the first with enough rows
    rest_s = np.where(rest > 0, np.take_along_axis(table.slot_s[:, buckets], option, axis=-1), 0.0)
    full_s = table.slot_s[:, buckets, -1:]
    work_s = num_full * full_s + rest_s
    top_s = np.maximum(np.where(num_full > 0, full_s, 0.0), rest_s)
    is_quick = (work_s <= allowed_s) & (table.bubbles[:, None, None] * top_s <= table.bubbles[config] * allowed_s)
    return (
        ((full > 0) & is_quick).all(axis=(1, 2))
        & (table.devices <= table.devices[config])
        & (table.fixed_s <= table.fixed_s[config])
    )


def without_dominated(problem: PlanningProblem) -> tuple[PlanningProblem, np.ndarray]:
    """(the problem of the configs that `undominated` leaves, their indices in the given one)."""
    kept = np.flatnonzero(undominated(problem))
    return dataclasses.replace(
        problem,
        configs=tuple(problem.configs[index] for index in kept),
        pinned=tuple(problem.pinned_counts[index] for index in kept),
    ), kept
