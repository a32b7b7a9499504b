"""`lobra bench experiment` on simulated devices: the same work for every system, results that add up, resuming."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.config import load_config, model_config
from lobra_jax.out_of_memory import Failure, OutOfMemoryError
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from profiling.bench import experiment_run

LENGTHS = {"short": {"10": 0.5, "16": 0.5}, "long": {"12": 0.5, "30": 0.5}}
BATCH_SIZES = {"short": 8, "long": 4}
SYSTEMS = ("task-sequential", "task-fused", "lobra", "ours-remat")
STEPS = 3
NUM_DEVICES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config_json):
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "config.json").write_text(tiny_config_json)
    tasks = [{"name": name, "batch_size": size, "lengths": LENGTHS[name]} for name, size in BATCH_SIZES.items()]
    (folder / "lengths.json").write_text(json.dumps({"tasks": tasks}))
    task = {"context_length": 64, "steps": 1, "rank": 2, "targets": ["q", "down"]}
    content = {
        "model": {"path": ".", "dtype": "float32"},
        "data": {"source": "synthetic", "lengths": "lengths.json", "num_examples": 64},
        "devices": {"num_devices": NUM_DEVICES, "memory_bytes": "4MiB"},
        "planner": {"buckets": [32], "row_options": 1},
        "tasks": [{"name": name, "batch_size": size, **task} for name, size in BATCH_SIZES.items()],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


def table(folder, *, none=64, memory_bytes=2**22):
    """(1, 1) with remat none, which holds `none` tokens, and full, which holds twice as many and takes longer."""
    shapes = model_config(load_config(folder / "run.yaml"))
    costs = [
        ConfigCost(
            config=ParallelConfig(tp=1, pp=1, remat=remat),
            capacity_tokens=tokens,
            coefficients=(0, 0, seconds, 0, 0, 1e-4),
        )
        for remat, tokens, seconds in (("none", none, 1e-5), ("full", 128, 1.2e-5))
    ]
    return CostTable(
        model=shapes.name,
        model_fingerprint=shapes.fingerprint,
        hardware={"device_kind": "cpu", "num_devices": NUM_DEVICES, "memory_bytes": memory_bytes},
        configs=tuple(costs),
        step_overhead_s=1e-3,
    )


def experiment(folder, out, *arguments):
    fixed = ("--config", folder / "run.yaml", "--out", out, "--steps", STEPS, "--batch-scale", 0.5)
    return CliRunner().invoke(main, ["bench", "experiment", *map(str, (*fixed, *arguments))])


def read(out):
    return json.loads((out / "experiment.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(folder):
    """(folder of results, its record after two systems, after all, what was printed then)."""
    out, costs = folder / "out", folder / "costs.json"
    table(folder).save(costs)
    held = sum(array.nbytes for array in jax.live_arrays())
    first = experiment(folder, out, "--costs", costs, "--systems", ",".join(SYSTEMS[:2]))
    assert first.exit_code == 0, first.output
    begun = read(out)
    second = experiment(folder, out, "--systems", ",".join(SYSTEMS))
    assert second.exit_code == 0, second.output
    left = sum(array.nbytes for array in jax.live_arrays()) - held
    return out, begun, read(out), second.output, left


def test_every_system_serves_the_same_sequences(finished):
    parts = finished[2]["parts"]
    served = {name: parts[name]["served"] for name in SYSTEMS[1:]}
    served["task-sequential"] = {task: parts[f"task-sequential/{task}"]["served"][task] for task in BATCH_SIZES}
    assert all(own == served["lobra"] for own in served.values())
    for task, size in BATCH_SIZES.items():
        assert served["lobra"][task]["sequences"] == STEPS * size / 2
        assert parts["lobra"]["served"][task]["tokens"] >= 10 * STEPS * size / 2


def test_rows_are_sums_of_their_steps(finished):
    record = finished[2]
    assert [row["system"] for row in record["systems"]] == ["Task-Sequential", "Task-Fused", "LobRA", "ours, remat"]
    for key, row in zip(SYSTEMS, record["systems"], strict=True):
        names = [key] if key != "task-sequential" else [f"{key}/{task}" for task in BATCH_SIZES]
        steps = [step for name in names for step in record["parts"][name]["steps"]]
        assert len(steps) == STEPS * len(names)
        assert row["gpu_seconds_of_all_steps"] == pytest.approx(NUM_DEVICES * sum(step["step_s"] for step in steps))
        assert row["gpu_seconds"] == pytest.approx(NUM_DEVICES * row["step_s"])
        assert row["predicted_step_s"] == pytest.approx(sum(step["predicted_step_s"] for step in steps) / STEPS)
        assert 0 <= row["idle_share"] < 1 and 0 <= row["padding_share"] < 1
        assert row["compilations_while_timed"] == 0 and row["num_programs"] > 0
        for step in steps:
            parts_s = step["host_wait_s"] + step["execute_s"] + step["sum_update_s"]
            assert step["step_s"] == pytest.approx(parts_s)
            assert step["predicted_step_s"] == pytest.approx(max(step["predicted_replica_s"]) + 1e-3)
            assert 0 < step["tokens"] <= step["padded_tokens"]


def test_only_ours_chooses_remat(finished):
    parts = finished[2]["parts"]
    remats = {name: {group["remat"] for group in part["plan"]["replicas"]} for name, part in parts.items()}
    assert all(found == {"none"} for name, found in remats.items() if name != "ours-remat")
    (fused,) = parts["task-fused"]["plan"]["replicas"]
    assert fused["count"] == NUM_DEVICES


def test_a_second_run_keeps_what_is_finished(finished):
    _, begun, record, output, _ = finished
    assert {"task-fused", "task-sequential/short", "task-sequential/long"} == set(begun["parts"])
    assert all(record["parts"][name] == part for name, part in begun["parts"].items())
    assert "task-fused: was run before" in output and "lobra: was run before" not in output
    assert re.search(r"programs in \d+ s, \d+ of them from the cache", output)
    assert re.search(r"warm, \d+\.\d\d s a step; \d+ are timed", output)


def test_the_last_step_of_each_part_is_kept_beside_its_prediction(finished):
    out = finished[0]
    timeline = json.loads((out / "timeline-ours-remat.json").read_text(encoding="utf-8"))
    assert timeline["step"] == 2 + STEPS
    last = finished[2]["parts"]["ours-remat"]["steps"][-1]
    assert [r["measured_s"] for r in timeline["replicas"]] == last["replica_s"]
    assert [r["predicted_s"] for r in timeline["replicas"]] == last["predicted_replica_s"]


def test_finished_parts_leave_nothing_on_the_devices(finished, folder):
    weights = 4 * (2 * 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32))
    assert finished[4] < weights, "a part's weights are still there"


def test_a_system_without_a_plan_is_a_result_and_others_go_on(folder, tmp_path):
    costs = tmp_path / "costs.json"
    table(folder, none=24).save(costs)
    result = experiment(folder, tmp_path / "out", "--costs", costs, "--systems", "lobra,task-sequential")
    assert result.exit_code == 2 and "did not run: lobra, task-sequential/long (" in result.output
    parts = read(tmp_path / "out")["parts"]
    assert "sequences of 30 tokens fit no config" in parts["lobra"]["failed"]
    assert len(parts["task-sequential/short"]["steps"]) == STEPS and read(tmp_path / "out")["systems"] == []


def test_a_part_without_room_runs_again_with_less_at_a_time(monkeypatch, capsys, tmp_path):
    mixed = ParallelConfig(tp=1, pp=1, remat="none+full")
    group = ReplicaGroup(count=1, config=mixed, capacity_tokens=64, smaller_capacities=(32,))
    plan = Plan(model="m", num_devices=1, replicas=(group,), buckets=(16, 64))
    scene = SimpleNamespace(tasks=[SimpleNamespace(train=SimpleNamespace(lengths=np.array([5, 60])))])
    asked = []

    def run(_, plan, __):
        asked.append(plan.replicas[0].capacities)
        if len(asked) in fails:
            raise OutOfMemoryError([Failure(replica=0, shape=fails[len(asked)])])
        return {"plan": str(plan)}

    monkeypatch.setattr(experiment_run, "_run", run)
    fails = {1: (2, 16)}
    part = experiment_run.run_part(scene, plan, tmp_path / "timeline.json")
    assert asked == [(32, 64), (16, 64)]
    (line,) = part["capacities_lowered"]
    assert "from 32/64 to 16/64 tokens" in line and line in capsys.readouterr().out
    fails = {3: (1, 64)}
    with pytest.raises(experiment_run.FailedError, match="no smaller capacity takes the longest sequence"):
        experiment_run.run_part(scene, plan, tmp_path / "timeline.json")


def test_costs_are_measured_where_there_are_none(folder, tmp_path, monkeypatch):
    asked = {}

    def run_profile(config, out, console, **grid):
        asked.update(grid, out=out, batch_sizes=[task.batch_size for task in config.tasks])
        return table(folder, none=24)

    monkeypatch.setattr("profiling.cli.run_profile", run_profile)
    out = tmp_path / "out"
    experiment(folder, out, "--systems", "lobra", "--lengths", "16,32", "--max-tokens", 64, "--repeats", 1)
    assert asked == {
        "lengths": "16,32",
        "max_tokens": 64,
        "repeats": 1,
        "out": out / "costs.json",
        "batch_sizes": [4, 2],
    }


def test_other_costs_are_refused_and_leave_those_of_the_results(finished, folder, tmp_path):
    out, costs = finished[0], tmp_path / "costs.json"
    kept = (out / "costs.json").read_bytes()
    table(folder, none=96).save(costs)
    result = experiment(folder, out, "--costs", costs)
    assert result.exit_code == 2 and "costs_sha256: results of another set-up" in result.output
    assert (out / "costs.json").read_bytes() == kept


def test_mistakes_are_one_line(finished, folder, tmp_path):
    out, costs = finished[0], tmp_path / "costs.json"
    table(folder, memory_bytes=2**23).save(costs)
    for arguments, words in [
        ((out, "--systems", "lobrra"), ["--systems", "unknown name, did you mean 'lobra'?"]),
        ((out, "--remat", "full"), ["experiment.json", "remat", "results of another set-up"]),
        ((out, "--set", "training.seed=1"), ["experiment.json", "seed", "another --out"]),
        ((out, "--set", "training.batching=packed"), ["training.batching", "padded"]),
        ((tmp_path / "no" / "out",), ["--out", "no such folder"]),
        (("/proc/out",), ["--out", "cannot write"]),
        ((tmp_path / "out", "--costs", costs), ["hardware.memory_bytes", "at most devices.memory_bytes = 4194304"]),
    ]:
        result = experiment(folder, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        error = result.output.strip().splitlines()[-1]
        assert error.startswith("error: ") and all(word in error for word in words), error


def test_results_whose_steps_lack_something_are_refused_before_anything_runs(finished, folder, tmp_path):
    """As an earlier version wrote them: what would be run now could not be added up with them."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    record = read(out)
    part = next(part for part in record["parts"].values() if "failed" not in part)
    del part["steps"][0]["replica_late_s"]
    (out / "experiment.json").write_text(json.dumps(record), encoding="utf-8")
    before = (out / "experiment.json").read_bytes()
    result = experiment(folder, out, "--systems", "ours-robust")
    assert result.exit_code == 2 and "cannot go on from this file" in result.output
    assert (out / "experiment.json").read_bytes() == before
