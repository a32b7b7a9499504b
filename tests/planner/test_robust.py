"""Plans chosen over sampled batches, and whether a plan still suits the lengths seen."""

import dataclasses
import itertools

import numpy as np
import pytest

from planner import drift
from planner.config_cost import ConfigCost
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.drift import check_drift
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.plan_output import robust_lines
from planner.planners import solver
from planner.problem import build_problem
from planner.robust import percentile, replica_counts, sampled_counts, solve_robust, step_times
from planner.robust_search import Screen, neighbours
from planner.simulate import simulate
from planner.workload import TaskLengths, Workload

NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=4, pp=1, remat="none")


def cost(config, capacity, per_token):
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, per_token, 0.0, 0.0, 2e-3))


COSTS = CostTable(
    model="m",
    model_fingerprint="f",
    hardware={},
    step_overhead_s=0.01,
    configs=(cost(NARROW, 64, 1e-3), cost(WIDE, 256, 4e-4)),
)
MIDDLE = ParallelConfig(tp=2, pp=1, remat="none")
THREE = dataclasses.replace(COSTS, configs=(*COSTS.configs, cost(MIDDLE, 256, 6e-4)))
RARE = Workload(tasks=(TaskLengths(name="t", batch_size=40, lengths={20: 0.975, 250: 0.025}),))
"""One long sequence expected in a batch; often there are none, or several."""


def problem_of(workload=RARE, num_devices=12):
    """Far more time than any search here takes: what is found must not depend on the machine."""
    return build_problem(workload, COSTS, num_devices, time_limit_s=60.0)


def test_sampled_batches_are_those_of_the_simulation_and_times_agree_with_it():
    problem = problem_of()
    plan = solver("exact")(problem)
    samples = sampled_counts(problem, 5, seed=3)
    assert samples.sum(axis=1).tolist() == [40] * 5
    times = step_times(problem, replica_counts(problem, plan), samples)
    simulated = simulate(plan, COSTS, RARE, num_steps=5, seed=3)
    assert times.mean_s == pytest.approx(simulated.mean_step_s, rel=0.011)
    assert times.bound_s <= times.mean_s and times.p50_s <= times.p95_s


@pytest.mark.parametrize("objective", ["mean", "p80", "p95"])
def test_the_chosen_plan_is_the_best_of_all_deployments_on_its_samples(objective):
    problem = problem_of()
    found = solve_robust(problem, solver("exact"), objective=objective, num_samples=16, seed=1)
    samples = sampled_counts(problem, 16, seed=1)
    every = [
        (narrow, wide) if problem.configs[0].config == NARROW else (wide, narrow)
        for wide in (1, 2, 3)
        for narrow in range(problem.num_devices - 4 * wide + 1)
    ]
    quantile = percentile(objective)
    best = min(step_times(problem, counts, samples, quantile).objective_s for counts in every)
    chosen = step_times(problem, replica_counts(problem, found.plan), samples, quantile).objective_s
    assert chosen <= best * 1.011
    assert found.plan.used_devices <= 12 and found.num_samples == 16


def every_deployment(problem):
    """Of `COSTS`, with a replica for the longest."""
    wide = next(i for i, usable in enumerate(problem.configs) if usable.config == WIDE)
    for num_wide in range(1, problem.num_devices // 4 + 1):
        for narrow in range(problem.num_devices - 4 * num_wide + 1):
            yield tuple(num_wide if i == wide else narrow for i in range(2))


@pytest.mark.parametrize("quantile", [None, 0.5, 0.95])
def test_the_search_ends_at_the_deployment_with_the_best_bounds(quantile):
    problem = problem_of(num_devices=16)
    samples = sampled_counts(problem, 24, seed=5)
    screen = Screen(problem, samples, quantile)
    every = list(every_deployment(problem))
    screen.descend(every[0], float("inf"))
    found, num_looks = screen(screen.seen[0]), len(screen.seen)
    assert found == pytest.approx(min(screen(counts) for counts in every), rel=1e-6)
    assert num_looks < len(every) / 2


DEEP = ParallelConfig(tp=1, pp=4, remat="none")
BUBBLES = dataclasses.replace(
    COSTS,
    configs=(
        cost(WIDE, 512, 4e-4),
        ConfigCost(config=DEEP, capacity_tokens=512, coefficients=(0.0, 0.0, 1e-4, 0.0, 0.0, 15e-3)),
    ),
)
SLOW_START = dataclasses.replace(
    BUBBLES, configs=tuple(dataclasses.replace(config, fixed_s=0.03) for config in BUBBLES.configs)
)
LONG = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={5: 0.85, 500: 0.15}),))


