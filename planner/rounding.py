"""Whole replicas from fractional patterns: gives each replica of a deployment a pattern, a few at a time.

A dive solves the master for the replicas and counts that are left, finds patterns for those counts, hands out the
patterns that the master uses whole times (else the one that it uses most), and starts over. What is left at the end
goes to the replicas that finish it earliest; `planner.local_search` and `planner.resplit` improve the share-out.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from planner import balance, prices
from planner.balance import Share
from planner.cuts import Cut, violated
from planner.local_search import improve
from planner.master import Master
from planner.patterns import Lattice, Pattern, lattice_of, slots_of
from planner.prices import Relaxed
from planner.pricing import NUM_CELLS, Pricer
from planner.problem import ReplicaProblem
from planner.relaxation import STRICT, SURPLUS, WORTHWHILE
from planner.repair import repair
from planner.resplit import resplit

ROUNDS = 4
"""Rounds of pricing before each hand-out."""

WHOLE = 1e-6
"""A pattern used this close to a whole number of times is used that often."""

NEARLY_MOST = 0.6
"""Of the patterns used at least this share of the most used one, the one with the longest bucket goes first."""

THRIFT = 0.3
"""Share of the counts that a dive's master gives up to leave all devices free: room for what rounding leaves over."""

RESPLITS, MOST_RESPLITS = 16, 250
"""Pairs for each replica, and in all, whose loads a dive shares out anew at the end: more end no search sooner."""

