"""How long a step's dispatch takes and how near the bound it ends: `python -m profiling.bench.dispatch --out FILE`.

Plans of 8 and of 64 replicas on the published 7B costs, batches drawn from the six tasks' lengths. Wall and CPU
seconds are both reported: on a machine that others use too, the CPU seconds are the ones to compare.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from planner import balance
from planner.bucketing import bucket_lengths, choose_buckets, least_padding_buckets
from planner.cost import CostTable
from planner.dispatch import Dispatch, dispatch
from planner.evaluate import evaluate
from planner.files import check_out, write_json
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.problem import usable_config
from planner.workload import Workload
from profiling.bench.provenance import provenance

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUM_BUCKETS = 16
TIME_LIMIT_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A plan, as (replicas, tp, pp) of configs without remat, and sequences a step."""

    name: str
    replicas: tuple[tuple[int, int, int], ...]
    num_sequences: int


CASES = (
    Case(name="8 replicas", replicas=((1, 8, 1), (1, 2, 1), (6, 1, 1)), num_sequences=625),
    Case(name="8 replicas, LobRA's batch", replicas=((1, 8, 1), (1, 2, 1), (6, 1, 1)), num_sequences=832),
    Case(name="8 replicas, 5000", replicas=((1, 8, 1), (1, 2, 1), (6, 1, 1)), num_sequences=5000),
    Case(name="64 replicas", replicas=((4, 8, 1), (6, 4, 1), (10, 2, 1), (44, 1, 1)), num_sequences=5000),
    Case(
        name="64 replicas, pipelines",
        replicas=((4, 8, 1), (4, 1, 16), (6, 4, 2), (10, 1, 8), (40, 1, 2)),
        num_sequences=5000,
    ),
)


@click.command(epilog="\b\nExample:\n  python -m profiling.bench.dispatch --out profiling/results/dispatch.json")
@click.option("--steps", type=click.IntRange(min=1), default=40, show_default=True, help="Batches of each case.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the batches.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the rows as JSON.")
def main(steps: int, seed: int, out: Path | None) -> None:
    """Time the dispatch of sampled batches and compare it with its bound."""
    check_out(out)
    costs = CostTable.load(CONFIGS / "costs" / "llama2_7b_a100_40g.json")
    workload = Workload.load(CONFIGS / "lengths" / "lobra_six_tasks.json")
    rows = [_case(case, costs, workload, steps, seed) for case in CASES]
    for row in rows:
        click.echo(
            f"{row['case']:>27}, {row['num_sequences']} sequences: p50 {1e3 * row['wall_s']['p50']:.1f} ms, "
            f"p95 {1e3 * row['wall_s']['p95']:.1f} ms (CPU {1e3 * row['cpu_s']['p50']:.1f}, "
            f"{1e3 * row['cpu_s']['p95']:.1f}); gap p50 {row['gap']['p50']:.2%}, p95 {row['gap']['p95']:.2%}; "
            f"ahead of a step CPU p95 {1e3 * row['ahead_cpu_s']['p95']:.1f} ms, gap p50 {row['ahead_gap']['p50']:.2%}, "
            f"p95 {row['ahead_gap']['p95']:.2%}; "
            f"first valid share-out CPU p50 {1e3 * row['first_valid_cpu_s']['p50']:.1f} ms; "
            f"{NUM_BUCKETS} buckets CPU p50 {1e3 * row['buckets_cpu_s']['p50']:.1f} ms of the plan's, "
            f"{1e3 * row['fresh_buckets_cpu_s']['p50']:.1f} ms of all multiples of 16"
        )
    if out is not None:
        record = {
            "what": "planner.dispatch.dispatch, method balance, on sampled batches; seconds of a call",
            "command": f"python -m profiling.bench.dispatch --steps {steps} --seed {seed}",
            **provenance(("numpy", "pyscipopt")),
            "rows": rows,
        }
        write_json(out, record)
        click.echo(str(out))


