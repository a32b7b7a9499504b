"""LobRA's own planners: right on small instances, never better than the exact planner's bound."""

import itertools
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import deployment
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.equal_share import best_homogeneous, evenly_split_s, solve_equal_share, split_evenly
from planner.errors import UserError
from planner.evaluate import plan_violations
from planner.lobra_files import parse_plan_lists, read_cost_table, read_tasks
from planner.plan import ParallelConfig
from planner.planners import solver
from planner.problem import build_problem
from planner.proposal import propose
from planner.prune import deployments, length_based_s, promising
from planner.synthetic import read_statistics, synthetic_workload
from planner.workload import TaskLengths, Workload

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
BASELINES = ("minlp", "prune", "group")
TOLERANCE = 1e-6


def config_cost(tp, pp, capacity, per_token=1e-3, per_slot=4e-3, fixed_s=0.0, remat="none"):
    return ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat=remat),
        capacity_tokens=capacity,
        coefficients=(0.0, 0.0, per_token / (tp * pp) ** 0.8, 0.0, 0.0, per_slot / pp),
        fixed_s=fixed_s,
    )


def problem_of(configs, counts, num_devices, *, buckets=(16, 32, 64), proposal=False, overhead_s=0.0):
    total = sum(counts)
    lengths = {length: count / total for length, count in zip(buckets, counts, strict=True) if count}
    table = CostTable(model="m", model_fingerprint="f", hardware={}, configs=tuple(configs), step_overhead_s=overhead_s)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=lengths),))
    return build_problem(workload, table, num_devices, buckets=buckets, proposal=proposal, time_limit_s=20)


MIXED = (
    config_cost(1, 1, 32),
    config_cost(2, 1, 64, fixed_s=2e-3),
    config_cost(1, 2, 64),
    config_cost(4, 1, 128),
)


@st.composite
def problems(draw):
    configs = draw(st.lists(st.sampled_from(MIXED), min_size=1, max_size=3, unique=True))
    if all(cost.capacity_tokens < 64 for cost in configs):
        configs.append(MIXED[1])
    least = min(cost.config.num_devices for cost in configs if cost.capacity_tokens >= 64)
    counts = [draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.integers(1, 2))]
    return problem_of(configs, counts, draw(st.integers(least, 5)), overhead_s=draw(st.sampled_from([0.0, 3e-3])))