SAFETY = 5
"""Multiple of the seconds for local search at which re-splits are cut: the clock should not tell what they find."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoundedShare:
    """A share-out of the planned counts over the replicas of a deployment, configs in the order of `replicas` [R]."""

    replicas: tuple[int, ...]
    share: Share

    def in_order(self) -> Share:
        """The share-out with replicas in the order of their configs."""
        order = np.argsort(self.replicas, kind="stable")
        return Share(loads=self.share.loads[order], replica_s=self.share.replica_s[order])


def dive(
    problem: ReplicaProblem,
    replica_s: float,
    patterns: Sequence[Pattern],
    *,
    lower: Sequence[int],
    upper: Sequence[int],
    must_fit: int | None = None,
    deadline: float = math.inf,
    improve_s: float = math.inf,
    most_resplits: int = MOST_RESPLITS,
    cutting: bool = False,
) -> RoundedShare:
    """Chooses replicas and shares the counts out over them so that each ends by `replica_s` if it can.

    Args:
      patterns: of the problem at about this T, to start from.
      lower, upper: [C] the least and most replicas of each config; equal where these are given. Within them replicas
        are chosen one pattern after the other, so that the last ones suit what the first ones left.
      must_fit: the bucket that some replica has to fit, used or not, by default the longest; no shorter than any with
        counts.
      deadline: (of `time.perf_counter`) after which the rest is handed out greedily.
      improve_s: seconds of local search at the end, before re-splits. Without both no clock is looked at.
      most_resplits: pairs of replicas whose loads are shared out anew at the very end.
      cutting: with cuts of whole slots (`planner.cuts`) in the master: slower, other plans, often better ones.
    """
    devices = np.array([usable.num_devices for usable in problem.configs])
    must_fit = len(problem.counts) - 1 if must_fit is None else must_fit
    covers = np.array([usable.fits(must_fit) for usable in problem.configs])
    able = np.flatnonzero(covers & (np.asarray(upper) > 0) & (devices <= problem.num_devices))
    cover = int(able[devices[able].argmin()])
    left, used, num_left = np.array(problem.counts), np.zeros(len(devices), dtype=int), problem.num_devices
    pool = [p for p in patterns if upper[p.config] and p.seconds <= replica_s * (1 + SURPLUS)]
    lattices = [lattice_of(usable) for usable in problem.configs]
    replicas: list[int] = []
    loads: list[np.ndarray] = []
    while left.any() and time.perf_counter() < deadline:
        low = np.maximum(np.asarray(lower) - used, 0)
        high = np.minimum(np.asarray(upper) - used, num_left // devices)
        if not high.any():
            break
        rest = dataclasses.replace(problem, counts=tuple(left.tolist()), num_devices=num_left)
        covered = (covers & ((used > 0) | (low > 0))).any()
        handed_out = _hand_out(
            rest,
            low,
            high,
            lattices,
            replica_s,
            pool,
            must_fit=must_fit,
            cover=None if covered else cover,
            cutting=cutting,
        )
        if not handed_out:
            break
        for pattern in handed_out:
            taken = np.minimum(pattern.rows, left)
            replicas.append(pattern.config)
            loads.append(taken)
            left = left - taken
            used[pattern.config] += 1
            num_left -= int(devices[pattern.config])
    idle = np.maximum(np.asarray(lower) - used, 0)
    if not (covers & (used + idle > 0)).any():
        idle[cover] += 1
    for config, count in enumerate(idle.tolist()):
        replicas += [config] * count
        loads += [np.zeros_like(left)] * count
    return _finished(problem, replicas, np.array(loads), left, replica_s, improve_s, deadline, most_resplits)


def _hand_out(
    problem: ReplicaProblem,
    lower: np.ndarray,
    upper: np.ndarray,
    lattices: Sequence[Lattice],
    replica_s: float,
    pool: list[Pattern],
    *,
    must_fit: int,
    cover: int | None,
    cutting: bool,
) -> list[Pattern]:
    """Patterns for some of a problem's replicas. `pool` is cut to what is left and gains patterns.

    Devices are kept for `lower`, and for one replica of config `cover`, if given, until one fits bucket
    `must_fit`.
    """
    left = np.array(problem.counts)
    pool[:] = _cut_to([pattern for pattern in pool if upper[pattern.config]], left)
    nothing = (0,) * len(problem.counts)
    slots = [slots_of(u, problem.counts if n else nothing) for u, n in zip(problem.configs, upper, strict=True)]
    pricer = Pricer(problem, slots, lattices, replica_s, num_cells=NUM_CELLS)
    master = Master(problem, lower, upper, lattices, must_fit=None if cover is None else must_fit, thrift=THRIFT)
    master.add(pool)
    if not pool:
        found = pricer.price(np.ones(len(left)), np.zeros(len(upper)))[1]
        master.add(found)
    cuts: list[Cut] = []
    for _ in range(ROUNDS):
        if not master.patterns:
            return []
        solution = master.solve()
        new = []
        if cutting:
            new = violated(problem.counts, lattices, master.patterns, solution.uses, solution.scale, cuts)
        if new:
            master.add_cuts(new)
            pricer.add(new)
            cuts += new
            solution = master.solve()
        enough = solution.charges * (1 + WORTHWHILE) + STRICT
        found = pricer.price(solution.prices, enough)[1]
        found = [dataclasses.replace(p, rows=np.minimum(p.rows, left)) for p in found]
        if not found:
            break
        master.add(found)
        pool += found
    solution = master.solve()
    whole = np.floor(solution.uses + WHOLE).astype(int)
    if not whole.any():
        whole[_next(solution.uses, master.patterns)] = 1
    out: list[Pattern] = []
    devices = np.array([usable.num_devices for usable in problem.configs])
    needed, room, num_left = lower.copy(), upper.copy(), problem.num_devices
    reserve = 0 if cover is None else int(devices[cover])
    for index in np.flatnonzero(whole).tolist():
        pattern = master.patterns[index]
        config = pattern.config
        for _ in range(int(whole[index])):
            fits = problem.configs[config].fits(must_fit)
            free = num_left - int(needed @ devices) - (0 if fits else reserve)
            if room[config] == 0 or (needed[config] == 0 and free < devices[config]):
                break
            out.append(pattern)
            room[config] -= 1
            needed[config] = max(needed[config] - 1, 0)
            num_left -= int(devices[config])
            reserve = 0 if fits else reserve
    return out


def _cut_to(patterns: Sequence[Pattern], left: np.ndarray) -> list[Pattern]:
    """The patterns that serve any of what is left, with no more of it than there is, each once."""
    if not patterns:
        return []
    configs = np.array([[pattern.config] for pattern in patterns])
    rows = np.minimum(np.array([pattern.rows for pattern in patterns]), left)
    _, first = np.unique(np.concatenate([configs, rows], axis=1), axis=0, return_index=True)
    return [
        dataclasses.replace(patterns[index], rows=rows[index])
        for index in np.sort(first[rows[first].any(axis=1)]).tolist()
    ]


def _next(uses: np.ndarray, patterns: Sequence[Pattern]) -> int:
    """Which pattern to hand out where none is used a whole time: few configs fit long buckets, so these go first."""
    candidates = np.flatnonzero(uses >= NEARLY_MOST * uses.max()).tolist()
    return max(candidates, key=lambda index: (int(np.flatnonzero(patterns[index].rows)[-1]), uses[index]))


def _finished(
    problem: ReplicaProblem,
    replicas: Sequence[int],
    loads: np.ndarray,
    left: np.ndarray,
    replica_s: float,
    improve_s: float,
    deadline: float,
    most_resplits: int,
) -> RoundedShare:
    """Adds what is left, longest first, each micro-batch to the replica that then ends first; and improves."""
    kinds = [problem.configs[config] for config in replicas]
    table = balance.tables(kinds, problem.counts)
    loads, left = loads.copy(), left.copy()
    every = np.arange(len(kinds))
    for bucket in reversed(range(len(left))):
        full = np.array([u.full_rows(bucket) if u.fits(bucket) else 0 for u in kinds])
        if left[bucket] and not full.any():
            raise ValueError(f"no replica fits bucket {bucket}, which has {left[bucket]} sequences left")
        while left[bucket] > 0:
            piece = np.minimum(full, left[bucket])
            trial = loads.copy()
            trial[every, bucket] += piece
            seconds = np.where(piece > 0, table.replica_s(trial), np.inf)
            chosen = int(seconds.argmin())
            loads[chosen, bucket] += piece[chosen]
            left[bucket] -= piece[chosen]
    share = improve(table, loads, time_limit_s=improve_s, good_s=replica_s)
    if share.max_s > replica_s:
        members = [kinds[int(index)] for index in np.unique(table.kind, return_index=True)[1]]
        relaxed = prices.relax(members, np.bincount(table.kind).tolist(), problem.counts)
        share = _repaired(table, relaxed, share, replica_s, improve_s)
        share = resplit(
            table,
            share,
            replica_s,
            relaxed.prices,
            relaxed.kind_prices,
            max_pairs=min(RESPLITS * len(kinds), most_resplits),
            deadline=min(deadline, time.perf_counter() + SAFETY * improve_s),
        )
    return RoundedShare(replicas=tuple(replicas), share=share)


def _repaired(
    table: balance.Tables,
    relaxed: Relaxed,
    share: Share,
    replica_s: float,
    improve_s: float,
) -> Share:
    """The share-out with what is over `replica_s`, or over half as much too long, placed anew; never a slower one."""
    nothing = np.zeros(share.loads.shape[1], dtype=np.int64)
    best = share
    for target_s in (replica_s, (replica_s + share.max_s) / 2):
        loads = repair(table, best.loads, nothing, relaxed.prices, relaxed.kind_prices, target_s)
        found = improve(table, loads, time_limit_s=improve_s, good_s=replica_s)
        best = min(best, found, key=lambda candidate: candidate.max_s)
    return best
