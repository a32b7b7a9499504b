"""Runs that were killed: resumed bitwise, traced or not, started over, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from lobra_jax.metrics import read_metrics
from lobra_jax.models.hf import save_hf
from lobra_jax.models.weights import RandomWeights
from lobra_jax.room import Room
from lobra_jax.train import Trainer
from planner.cost import CostTable
from planner.plan import Plan
from planner.workload import Workload


@pytest.fixture(scope="module")
def resumed(world):
    """(run directory, what a killed and a resumed part of it said), both traced, on three unlike replicas."""
    out = world / "killed"
    with pytest.MonkeyPatch.context() as patch:
        world.kill_at(patch, 5)
        killed = world.train(out, "--trace", "4-6", plan="many")
    assert killed.exit_code == 130
    world.lobra("trace", out, "--out", out / "killed.json")
    refused = world.train(out, "--resume", "--trace", "5-6", plan="many")
    assert refused.exit_code == 2 and "(got '5-6'); expected steps from 6, as the first" in refused.output
    result = world.train(out, "--resume", "--trace", "6-6", plan="many")
    assert result.exit_code == 0, result.output
    return out, killed.output, result.output


def test_a_killed_run_resumes_bitwise_traced_or_not(world, finished, resumed):
    out, _, output = resumed
    assert "resumed after step 4" in output
    for name in ("short", "long"):
        whole, resumed = world.adapter(finished, name), world.adapter(out, name)
        for key, array in whole.items():
            np.testing.assert_array_equal(array, resumed[key])
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl", "step")] == list(range(1, world.num_steps + 1))
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl", "task") if r["task"] == "short"]
        for run in (finished, out)
    ]
    assert losses[0] == losses[1]


def test_traced_steps_are_there_even_if_the_run_was_killed(world, resumed):
    out, killed, output = resumed
    assert "traced steps: 4, 5; read them by lobra trace" in killed
    assert "traced steps: 6; read them by lobra trace" in output
    done = world.lobra("trace", out, "--out", out / "trace.json")
    assert done.exit_code == 0, done.output
    first, second = (json.loads((out / name).read_text()) for name in ("killed.json", "trace.json"))
    assert [[step["step"] for step in summary["steps"]] for summary in (first, second)] == [[4, 5], [6]]
    for summary in (first, second):
        places = [(row["replica"], row["stage"]) for row in summary["devices"]]
        assert sorted(places) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 0)]
        for row in summary["devices"]:
            assert 0 < row["busy_s"] < summary["window_s"]
            assert sum(row["classes"].values()) == pytest.approx(row["busy_s"], abs=1e-8)
            assert sum(row["phases"].values()) == pytest.approx(row["busy_s"], abs=1e-8)
        phases = {(s["replica"], s["stage"]): set(s["phases"]) for s in summary["stages"]}
        assert {"fused", "gradient_sum", "update"} <= phases[0, 0]
        assert "fused" not in phases[1, 0] and "update" in phases[1, 0]
        assert summary["classes"]["collective"] > 0 and summary["unattributed"] == {}
        assert [r["measured_by"] for r in summary["timeline"]["replicas"]] == ["devices"] * 3
        # Replica 1 has two stages, and may have nothing to do when only one task is left.
        drawn = {bar["phase"] for bar in summary["timeline"]["replicas"][1]["stages"][0]}
        assert drawn == phases[1, 0] & {"forward", "backward"}
    assert any("backward" in stage["phases"] for stage in first["stages"])


def test_starts_say_how_many_programs_came_from_the_cache(resumed):
    out, killed, output = resumed
    starts = read_metrics(out / "metrics.jsonl", "start")
    assert [r["step"] for r in starts] == [0, 4]
    for record, said in zip(starts, (killed, output), strict=True):
        assert record["programs"] >= 10 and 0 <= record["programs_from_cache"] <= record["programs"]
        compiled = record["programs"] - record["programs_from_cache"]
        assert f": {compiled} compiled, {record['programs_from_cache']} from the cache" in said


def test_resume_on_another_plan_goes_on_from_the_same_state(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "moved"
    world.kill_at(monkeypatch, 3)
    world.train(out, plan="many")
    monkeypatch.undo()
    result = world.train(out, "--resume", plan="one")
    assert result.exit_code == 0, result.output
    assert world.difference(world.adapter(out, "short"), world.adapter(finished, "short")) < 1e-5


def test_replicas_of_several_policies_train_the_same_adapters_and_resume(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "mixed"
    world.kill_at(monkeypatch, 3)
    world.train(out, plan="mixed")
    monkeypatch.undo()
    result = world.lobra("train", "--config", world / "config.yaml", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert str(Plan.load(out / "plan.yaml")) == "2x(tp1,pp1,none+full)"
    assert world.difference(world.adapter(out, "short"), world.adapter(finished, "short")) < 1e-5


def test_what_a_kill_left_while_a_file_was_written_is_no_run(world, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml.new").write_text("mod")
    result = world.train(out, "--tasks", "short", "--set", "tasks.short.steps=1")
    assert result.exit_code == 0, result.output


def test_a_run_directory_is_never_overwritten(world, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    result = world.train(finished)
    assert result.exit_code == 2 and "already exists" in result.output
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "tasks.long.rank=8"], r"tasks.long.rank.*got 4.*expected 8"),
        (["--tasks", "short"], r"tasks.*got 'short, long'.*expected short"),
        (["--set", "tasks.0.name=other"], r"tasks.*'short, long'.*other, long"),
        (["--set", "training.seed=7"], r"another run.*got"),
        (["--set", "tasks.short.lr=1"], r"tasks.short.lr.*got 0.003.*1.0"),
        (["--set", "tasks.long.batch_size=4"], r"tasks.long.batch_size.*got 3.*4"),
        (["--set", "tasks.long.steps=9"], r"tasks.long.steps.*done after 5 steps.*gone on to 6.*got 9.*expected 5"),
        (["--set", "tasks.short.steps=5"], r"tasks.short.steps.*6 steps are done.*got 5.*at least 6"),
        (["--set", "model.path=OTHER"], r"model.path.*another run"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(world, finished, arguments, complaint):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in finished.iterdir() if p.is_file())
    if not (world / "other").is_dir():  # the same model with other weights
        save_hf(world / "other", world.model, RandomWeights(world.model, 1))
        shutil.copy(world / "base" / "tokenizer.json", world / "other")
    arguments = [argument.replace("OTHER", str(world / "other")) for argument in arguments]
    result = world.train(finished, "--resume", *arguments)
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert re.search(complaint, line), line
    assert sorted((p.name, p.stat().st_mtime_ns) for p in finished.iterdir() if p.is_file()) == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "early"
    world.kill_at(monkeypatch, 1)
    assert world.train(out, plan="many").exit_code == 130
    monkeypatch.undo()
    result = world.train(out, "--resume", plan="many")
    assert result.exit_code == 0, result.output
    assert world.difference(world.adapter(out, "short"), world.adapter(finished, "short")) == 0
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl", "eval")] == [0, 4, 6]


def test_an_interruption_while_compiling_ends_the_run_at_once(world, tmp_path, monkeypatch):
    """Weights are placed by then: the interruption comes where the start waits for its programs."""
    waited, placed = [], threading.Event()

    def compile_(self):
        placed.wait()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        waited.append(self.engine._abandoned.wait(20))

    monkeypatch.setattr(Room, "compile", compile_)
    monkeypatch.setattr(Trainer, "_place", lambda self: placed.set())
    assert world.train(tmp_path / "run").exit_code == 130
    assert waited == [True]


def test_a_run_that_is_over_leaves_adapters_that_were_lost(world, finished, tmp_path):
    out = tmp_path / "over"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "adapters")
    result = world.train(out, "--resume", plan="many")
    assert result.exit_code == 0, result.output
    for name in ("short", "long"):
        assert world.difference(world.adapter(out, name), world.adapter(finished, name)) == 0


@pytest.mark.parametrize("killed_in", [CostTable, Plan, Workload])
def test_a_run_killed_while_its_files_are_written_starts_or_resumes(world, tmp_path, monkeypatch, killed_in):
    def kill(*_):
        raise KeyboardInterrupt

    runs = []
    monkeypatch.setattr("lobra_jax.train.train", lambda inputs, out, resume, say: runs.append(resume))
    with monkeypatch.context() as patch:
        patch.setattr(killed_in, "save", kill)
        assert world.train(tmp_path / "run").exit_code == 130
    resume = ("--resume",) * (killed_in is Workload)  # the plan was written
    result = world.train(tmp_path / "run", *resume)
    assert result.exit_code == 0, result.output
    assert runs == [bool(resume)]
