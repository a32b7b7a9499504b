"""The search over subsets of configs, with made-up searches: the best is found, and no bound is above it."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import config_subsets, deployment
from planner.config_cost import ConfigCost
from planner.config_subsets import Found
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.plan import ParallelConfig
from planner.problem import build_problem
from planner.workload import TaskLengths, Workload

NUM_CONFIGS = 6
LEVELS = st.integers(0, 3)
"""Few, so that bounds tie."""


def problem_of(configs, devices, *, max_configs, pinned=(), longest=64):
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={16: 0.75, longest: 0.25}),))
    costs = tuple(
        ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 1e-3))
        for config, capacity in configs
    )
    table = CostTable(model="m", model_fingerprint="f", hardware={}, configs=costs)
    constraints = Constraints(max_configs=max_configs, pinned=pinned)
    return build_problem(workload, table, devices, buckets=(16, longest), constraints=constraints, time_limit_s=5.0)


CONFIGS = [(ParallelConfig(tp=1, pp=pp, remat="none"), 128) for pp in range(1, NUM_CONFIGS + 1)]


@st.composite
def made_up(draw):
    """(subset -> (bound without solving, relaxed bound, value, settled bound)), each at least the one before but the
    last, which is at most the value)."""
    subsets = {}
    for configs in itertools.combinations(range(NUM_CONFIGS), 2):
        quick = 1 + draw(LEVELS)
        relaxed = quick + draw(LEVELS)
        value = relaxed + draw(LEVELS)
        settled = draw(st.integers(relaxed, value))
        subsets[configs] = (float(quick), float(relaxed), float(value), float(settled))
    return subsets


@settings(max_examples=300, deadline=None)
@given(made_up(), st.integers(0, 60), st.none() | st.integers(0, 14), st.sampled_from([1, 8]))
def test_the_best_subset_is_found_and_no_bound_is_above_it(subsets, most_looks, known, first_plan_after):
    problem = problem_of(CONFIGS, 8, max_configs=2)
    best = min(value for _, _, value, _ in subsets.values())
    looks = []

    def name_of(sub):
        return tuple(problem.configs.index(usable) for usable in sub.configs)

    def relaxed(sub):
        looks.append(name_of(sub))
        return SimpleNamespace(
            bound_s=subsets[name_of(sub)][1],
            best=None,
            cutoff_s=None,
            problem=sub,
            num_nodes=0,
            relaxation=SimpleNamespace(num_rounds=1),
        )

    def searched(search):
        looks.append(name_of(search.problem))
        _, _, value, settled = subsets[name_of(search.problem)]
        search.best = SimpleNamespace(max_s=value, replica_counts=(1, 1))
        search.bound_s = settled

    start = None
    if known is not None:
        value = list(subsets.values())[known][2]
        start = Found(replica_counts=(0,) * NUM_CONFIGS, max_s=value, bound_s=1.0, num_nodes=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_subsets, "_bounds", lambda _: [(c, values[0]) for c, values in subsets.items()])
        patch.setattr(config_subsets, "FIRST_PLAN_AFTER", first_plan_after)
        patch.setattr(config_subsets.time, "perf_counter", lambda: float(len(looks)))
        found = config_subsets.solve(
            problem, relaxed, searched, target_gap=0.0, deadline=float(most_looks), start=start
        )
    if found is None:
        assert start is None and most_looks < 2 * len(subsets)
        return
    assert found.bound_s <= best <= found.max_s
    assert len(looks) == len(set(looks)) + sum(looks.count(name) == 2 for name in set(looks))  # none is searched twice
    if most_looks > 2 * len(subsets):
        settled_at_best = min(max(settled, relaxed_s) for _, relaxed_s, _, settled in subsets.values())
        assert found.max_s == best and found.bound_s >= min(settled_at_best, best)


def test_configs_that_pins_leave_no_room_for_are_no_hope_for_the_longest():
    """Of twelve four-device configs that hold the longest none fits beside the pins; only the tp2 one does."""
    wide = [(ParallelConfig(tp=4, pp=1, remat=remat), 128 + i) for i, remat in enumerate(("none", "dots", "full"))]
    wide += [(ParallelConfig(tp=2, pp=2, remat=remat), 256) for remat in ("none", "dots", "full")]
    configs = [(ParallelConfig(tp=1, pp=1, remat="none"), 32), (ParallelConfig(tp=2, pp=1, remat="none"), 64), *wide]
    plan = deployment.solve(problem_of(configs, 8, max_configs=2, pinned=("6x(tp1,pp1,none)",)))
    assert {str(group.config): group.count for group in plan.replicas} == {"(tp1,pp1,none)": 6, "(tp2,pp1,none)": 1}
