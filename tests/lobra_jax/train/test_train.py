"""`lobra train` from files to adapters: what a run leaves, solo against joint, stopping a task."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lobra_jax.engine import Engine
from lobra_jax.metrics import read_metrics
from lobra_jax.peft_folder import read_peft_adapter
from planner.plan import Plan


def test_a_run_leaves_everything_it_promises(world, finished):
    steps = read_metrics(finished / "metrics.jsonl", "step")
    assert [r["step"] for r in steps] == list(range(1, world.num_steps + 1))
    assert all(len(r["measured_s"]) == len(r["predicted_s"]) == 3 for r in steps)
    tasks = read_metrics(finished / "metrics.jsonl", "task")
    assert [r["task_step"] for r in tasks if r["task"] == "long"] == list(range(1, world.num_steps))
    assert tasks[-1]["loss"] < tasks[0]["loss"]
    evals = [(r["task"], r["step"]) for r in read_metrics(finished / "metrics.jsonl", "eval")]
    assert evals == [("short", 0), ("short", 4), ("short", world.num_steps)]
    for name in ("config.yaml", "plan.yaml", "costs.json", "lengths.json", "timeline.json", "tensorboard"):
        assert (finished / name).exists()
    spec, _ = read_peft_adapter(finished / "adapters" / "long")
    assert (spec.rank, spec.targets) == (4, ("q", "v", "up"))
    timeline = json.loads((finished / "timeline.json").read_text())
    drawn = [item for r in timeline["replicas"] for stage in r["stages"] for item in stage]
    assert drawn and all(0 <= item["start_s"] <= item["end_s"] <= timeline["step_s"] for item in drawn)


def test_nothing_is_compiled_after_warm_up(world, finished, tmp_path):
    """Not by steps, evaluations, checkpoints nor other shapes of the plan's lattice."""
    plan = world.write_plan(tmp_path, buckets=[16, 32])
    out = tmp_path / "two_buckets"
    result = world.lobra("train", "--config", world / "config.yaml", "--plan", plan, "--out", out)
    assert result.exit_code == 0, result.output
    for run in (finished, out):
        assert [r["compilations"] for r in read_metrics(run / "metrics.jsonl", "step")] == [0] * world.num_steps


@pytest.mark.parametrize("name", ["short", "long"])
def test_a_task_trained_alone_gives_the_adapter_of_the_joint_run(world, finished, tmp_path, name):
    result = world.train(tmp_path / "solo", "--tasks", name)
    assert result.exit_code == 0, result.output
    assert [p.name for p in (tmp_path / "solo" / "adapters").iterdir()] == [name]
    assert world.difference(world.adapter(tmp_path / "solo", name), world.adapter(finished, name)) < 1e-5


def test_programs_of_a_traced_run_are_run_once_before_its_steps(world, tmp_path, monkeypatch):
    asked = []

    def warm_up(self, shapes=None):
        asked.append(shapes)
        return before(self, shapes)

    before = Engine.warm_up
    monkeypatch.setattr(Engine, "warm_up", warm_up)
    for name, options in (("plain", ()), ("traced", ("--trace", "2-2"))):
        result = world.train(tmp_path / name, *options)
        assert result.exit_code == 0, result.output
    assert asked[0] is None and all(asked[1])
    plain, traced = (
        [record["first_runs"] for record in read_metrics(tmp_path / name / "metrics.jsonl", "step")]
        for name in ("plain", "traced")
    )
    assert plain[0] > 0 and sum(plain) <= len(asked[1][0])
    assert not any(traced)


