"""How many padded lengths: what the rows count, and which is chosen."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from planner import planning
from planner.bucket_choice import NUM_SAMPLES, best_row, bucket_rows, choose_num_buckets, num_programs
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.dispatch import dispatch
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.plan_output import plan_and_write
from planner.planners import solver
from planner.simulate import batch
from planner.workload import TaskLengths, Workload

ONE, TWO = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=1, pp=2, remat="none")
COSTS = CostTable(
    model="m",
    model_fingerprint="f",
    hardware={},
    step_overhead_s=0.5,
    configs=tuple(
        ConfigCost(config=config, capacity_tokens=tokens, coefficients=(0.0, 0.0, per_token, 0.0, 0.0, 1e-3))
        for config, tokens, per_token in ((ONE, 512, 1e-3), (TWO, 1024, 6e-4))
    ),
)
WORKLOAD = Workload(
    tasks=(TaskLengths(name="t", batch_size=64, lengths={length: 1 / 20 for length in range(40, 1001, 50)}),)
)
PLAN = Plan(
    model="m",
    num_devices=6,
    replicas=(
        ReplicaGroup(count=2, config=TWO, capacity_tokens=1024),
        ReplicaGroup(count=2, config=ONE, capacity_tokens=512),
    ),
    buckets=(512, 1024),
)


def rows_of(compile_s=1.0, steps=100, choices=(2, 4, 8, 16)):
    return bucket_rows(PLAN, COSTS, WORKLOAD, compile_s=compile_s, steps=steps, choices=choices)


def test_programs_are_shapes_of_each_config_on_each_of_its_stages():
    # Lengths 512 and 1024: one row and (1, 2) rows on the pipeline's two stages; one row of 512 on the other config.
    assert num_programs(PLAN) == 2 * (2 + 1) + 1


def test_more_lengths_pad_less_need_more_programs_and_compile_longer():
    rows = rows_of()
    assert [row.num_buckets for row in rows] == [2, 4, 8, 16]
    assert rows[0].padding_share > rows[-1].padding_share > 0
    programs = [row.num_programs for row in rows]
    assert programs == sorted(programs) and programs[0] < programs[-1]
    assert [row.compile_step_s for row in rows] == pytest.approx([number * 1.0 / 100 for number in programs])
    for row in rows:
        assert row.num_programs == num_programs(dataclasses.replace(PLAN, buckets=row.buckets))
        assert row.step_s > COSTS.step_overhead_s


def test_rows_are_what_dispatch_makes_of_the_same_batches():
    (row,) = rows_of(choices=(8,))
    plan = dataclasses.replace(PLAN, buckets=row.buckets)
    seconds, tokens, padded = [], 0, 0
    for step in range(NUM_SAMPLES):
        task_ids, lengths = batch(WORKLOAD, 0, step)
        made = dispatch(plan, COSTS, lengths, task_ids, max_buckets=16, time_limit_s=30)
        seconds.append(max(made.predicted_s))
        tokens += int(lengths.sum())
        padded += sum(micro.rows * micro.length for own in made.replicas for micro in own)
    assert row.step_s == pytest.approx(sum(seconds) / NUM_SAMPLES + COSTS.step_overhead_s)
    assert row.padding_share == pytest.approx(1 - tokens / padded)


def test_what_is_printed_says_what_each_time_is_of_and_how_long_choosing_took(tmp_path):
    flags = planning.PlanningFlags(**dict.fromkeys(planning.PlanningFlags.__dataclass_fields__))
    console = Console(file=io.StringIO(), width=200)
    plan_and_write(WORKLOAD, COSTS, 6, tmp_path / "plan.yaml", flags, console)
    chosen, _, found, *_ = console.file.getvalue().splitlines()
    assert re.search(r"padded lengths, chosen in [\d.]+ s: the mean of 8 sampled batches is [\d.]+ s", chosen)
    assert re.search(r"compiling \d+ programs adds [\d.]+ s to each of 1000 steps", chosen)
    assert found.startswith("step of the expected batch ")
    solved, together = map(
        float, re.search(r"solved in ([\d.]+) s by exact, planning took ([\d.]+) s in all", found).groups()
    )
    assert together > float(re.search(r"chosen in ([\d.]+) s", chosen)[1]) and together > solved


def test_free_compilation_takes_the_shortest_step_and_dear_compilation_the_fewest_programs():
    free, dear = rows_of(compile_s=0.0), rows_of(compile_s=1e4)
    assert best_row(free).step_s == min(row.step_s for row in free)
    assert best_row(dear).num_programs == min(row.num_programs for row in dear)


def test_a_longer_run_affords_no_fewer_lengths():
    def chosen(steps):
        rows = choose_num_buckets(
            WORKLOAD, COSTS, 6, solver("exact"), constraints=None, compile_s=1.0, steps=steps, time_limit_s=6.0
        )
        return best_row(rows).num_buckets

    assert chosen(10) <= chosen(100_000)


@pytest.mark.parametrize(("took_s", "left_s"), [(4.0, 16.0), (19.0, 10.0)])
def test_the_choice_of_lengths_counts_towards_the_time_limit(monkeypatch, took_s, left_s):
    clock, given = [0.0], []

    def report(*_):
        clock[0] += took_s
        return rows_of(choices=(2,))

    def solve(problem):
        given.append(problem.time_limit_s)
        return PLAN

    monkeypatch.setattr(planning, "bucket_report", report)
    monkeypatch.setattr(planning, "solver", lambda _: solve)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    flags = planning.PlanningFlags(**dict.fromkeys(planning.PlanningFlags.__dataclass_fields__) | {"time_limit": 20.0})
    planning.choose_plan(WORKLOAD, COSTS, 6, flags)
    assert given == [left_s]