@pytest.mark.parametrize(("workload", "costs"), [(RARE, COSTS), (LONG, BUBBLES), (LONG, SLOW_START)])
def test_prices_of_one_deployment_bound_every_other(workload, costs):
    problem = build_problem(workload, costs, 12, time_limit_s=60.0)
    screen = Screen(problem, sampled_counts(problem, 24, seed=2), None)
    longest = [usable.fits(len(problem.buckets) - 1) for usable in problem.configs]
    room = [12 // usable.num_devices for usable in problem.configs]
    every = [
        counts
        for counts in itertools.product(*(range(most + 1) for most in room))
        if np.dot(counts, [u.num_devices for u in problem.configs]) <= 12 and np.dot(counts, longest) > 0
    ]
    bounds = np.array([screen.look(counts).bounds for counts in every])
    for counts in every:
        promised = screen.look(counts).least_s(np.array(every, dtype=float))
        assert (promised <= bounds * (1 + 1e-3)).all()


def test_the_search_leaves_a_config_whose_bubbles_hide_what_it_is_worth():
    problem = build_problem(LONG, BUBBLES, 4, time_limit_s=60.0)
    screen = Screen(problem, sampled_counts(problem, 64, seed=1), 0.95)
    wide = tuple(int(usable.config == WIDE) for usable in problem.configs)
    screen.descend(wide, float("inf"))
    found = screen.seen[0]
    deep = tuple(int(usable.config == DEEP) for usable in problem.configs)
    assert found == deep and screen(deep) < screen(wide)


def test_a_plan_for_the_tail_beats_the_plan_of_the_mean_where_long_ones_bunch():
    found = solve_robust(problem_of(), solver("exact"), objective="p95", num_samples=48, seed=2)
    fresh = sampled_counts(problem_of(), 48, seed=2, first=48)
    mean = step_times(problem_of(), replica_counts(problem_of(), found.mean_plan), fresh, 0.95)
    assert found.mean_plan_times == mean
    assert found.regret == pytest.approx(mean.p95_s / found.times.p95_s - 1)
    assert found.regret > 0.1


def test_neighbours_stay_within_the_devices_and_serve_the_longest():
    problem = problem_of()
    wide = next(i for i, usable in enumerate(problem.configs) if usable.config == WIDE)
    counts = [0, 0]
    counts[wide] = 2
    found = set(neighbours(problem, tuple(counts)))
    assert found
    for other in found:
        assert other[wide] >= 1
        assert np.dot(other, [usable.num_devices for usable in problem.configs]) <= 12


def test_a_replica_takes_the_devices_of_as_many_others_as_it_needs():
    problem = problem_of()
    wide = next(i for i, usable in enumerate(problem.configs) if usable.config == WIDE)
    counts, wanted = [7, 7], [4, 4]
    counts[wide], wanted[wide] = 1, 2
    assert tuple(wanted) in set(neighbours(problem, counts, 2))
    assert all(min(other) >= 0 for removed in (0, 1, 2) for other in neighbours(problem, counts, removed))


def test_pinned_replicas_and_the_limit_on_configs_hold_for_every_candidate():
    asked = Constraints(pinned=("2x(tp1,pp1,none)", "1x(tp4,pp1,none)"), max_configs=2)
    problem = build_problem(RARE, THREE, 12, time_limit_s=60.0, constraints=asked)
    narrow, wide = (next(i for i, u in enumerate(problem.configs) if u.config == c) for c in (NARROW, WIDE))
    counts = [0] * len(problem.configs)
    counts[narrow], counts[wide] = 8, 1
    found = [other for removed in (0, 1, 2) for other in neighbours(problem, counts, removed)]
    assert found and all(o[narrow] >= 2 and o[wide] >= 1 and np.count_nonzero(o) == 2 for o in found)
    chosen = solve_robust(problem, solver("exact"), objective="p90", num_samples=16).plan
    assert {group.config: group.count >= 2 for group in chosen.replicas}[NARROW]
    assert {group.config for group in chosen.replicas} == {NARROW, WIDE}


def test_a_short_limit_leaves_out_the_search_but_not_the_times():
    problem = dataclasses.replace(problem_of(), time_limit_s=1e-3)
    found = solve_robust(problem, solver("exact"), objective="p95", num_samples=8)
    assert found.num_candidates == 1 and found.plan.replicas == found.mean_plan.replicas and found.regret == 0
    assert found.times.p95_s >= found.times.p50_s > 0
    assert "the only one that the time limit left time for" in robust_lines(found)[0]
    assert "of 7 deployments" in robust_lines(dataclasses.replace(found, num_candidates=7))[0]


@pytest.mark.parametrize("objective", ["median", "p0", "p100", "95", "p9.5"])
def test_unknown_objective_is_a_user_error(objective):
    with pytest.raises(UserError, match="mean or a percentile p1 to p99"):
        solve_robust(problem_of(), solver("exact"), objective=objective)


def plan_of(narrow, wide):
    groups = [ReplicaGroup(count=wide, config=WIDE, capacity_tokens=256)]
    groups += [ReplicaGroup(count=narrow, config=NARROW, capacity_tokens=64)] if narrow else []
    return Plan(model="m", num_devices=12, replicas=tuple(groups), buckets=(32, 256))


def test_a_plan_made_for_these_lengths_is_still_good_and_one_made_for_others_is_not():
    short = Workload(tasks=(TaskLengths(name="t", batch_size=64, lengths={20: 1.0}),))
    kept = check_drift(plan_of(8, 1), COSTS, RARE, num_samples=8, seed=0, time_limit_s=60.0)
    assert kept.excess >= 0
    gone = check_drift(plan_of(0, 3), COSTS, short, num_samples=8, seed=0, time_limit_s=60.0)
    assert not gone.is_good and gone.excess > drift.GOOD_SHARE
    assert gone.best != gone.present
    again = check_drift(gone.best, COSTS, short, num_samples=8, seed=0, time_limit_s=60.0)
    assert again.is_good