def _case(case: Case, costs: CostTable, workload: Workload, steps: int, seed: int) -> dict[str, Any]:
    plan = _plan(case, costs, workload)
    wall, cpu, gaps, first, bucketing, fresh, ahead_cpu, ahead_gaps = ([] for _ in range(8))
    for step in range(steps):
        lengths, tasks = _batch(workload, case.num_sequences, seed, step)
        spent, dispatched = _timed(lambda lengths=lengths, tasks=tasks: _dispatch(plan, costs, lengths, tasks))
        wall.append(spent[0])
        cpu.append(spent[1])
        if evaluate(plan, costs, dispatched, lengths).violations:
            raise RuntimeError(f"{case.name}, step {step}: {evaluate(plan, costs, dispatched, lengths).violations[0]}")
        gaps.append(_gap(dispatched))
        spent, dispatched = _timed(lambda lengths=lengths, tasks=tasks: _dispatch(plan, costs, lengths, tasks, True))
        ahead_cpu.append(spent[1])
        ahead_gaps.append(_gap(dispatched))
        bucketing.append(_timed(lambda lengths=lengths: choose_buckets(lengths, plan.buckets, NUM_BUCKETS))[0][1])
        fresh.append(_timed(lambda lengths=lengths: least_padding_buckets(lengths, NUM_BUCKETS))[0][1])
        table, counts = _tables(plan, costs, lengths)
        first.append(_timed(lambda table=table, counts=counts: balance.list_schedule(table, counts))[0][1])
    return {
        "case": case.name,
        "plan": str(plan),
        "num_sequences": case.num_sequences,
        "num_buckets": len(plan.buckets),
        "wall_s": _quantiles(wall),
        "cpu_s": _quantiles(cpu),
        "gap": _quantiles(gaps),
        "share_within_1_percent": float(np.mean(np.array(gaps) <= 0.01)),
        "ahead_cpu_s": _quantiles(ahead_cpu),
        "ahead_gap": _quantiles(ahead_gaps),
        "first_valid_cpu_s": _quantiles(first),
        "buckets_cpu_s": _quantiles(bucketing),
        "fresh_buckets_cpu_s": _quantiles(fresh),
    }


def _plan(case: Case, costs: CostTable, workload: Workload) -> Plan:
    configs = [(count, costs[ParallelConfig(tp=tp, pp=pp, remat="none")]) for count, tp, pp in case.replicas]
    groups = tuple(
        ReplicaGroup(count=count, config=cost.config, capacity_tokens=cost.capacity_tokens) for count, cost in configs
    )
    capacity = max(group.capacity_tokens for group in groups)
    return Plan(
        model=costs.model,
        num_devices=sum(group.num_devices for group in groups),
        replicas=groups,
        buckets=bucket_lengths(workload, "dynamic", num_buckets=NUM_BUCKETS, max_capacity_tokens=capacity),
    )


def _batch(workload: Workload, num_sequences: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, tasks) of about as many sequences, in the tasks' proportions."""
    scale = num_sequences / workload.global_batch_size
    tasks = tuple(dataclasses.replace(task, batch_size=round(task.batch_size * scale)) for task in workload.tasks)
    task_ids, lengths = Workload(tasks=tasks).sample(np.random.default_rng([seed, step]))
    return lengths, task_ids


def _dispatch(plan: Plan, costs: CostTable, lengths: np.ndarray, tasks: np.ndarray, ahead: bool = False) -> Dispatch:
    return dispatch(plan, costs, lengths, tasks, max_buckets=NUM_BUCKETS, time_limit_s=TIME_LIMIT_S, ahead=ahead)


def _gap(dispatched: Dispatch) -> float:
    return max(dispatched.predicted_s) / dispatched.bound_s - 1


def _tables(plan: Plan, costs: CostTable, lengths: np.ndarray) -> tuple[balance.Tables, list[int]]:
    usable = {group.config: usable_config(costs[group.config], plan.buckets) for group in plan.replicas}
    counts = np.bincount(np.searchsorted(plan.buckets, lengths), minlength=len(plan.buckets)).tolist()
    return balance.tables([usable[group.config] for group in plan.expanded()], counts), counts


def _timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """((wall, CPU) seconds, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {"p50": float(np.quantile(values, 0.5)), "p95": float(np.quantile(values, 0.95))}


if __name__ == "__main__":
    main()
