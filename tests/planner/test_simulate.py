"""Simulated steps: the real dispatcher on seeded batches."""

import dataclasses

import numpy as np
import pytest

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.simulate import batch, check_plan, replica_names, simulate
from planner.timeline import START, UPDATE, WAIT, WIDTH, Span, Timeline, timeline_lines
from planner.workload import TaskLengths, Workload

NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=2, pp=1, remat="none")


def cost(config, capacity):
    return ConfigCost(
        config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-3 / config.tp, 0.0, 0.0, 2e-3)
    )


COSTS = CostTable(
    model="m", model_fingerprint="f", hardware={}, configs=(cost(NARROW, 64), cost(WIDE, 256)), step_overhead_s=0.5
)
PLAN = Plan(
    model="m",
    num_devices=5,
    replicas=(
        ReplicaGroup(count=1, config=WIDE, capacity_tokens=256),
        ReplicaGroup(count=2, config=NARROW, capacity_tokens=64),
    ),
    buckets=(16, 64, 256),
)
WORKLOAD = Workload(
    tasks=(
        TaskLengths(name="short", batch_size=24, lengths={5: 0.5, 16: 0.25, 40: 0.25}),
        TaskLengths(name="long", batch_size=4, lengths={60: 0.75, 200: 0.25}),
    )
)


def run(**changes):
    arguments = {"num_steps": 6, "seed": 1, "max_buckets": 3, "time_limit_s": 20.0} | changes
    return simulate(PLAN, COSTS, WORKLOAD, **arguments)


def without_timing(simulation):
    return [dataclasses.replace(step, solve_s=0.0) for step in simulation.steps]


def test_same_seed_gives_the_same_steps_and_another_seed_others():
    assert without_timing(run()) == without_timing(run())
    assert without_timing(run()) != without_timing(run(seed=2))


def test_batches_depend_on_seed_and_step_alone():
    assert without_timing(run(num_steps=3)) == without_timing(run(num_steps=6))[:3]
    tasks, lengths = batch(WORKLOAD, 1, 4)
    again = batch(WORKLOAD, 1, 4)
    assert np.array_equal(tasks, again[0]) and np.array_equal(lengths, again[1])
    assert np.bincount(tasks).tolist() == [24, 4]


def test_shares_and_seconds_add_up():
    simulation = run()

    for step in simulation.steps:
        assert step.step_s == pytest.approx(max(step.replica_s) + 0.5)
        assert step.gpu_seconds == pytest.approx(step.step_s * 4)  # four of five devices hold a replica
        assert step.tokens < step.padded_tokens
        assert step.bound_s <= max(step.replica_s) * (1 + 1e-9)
    assert 0 < simulation.padding_share < 1
    assert min(simulation.idle_shares) >= 0
    busy = np.array([step.replica_s for step in simulation.steps])
    expected = 1 - busy.sum(axis=0) / busy.max(axis=1).sum()
    assert simulation.idle_shares == pytest.approx(expected.tolist())
    assert simulation.idle_share == pytest.approx(np.average(expected, weights=[2, 1, 1]))
    assert simulation.quantile_s(0.5) <= simulation.quantile_s(0.95)


def test_balanced_dispatch_is_no_slower_than_length_based_and_idles_less():
    balanced, grouped = run(), run(method="group")
    assert balanced.mean_step_s < grouped.mean_step_s
    assert balanced.idle_share < grouped.idle_share


def test_timeline_holds_every_micro_batch_of_the_median_step_without_gaps():
    simulation = run(num_steps=5)
    timeline = simulation.timeline
    step = simulation.steps[timeline.step]
    assert timeline.step_s == step.step_s == simulation.quantile_s(0.5)
    assert [own[-1].end_s if own else 0.0 for own in timeline.spans] == pytest.approx(step.replica_s)
    for own in timeline.spans:
        assert [span.start_s for span in own[1:]] == [span.end_s for span in own[:-1]]
    tokens = sum(span.rows * span.length for own in timeline.spans for span in own)
    assert tokens == step.padded_tokens


def test_timeline_lines_show_work_waiting_filling_and_the_update():
    spans = (
        (Span(start_s=0.0, end_s=1.0), Span(start_s=1.0, end_s=3.0, rows=1, length=64)),
        (Span(start_s=0.0, end_s=1.0, rows=2, length=16),),
    )
    timeline = Timeline(step=0, spans=spans, work_s=3.0, step_s=4.0)
    first, second, legend = timeline_lines(timeline, ("one", "other"), ("a", "b"))
    quarter = WIDTH // 4
    assert first == f"one   |{START * quarter}{'b' * 2 * quarter}{UPDATE * quarter}|"
    assert second == f"other |{'a' * quarter}{WAIT * 2 * quarter}{UPDATE * quarter}|"
    assert "a to 16, b to 64" in legend
    many = Timeline(step=0, spans=spans[1:] * 29 + spans[:1], work_s=3.0, step_s=4.0)
    drawn = timeline_lines(many, [str(n) for n in range(30)], ["k"] * 30)
    assert [line.split()[0] for line in drawn[:2]] == ["0", "29"] and "of 30 replicas" in drawn[2]


def test_every_step_is_reported_as_it_is_done():
    seen = []
    simulation = run(num_steps=3, on_step=seen.append)
    assert tuple(seen) == simulation.steps


def test_replicas_are_named_in_plan_order():
    assert replica_names(PLAN) == (
        "replica 0 (tp2,pp1,none)",
        "replica 1 (tp1,pp1,none)",
        "replica 2 (tp1,pp1,none)",
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "other"}, r"model: plan of another model \(got 'other'\); expected m"),
        ({"replicas": (ReplicaGroup(count=1, config=WIDE, capacity_tokens=512),)}, r"capacity_tokens: more than"),
        (
            {
                "replicas": (
                    ReplicaGroup(count=1, config=ParallelConfig(tp=4, pp=1, remat="none"), capacity_tokens=256),
                )
            },
            r"replicas\[0\]: no costs of \(tp4,pp1,none\); expected one of \(tp1,pp1,none\), \(tp2",
        ),
    ],
)
def test_plan_and_costs_that_do_not_belong_together_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        check_plan(dataclasses.replace(PLAN, **changes), COSTS)


def test_a_sequence_longer_than_every_capacity_is_refused():
    too_long = Workload(tasks=(TaskLengths(name="t", batch_size=2, lengths={300: 1.0}),))
    with pytest.raises(UserError, match="300 tokens"):
        simulate(PLAN, COSTS, too_long, num_steps=1)