def equal_share_brute_force_s(problem, *, length_based=False):
    """Least time over all replica counts and all loads that are the same on each replica of a config."""
    best = math.inf
    ranges = [range(problem.num_devices // usable.num_devices + 1) for usable in problem.configs]
    for counts in itertools.product(*ranges):
        used = sum(c * usable.num_devices for c, usable in zip(counts, problem.configs, strict=True))
        deployed = [(c, usable) for c, usable in zip(counts, problem.configs, strict=True) if c]
        if used <= problem.num_devices and deployed:
            best = min(best, best_loads_s(problem, deployed, length_based))
    return best


def best_loads_s(problem, deployed, length_based):
    counts = [count for count, _ in deployed]
    choices = []
    for bucket, total in enumerate(problem.counts):
        smallest = min((u.capacity_tokens for _, u in deployed if u.fits(bucket)), default=None)
        most = [
            -(-total // count) if u.fits(bucket) and (not length_based or u.capacity_tokens == smallest) else 0
            for count, u in deployed
        ]
        loads = itertools.product(*(range(n + 1) for n in most))
        choices.append([load for load in loads if sum(c * n for c, n in zip(counts, load, strict=True)) >= total])
    best = math.inf
    for loads in itertools.product(*choices):
        times = (u.replica_s([load[i] for load in loads]) for i, (_, u) in enumerate(deployed))
        best = min(best, max(times))
    return best


@pytest.mark.parametrize("length_based", [False, True])
@pytest.mark.parametrize(
    ("counts", "num_devices"), [((4, 2, 1), 3), ((5, 3, 2), 4), ((0, 0, 2), 2), ((5, 0, 1), 3), ((3, 1, 2), 4)]
)
def test_equal_share_model_finds_the_brute_force_optimum(counts, num_devices, length_based):
    problem = problem_of(MIXED[:3], counts, num_devices)

    found = solve_equal_share(problem, range(len(problem.configs)), length_based=length_based, time_limit_s=30)
    brute_s = equal_share_brute_force_s(problem, length_based=length_based)
    assert found is not None
    # An even split of the totals may beat the model, which charges every replica the largest share.
    assert found.step_s <= brute_s * (1 + TOLERANCE)
    assert found.step_s >= deployment.solve(problem, target_gap=0.0).predicted.bound_s * (1 - TOLERANCE)
    if all(count <= 1 for count in found.counts):
        assert found.step_s == pytest.approx(brute_s, rel=TOLERANCE)


@given(problem=problems())
@settings(max_examples=40)
def test_every_baseline_is_valid_and_never_beats_the_exact_bound(problem):
    exact = deployment.solve(problem, target_gap=0.0)

    for name in BASELINES:
        plan = solver(name)(problem)
        assert plan.planner == name
        assert plan_violations(plan, problem.costs, problem.workload) == ()
        assert plan.predicted.step_s >= exact.predicted.bound_s * (1 - TOLERANCE)
        assert plan.predicted.bound_s <= exact.predicted.step_s * (1 + TOLERANCE)
        assert plan.predicted.bound_s <= plan.predicted.step_s


def test_length_based_planning_pays_for_not_balancing():
    # One long sequence needs the wide replica, which then idles unless it may take short ones.
    problem = problem_of((config_cost(1, 1, 32), config_cost(2, 1, 64, per_slot=1e-3)), (24, 0, 1), 3)

    exact, group = deployment.solve(problem), solver("group")(problem)
    assert group.predicted.step_s > 1.3 * exact.predicted.step_s


def test_group_planner_sends_each_bucket_to_the_smallest_capacity_deployed():
    problem = problem_of(MIXED, (5, 3, 2), 5)
    share = solve_equal_share(problem, range(len(problem.configs)), length_based=True, time_limit_s=30)

    deployed = [u.capacity_tokens for u, count in zip(problem.configs, share.counts, strict=True) if count]
    for bucket, length in enumerate(problem.buckets):
        smallest = min(capacity for capacity in deployed if capacity >= length)
        for usable, totals in zip(problem.configs, share.totals, strict=True):
            assert totals[bucket] == 0 or usable.capacity_tokens == smallest


def test_proposal_keeps_the_fastest_and_the_narrowest_of_equal_reach():
    short_reach = config_cost(1, 1, 32)
    narrowest, fastest = config_cost(2, 1, 64), config_cost(4, 1, 64, per_token=1e-4, per_slot=1e-3)
    neither = config_cost(2, 2, 64, per_token=9e-3)
    configs = (short_reach, narrowest, neither, fastest)

    proposed = problem_of(configs, (2, 2, 1), 4, proposal=True)
    kept = [str(proposed.configs[number].config) for number in propose(proposed)]
    assert kept == ["(tp1,pp1,none)", "(tp2,pp1,none)", "(tp4,pp1,none)"]
    everything = problem_of(configs, (2, 2, 1), 4, proposal=False)
    assert propose(everything) == (0, 1, 2, 3)


def test_pruning_enumerates_every_maximal_deployment_once():
    problem = problem_of(MIXED, (2, 2, 1), 5)
    listed = list(deployments(problem, range(len(problem.configs))))

    sizes = [usable.num_devices for usable in problem.configs]
    expected = {
        counts
        for counts in itertools.product(*(range(5 // size + 1) for size in sizes))
        if sum(c * s for c, s in zip(counts, sizes, strict=True)) == 5 and any(counts[i] for i in (1, 2, 3))
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_pruning_keeps_at_least_eight_deployments_best_bound_first():
    problem = problem_of(MIXED, (20, 4, 1), 8)
    pool = range(len(problem.configs))

    kept = promising(problem, pool, deadline=time.perf_counter() + 60)
    bounds = [bound for bound, _ in kept]
    everything = len(list(deployments(problem, pool)))
    assert 8 <= len(kept) < everything
    assert bounds == sorted(bounds)
    outside = [bound for bound in bounds if bound > bounds[0] * 1.15]
    assert len(kept) == 8 or not outside


def test_pruning_bound_of_one_config_is_its_work_over_its_devices():
    problem = problem_of((config_cost(2, 1, 64),), (4, 2, 2), 4)
    seconds = [[4.0, 3.0, 5.0]]
    assert length_based_s(problem, seconds, (2,)) == pytest.approx(12.0 / 4)


def test_even_split_differs_by_at_most_one_and_serves_everything():
    loads = split_evenly((7, 0, 2, 4), 3)
    assert [sum(column) for column in zip(*loads, strict=True)] == [7, 0, 2, 4]
    assert all(max(column) - min(column) <= 1 for column in zip(*loads, strict=True))
    # The odd ones out rotate: nobody gets two of them before everybody has one.
    assert max(sum(load) for load in loads) - min(sum(load) for load in loads) <= 1


def test_homogeneous_plan_uses_one_config_and_all_its_devices():
    problem = problem_of(MIXED, (5, 3, 2), 5)
    share = best_homogeneous(problem, range(len(problem.configs)))

    used = [i for i, count in enumerate(share.counts) if count]
    assert len(used) == 1
    usable = problem.configs[used[0]]
    assert share.counts[used[0]] == 5 // usable.num_devices
    assert share.step_s == evenly_split_s(usable, problem.counts, share.counts[used[0]])


def test_baselines_at_a_tiny_time_limit_still_give_a_valid_plan():
    problem = problem_of(MIXED, (40, 20, 5), 5)
    hurried = build_problem(
        problem.workload, problem.costs, 5, buckets=problem.buckets, proposal=False, time_limit_s=1e-3
    )
    for name in BASELINES:
        plan = solver(name)(hurried)
        assert plan_violations(plan, hurried.costs, hurried.workload) == ()


def test_unknown_planner_is_refused():
    with pytest.raises(UserError, match=r"planner: bad value \(got 'magic'\)"):
        solver("magic")


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published LobRA data beside the repository")
def test_pruning_is_as_good_as_the_published_plan_on_the_published_profile():
    costs = read_cost_table(
        REFERENCE / "lobra_time_llama_7b_a100_40g.csv",
        REFERENCE / "lobra_memory_llama_7b_a100_40g_6tasks.csv",
        num_layers=32,
    )
    tasks = read_tasks(REFERENCE / "exp_task6.json")
    workload, _ = synthetic_workload(tasks, read_statistics(REFERENCE / "table4_datasets.csv"), seed=1)
    problem = build_problem(workload, costs, 16, num_buckets=7, time_limit_s=120)

    published = {g.config: g.count for g in parse_plan_lists("2048,4096,16384", "6,1,1", "1,2,8", "1,1,1")}
    counts = [published.get(usable.config, 0) for usable in problem.configs]
    theirs = solve_equal_share(
        problem, [i for i, c in enumerate(counts) if c], counts=counts, gap=5e-3, time_limit_s=20
    )
    plan = solver("prune")(problem)
    assert plan.predicted.step_s <= theirs.step_s * 1.01