def test_packed_rows_where_they_are_faster_train_the_same_adapters(world, finished, tmp_path):
    """The cost table of these tests prices packed and padded tokens alike, so fewer of them are faster."""
    out = tmp_path / "packed"
    result = world.train(out, "--set", "training.batching=auto")
    assert result.exit_code == 0, result.output
    assert "batching: packed (over 16 sampled batches a step takes" in result.output
    for name in ("short", "long"):
        assert world.difference(world.adapter(out, name), world.adapter(finished, name)) < 1e-5
    packed, padded = (read_metrics(run / "metrics.jsonl", "step") for run in (out, finished))
    assert [r["tokens"] for r in packed] == [r["tokens"] for r in padded]
    assert sum(r["padded_tokens"] for r in packed) < sum(r["padded_tokens"] for r in padded)
    assert [r["compilations"] for r in packed] == [0] * world.num_steps


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_task_whose_loss_is_not_finite_stops_alone(world, finished, tmp_path, batching):
    out = tmp_path / "broken"
    result = world.train(out, "--set", "tasks.long.lr=1e38", "--set", f"training.batching={batching}")
    assert result.exit_code == 2
    assert "task 'long' at step 2" in result.output.splitlines()[-1]
    assert all(np.isfinite(array).all() for array in world.adapter(out, "long").values())
    assert not any(array.any() for key, array in world.adapter(out, "long").items() if key.endswith(".b"))
    assert world.difference(world.adapter(out, "short"), world.adapter(finished, "short")) < 1e-5
    events = [r["task"] for r in read_metrics(out / "metrics.jsonl", "event") if r["event"] == "nan"]
    assert events == ["long"]


def test_without_a_plan_one_is_made_from_the_cost_table(world, tmp_path):
    out = tmp_path / "planned"
    result = world.lobra(
        "train", "--config", world / "config.yaml", "--out", out, "--tasks", "short",
        "--set", "devices.num_devices=1", "--set", "tasks.short.steps=1", "--set", "planner.num_buckets=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Plan.load(out / "plan.yaml").planner == "exact"


NO_PROGRESS = (
    "--set",
    "tasks.short.lr=1e-12",
    "--set",
    "tasks.short.eval_interval=1",
    "--set",
    "tasks.short.patience=1",
)


def test_a_task_without_progress_ends_and_leaves_its_share_to_the_others(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        world.kill_at(patch, 4)
        world.train(out, *NO_PROGRESS)
    done = world.train(out, "--resume", *NO_PROGRESS)
    assert done.exit_code == 0, done.output
    records = read_metrics(out / "metrics.jsonl")
    steps = {
        name: [r["step"] for r in records if r["kind"] == "task" and r["task"] == name] for name in ("short", "long")
    }
    assert steps == {"short": [1], "long": [1, 2, 3, 4, 5]}
    assert [(r["task"], r["step"]) for r in records if r.get("event") == "early_stop"] == [("short", 1)]
    assert world.difference(world.adapter(out, "long"), world.adapter(finished, "long")) < 1e-5


def test_the_best_adapter_is_kept_and_exported(world, finished, tmp_path):
    records = [r for r in read_metrics(finished / "metrics.jsonl", "eval")]
    assert [r["step"] for r in records] == [0, 4, 6]
    assert all(r["perplexity"] == pytest.approx(np.exp(r["loss"])) for r in records)
    best = min(records, key=lambda r: r["loss"])
    assert records[-1]["best_loss"] == best["loss"]
    assert best["step"] == 6, "the losses of this run fall, so that the last adapter is the best"
    kept = read_peft_adapter(finished / "best" / "short")[1]
    last = read_peft_adapter(finished / "adapters" / "short")[1]
    assert all(np.array_equal(kept[n][t][f], last[n][t][f]) for n in last for t in last[n] for f in "ab")
    done = world.lobra("export", "--run", finished, "--task", "short", "--best", "--out", tmp_path / "best")
    assert done.exit_code == 0, done.output
    missing = world.lobra("export", "--run", finished, "--task", "long", "--best", "--out", tmp_path / "none")
    assert missing.exit_code == 2
    assert "no adapter of this task (got 'long'); expected one of short" in missing.output


def test_a_run_is_over_when_every_task_has_ended(world, tmp_path):
    out = tmp_path / "run"
    done = world.train(out, "--tasks", "short", *NO_PROGRESS)
    assert done.exit_code == 0, done.output
    records = read_metrics(out / "metrics.jsonl")
    assert max(r["step"] for r in records if r["kind"] == "step") == 1
    assert [r["step"] for r in records if r.get("event") == "checkpoint"] == [1]
    start = read_peft_adapter(out / "best" / "short")[1]
    assert not any(pair["b"].any() for targets in start.values() for pair in targets.values())
    assert world.adapter(out, "short").keys()
