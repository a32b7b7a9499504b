"""The simulated experiments: what they compare is the same work, and the numbers are the evaluator's."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from planner.cost import CostTable
from planner.defaults import DEFAULT_SAMPLES
from planner.evaluate import evaluate
from planner.plan import ParallelConfig
from planner.planners import solver
from planner.problem import build_problem
from planner.robust import DEFAULT_SEED, replica_counts, sampled_counts, step_times
from planner.simulate import batch
from planner.workload import Workload
from profiling import experiments
from profiling.experiments import (
    CONFIGS,
    Settings,
    ablation,
    judged,
    published_plan,
    simulated,
    tasks_of_statistics,
    with_remat,
)
from profiling.systems import SEQUENTIAL, SYSTEMS, plan_part

COSTS = CostTable.load(CONFIGS / "costs" / "llama2_7b_a100_40g.json")
SIX = Workload.load(CONFIGS / "lengths" / "lobra_six_tasks.json")
QUICK = Settings(steps=2, seed=0, time_limit_s=5.0)


def test_remat_configs_hold_more_and_take_longer():
    table = with_remat(COSTS)
    assert len(table.configs) == 3 * len(COSTS.configs)
    for cost in COSTS.configs:
        for remat, (capacity, time) in experiments.REMAT_FACTORS.items():
            made = table[ParallelConfig(tp=cost.config.tp, pp=cost.config.pp, remat=remat)]
            assert made.capacity_tokens == capacity * cost.capacity_tokens
            assert made.micro_batch_s(2, 512) == pytest.approx(time * cost.micro_batch_s(2, 512))


def test_a_row_is_what_the_evaluator_says_of_the_same_batches():
    from planner.dispatch import dispatch

    plan = published_plan(SIX, COSTS)
    assert plan.used_devices == 16 and str(plan) == "6x(tp1,pp1,none) 1x(tp2,pp1,none) 1x(tp8,pp1,none)"
    row = judged("LobRA", plan, SIX, COSTS, 16, QUICK)
    seconds = []
    for step in range(QUICK.steps):
        tasks, lengths = batch(SIX, QUICK.seed, step)
        out = dispatch(plan, COSTS, lengths, tasks, max_buckets=16, time_limit_s=60.0, ahead=True)
        seconds.append(evaluate(plan, COSTS, out, lengths).step_s)
    assert row.step_s == pytest.approx(np.mean(seconds))
    assert row.gpu_seconds == pytest.approx(16 * np.mean(seconds))


def test_sequential_adds_up_its_tasks():
    two = Workload(tasks=SIX.tasks[:2])
    both = simulated(SEQUENTIAL, two, COSTS, 16, QUICK)
    alone = [simulated(SEQUENTIAL, Workload(tasks=(task,)), COSTS, 16, QUICK) for task in two.tasks]
    assert both.gpu_seconds == pytest.approx(sum(row.gpu_seconds for row in alone))


def test_robust_plans_are_chosen_over_batches_that_the_experiment_does_not_judge_on():
    names = [SYSTEMS[key].name for key in experiments.METHODS]
    assert names[-3:] == ["ours, remat", "ours, remat, robust", "ours, mixed remat"] and len(set(names)) == len(names)
    few = Workload(tasks=tuple(dataclasses.replace(task, batch_size=8) for task in SIX.tasks[:2]))
    problems = []

    def build(part, costs, constraints):
        problems.append(build_problem(part, costs, 8, num_buckets=6, constraints=constraints, time_limit_s=2.0))
        return problems[-1]

    plan = plan_part(SYSTEMS["ours-robust"], few, with_remat(COSTS), "none", build)
    chosen_on, judged_on = (sampled_counts(problems[0], 16, seed) for seed in (DEFAULT_SEED, QUICK.seed))
    assert not np.array_equal(chosen_on, judged_on)
    counts = replica_counts(problems[0], plan)
    plain = replica_counts(problems[0], solver("exact")(problems[0]))
    chosen = sampled_counts(problems[0], DEFAULT_SAMPLES, DEFAULT_SEED)
    assert step_times(problems[0], counts, chosen).mean_s <= 1.02 * step_times(problems[0], plain, chosen).mean_s


def test_each_step_of_the_ablation_is_cheaper():
    seconds = [row.gpu_seconds for row in ablation(SIX, COSTS, QUICK)]
    assert seconds == sorted(seconds, reverse=True)


def test_tasks_of_the_statistics_repeat_after_the_last_under_other_names(monkeypatch):
    monkeypatch.setattr("planner.synthetic.NUM_SAMPLES", 1000)
    statistics = experiments.read_statistics(CONFIGS / "statistics" / "lobra_datasets.csv")[:2]
    monkeypatch.setattr(experiments, "read_statistics", lambda _: statistics)
    found = tasks_of_statistics(3, seed=0)
    assert [task.name for task in found.tasks] == [
        statistics[0].dataset,
        statistics[1].dataset,
        "databricks-dolly-15k-2",
    ]
    assert [task.batch_size for task in found.tasks] == [256, 128, 256]


def test_the_command_writes_json_and_chart(tmp_path):
    result = CliRunner().invoke(
        experiments.main, ["--only", "ablation", "--steps", "1", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "experiments.json").read_text())
    assert [row["name"] for row in written["results"]["ablation"]["16"]] == [
        "homogeneous",
        "length-based",
        "balanced",
        "dynamic buckets",
    ]
    assert {"hardware", "versions", "commit", "date", "command"} <= set(written)
    assert (tmp_path / "experiments.png").stat().st_size > 0
