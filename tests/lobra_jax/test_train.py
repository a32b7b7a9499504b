"""`lobra train` from files to adapters: resume, solo against joint, stopping a task, refusing to overwrite."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lobra_jax.cli import main
from lobra_jax.engine import Engine
from lobra_jax.metrics import read_metrics
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import save_hf
from lobra_jax.models.weights import RandomWeights
from lobra_jax.peft_folder import read_peft_adapter, write_peft_adapter
from lobra_jax.room import Room
from lobra_jax.train import Trainer
from planner.config_cost import ConfigCost, PackedCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.workload import Workload

MODEL = LlamaConfig(
    name="base",
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
)
STEPS = 6
CONFIGS = [(1, 1, "none", 128), (1, 2, "none", 128), (2, 1, "full", 128), (1, 1, "full", 128)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with base, tokenizer, two tasks' data, config, cost table and two plans."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    words = [f"w{i:02d}" for i in range(40)]

    def text(count):
        return " ".join(rng.choice(words, count))

    short = [{"prompt": text(3) + " ", "completion": text(int(rng.integers(2, 5)))} for _ in range(30)]
    long = [{"text": text(int(rng.integers(8, 16)))} for _ in range(30)]
    for name, records in (("short", short), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    save_hf(folder / "base", MODEL, RandomWeights(MODEL, 0))
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    config = {
        "model": {"path": "base", "dtype": "float32"},
        "data": {"cache_dir": "cache"},
        "devices": {"simulated": 8},
        "planner": {"costs": "costs.json"},
        "training": {"checkpoint_interval": 2, "eval_batch_size": 8},
        # Epsilons above rounding noise: Adam moves an element whose gradient is noise by noise / (noise + epsilon).
        "tasks": [
            {"name": "short", "files": ["short.jsonl"], "batch_size": 5, "steps": STEPS, "rank": 2, "alpha": 4,
             "lr": 3e-3, "dropout": 0.1, "eval_fraction": 0.2, "eval_interval": 4, "epsilon": 1e-5},
            {"name": "long", "files": ["long.jsonl"], "batch_size": 3, "steps": STEPS - 1, "rank": 4, "alpha": 8,
             "targets": ["q", "v", "up"], "lr": 2e-3, "epsilon": 1e-5, "dora": True, "ema_decay": 0.5},
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    costs = tuple(
        ConfigCost(
            config=ParallelConfig(tp=tp, pp=pp, remat=remat),
            capacity_tokens=capacity,
            coefficients=(0.0, 0.0, 1e-5 / tp, 0.0, 0.0, 1e-3),
            packed=PackedCost(capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-5 / tp, 1e-3)),
        )
        for tp, pp, remat, capacity in CONFIGS
    )
    CostTable(model="base", model_fingerprint=MODEL.fingerprint, hardware={"num_devices": 8}, configs=costs).save(
        folder / "costs.json"
    )
    for name, chosen in (("one", [0]), ("many", [0, 1, 2])):
        groups = tuple(
            ReplicaGroup(count=1, config=costs[i].config, capacity_tokens=costs[i].capacity_tokens) for i in chosen
        )
        Plan(model="base", num_devices=8, replicas=groups, buckets=(64,)).save(folder / f"{name}.yaml")
    mixed = ParallelConfig(tp=1, pp=1, remat="none+full")
    group = ReplicaGroup(count=2, config=mixed, capacity_tokens=128, smaller_capacities=(32,))
    Plan(model="base", num_devices=8, replicas=(group,), buckets=(16, 64)).save(folder / "mixed.yaml")
    return folder


def lobra(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train(world: Path, out: Path, *arguments: object, plan: str = "one"):
    return lobra("train", "--config", world / "config.yaml", "--plan", world / f"{plan}.yaml", "--out", out, *arguments)


def adapter(run: Path, task: str) -> dict[str, np.ndarray]:
    _, layers = read_peft_adapter(run / "adapters" / task)
    return {
        f"{layer}.{target}.{factor}": array
        for layer, targets in layers.items()
        for target, pair in targets.items()
        for factor, array in pair.items()
    }


def kill_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Interrupts a run where it would issue step `last`."""
    issue = Trainer._issue

    def killed(self, step, feeder):
        if step == last:
            raise KeyboardInterrupt
        return issue(self, step, feeder)

    monkeypatch.setattr(Trainer, "_issue", killed)


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """|found - expected| / |expected| over a whole adapter."""
    assert found.keys() == expected.keys()
    squares = [(np.sum((found[k] - expected[k]) ** 2), np.sum(expected[k] ** 2)) for k in expected]
    above, below = np.sum(squares, axis=0, dtype=np.float64)
    return float(np.sqrt(above / below))


@pytest.fixture(scope="module")
def finished(world):
    """An uninterrupted joint run on three unlike replicas."""
    out = world / "finished"
    result = train(world, out, plan="many")
    assert result.exit_code == 0, result.output
    return out


def test_a_run_leaves_everything_it_promises(world, finished):
    steps = read_metrics(finished / "metrics.jsonl", "step")
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all(len(r["measured_s"]) == len(r["predicted_s"]) == 3 for r in steps)
    tasks = read_metrics(finished / "metrics.jsonl", "task")
    assert [r["task_step"] for r in tasks if r["task"] == "long"] == list(range(1, STEPS))
    assert tasks[-1]["loss"] < tasks[0]["loss"]
    evals = [(r["task"], r["step"]) for r in read_metrics(finished / "metrics.jsonl", "eval")]
    assert evals == [("short", 0), ("short", 4), ("short", STEPS)]
    for name in ("config.yaml", "plan.yaml", "costs.json", "lengths.json", "timeline.json", "tensorboard"):
        assert (finished / name).exists()
    spec, _ = read_peft_adapter(finished / "adapters" / "long")
    assert (spec.rank, spec.targets) == (4, ("q", "v", "up"))
    timeline = json.loads((finished / "timeline.json").read_text())
    drawn = [item for r in timeline["replicas"] for stage in r["stages"] for item in stage]
    assert drawn and all(0 <= item["start_s"] <= item["end_s"] <= timeline["step_s"] for item in drawn)


def test_nothing_is_compiled_after_warm_up(world, finished, tmp_path):
    """Not by steps, evaluations, checkpoints nor other shapes of the plan's lattice."""
    plan = write_plan(world, tmp_path, buckets=[16, 32, 64])
    out = tmp_path / "three_buckets"
    result = lobra("train", "--config", world / "config.yaml", "--plan", plan, "--out", out)
    assert result.exit_code == 0, result.output
    for run in (finished, out):
        assert [r["compilations"] for r in read_metrics(run / "metrics.jsonl", "step")] == [0] * STEPS


@pytest.mark.parametrize("name", ["short", "long"])
def test_a_task_trained_alone_gives_the_adapter_of_the_joint_run(world, finished, tmp_path, name):
    result = train(world, tmp_path / "solo", "--tasks", name)
    assert result.exit_code == 0, result.output
    assert [p.name for p in (tmp_path / "solo" / "adapters").iterdir()] == [name]
    assert difference(adapter(tmp_path / "solo", name), adapter(finished, name)) < 1e-5


@pytest.fixture(scope="module")
def resumed(world):
    """(run directory, what a killed and a resumed part of it said), both traced, on three unlike replicas."""
    out = world / "killed"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 5)
        killed = train(world, out, "--trace", "4-6", plan="many")
    assert killed.exit_code == 130
    lobra("trace", out, "--out", out / "killed.json")
    refused = train(world, out, "--resume", "--trace", "5-6", plan="many")
    assert refused.exit_code == 2 and "(got '5-6'); expected steps from 6, as the first" in refused.output
    result = train(world, out, "--resume", "--trace", "6-6", plan="many")
    assert result.exit_code == 0, result.output
    return out, killed.output, result.output


def test_a_killed_run_resumes_bitwise_traced_or_not(world, finished, resumed):
    out, _, output = resumed
    assert "resumed after step 4" in output
    for name in ("short", "long"):
        whole, resumed = adapter(finished, name), adapter(out, name)
        for key, array in whole.items():
            np.testing.assert_array_equal(array, resumed[key])
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl", "step")] == list(range(1, STEPS + 1))
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl", "task") if r["task"] == "short"]
        for run in (finished, out)
    ]
    assert losses[0] == losses[1]


def test_traced_steps_are_there_even_if_the_run_was_killed(resumed):
    out, killed, output = resumed
    assert "traced steps: 4, 5; read them by lobra trace" in killed
    assert "traced steps: 6; read them by lobra trace" in output
    done = lobra("trace", out, "--out", out / "trace.json")
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


def test_programs_of_a_traced_run_are_run_once_before_its_steps(world, tmp_path, monkeypatch):
    asked = []

    def warm_up(self, shapes=None):
        asked.append(shapes)
        return before(self, shapes)

    before = Engine.warm_up
    monkeypatch.setattr(Engine, "warm_up", warm_up)
    for name, options in (("plain", ()), ("traced", ("--trace", "2-2"))):
        result = train(world, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
    assert asked[0] is None and all(asked[1])
    plain, traced = (
        [record["first_runs"] for record in read_metrics(tmp_path / name / "metrics.jsonl", "step")]
        for name in ("plain", "traced")
    )
    assert plain[0] > 0 and sum(plain) <= len(asked[1][0])
    assert not any(traced)


def test_starts_say_how_many_programs_came_from_the_cache(resumed):
    out, killed, output = resumed
    starts = read_metrics(out / "metrics.jsonl", "start")
    assert [r["step"] for r in starts] == [0, 4]
    for record, said in zip(starts, (killed, output), strict=True):
        assert record["programs"] >= 10 and 0 <= record["programs_from_cache"] <= record["programs"]
        compiled = record["programs"] - record["programs_from_cache"]
        assert f": {compiled} compiled, {record['programs_from_cache']} from the cache" in said


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ("3", "not a range of steps (got '3'); expected FIRST-LAST, such as 3-4"),
        ("4-3", "not a range of steps"),
        ("1-2", "steps that cannot be traced (got '1-2'); expected steps from 2, as the first is a"),
        ("2-7", "to 6"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused_before_anything_else(world, tmp_path, steps, complaint):
    done = train(world, tmp_path / "run", "--trace", steps)
    assert done.exit_code == 2 and complaint in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "run").exists()


def test_resume_on_another_plan_goes_on_from_the_same_state(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "moved"
    kill_at(monkeypatch, 3)
    train(world, out, plan="many")
    monkeypatch.undo()
    result = train(world, out, "--resume", plan="one")
    assert result.exit_code == 0, result.output
    assert difference(adapter(out, "short"), adapter(finished, "short")) < 1e-5


def test_replicas_of_several_policies_train_the_same_adapters_and_resume(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "mixed"
    kill_at(monkeypatch, 3)
    train(world, out, plan="mixed")
    monkeypatch.undo()
    result = lobra("train", "--config", world / "config.yaml", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert str(Plan.load(out / "plan.yaml")) == "2x(tp1,pp1,none+full)"
    assert difference(adapter(out, "short"), adapter(finished, "short")) < 1e-5


def test_packed_rows_where_they_are_faster_train_the_same_adapters(world, finished, tmp_path):
    """The cost table of these tests prices packed and padded tokens alike, so fewer of them are faster."""
    out = tmp_path / "packed"
    result = train(world, out, "--set", "training.batching=auto")
    assert result.exit_code == 0, result.output
    assert "batching: packed (over 16 sampled batches a step takes" in result.output
    for name in ("short", "long"):
        assert difference(adapter(out, name), adapter(finished, name)) < 1e-5
    packed, padded = (read_metrics(run / "metrics.jsonl", "step") for run in (out, finished))
    assert [r["tokens"] for r in packed] == [r["tokens"] for r in padded]
    assert sum(r["padded_tokens"] for r in packed) < sum(r["padded_tokens"] for r in padded)
    assert [r["compilations"] for r in packed] == [0] * STEPS


def test_packed_rows_without_packed_times_are_refused(world, tmp_path):
    raw = json.loads((world / "costs.json").read_text())
    for config in raw["configs"]:
        del config["packed"]
    (tmp_path / "costs.json").write_text(json.dumps(raw))
    settings = (f"planner.costs={tmp_path / 'costs.json'}", "training.batching=packed")
    result = train(world, tmp_path / "run", *(part for setting in settings for part in ("--set", setting)))
    assert result.exit_code == 2 and "no packed times" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_task_whose_loss_is_not_finite_stops_alone(world, finished, tmp_path, batching):
    out = tmp_path / "broken"
    result = train(world, out, "--set", "tasks.long.lr=1e38", "--set", f"training.batching={batching}")
    assert result.exit_code == 2
    assert "task 'long' at step 2" in result.output.splitlines()[-1]
    assert all(np.isfinite(array).all() for array in adapter(out, "long").values())
    assert not any(array.any() for key, array in adapter(out, "long").items() if key.endswith(".b"))
    assert difference(adapter(out, "short"), adapter(finished, "short")) < 1e-5
    events = [r["task"] for r in read_metrics(out / "metrics.jsonl", "event") if r["event"] == "nan"]
    assert events == ["long"]


def test_what_a_kill_left_while_a_file_was_written_is_no_run(world, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml.new").write_text("mod")
    result = train(world, out, "--tasks", "short", "--set", "tasks.short.steps=1")
    assert result.exit_code == 0, result.output


def test_a_run_directory_is_never_overwritten(world, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    result = train(world, finished)
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
        save_hf(world / "other", MODEL, RandomWeights(MODEL, 1))
        shutil.copy(world / "base" / "tokenizer.json", world / "other")
    arguments = [argument.replace("OTHER", str(world / "other")) for argument in arguments]
    result = train(world, finished, "--resume", *arguments)
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert re.search(complaint, line), line
    assert sorted((p.name, p.stat().st_mtime_ns) for p in finished.iterdir() if p.is_file()) == before


def write_plan(world: Path, folder: Path, **changes: object) -> Path:
    raw = yaml.safe_load((world / "one.yaml").read_text()) | changes
    (folder / "plan.yaml").write_text(yaml.safe_dump(raw))
    return folder / "plan.yaml"


REPLICA = {"count": 1, "tp": 1, "pp": 1, "remat": "none", "capacity_tokens": 128}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_devices": 99, "replicas": [{**REPLICA, "count": 99}]}, "the plan needs more devices than there are"),
        ({"buckets": [16]}, "has a sequence longer than any replica of the plan takes"),
        ({"replicas": [{**REPLICA, "tp": 4}]}, "the cost table lacks a config of the plan"),
        ({"model": "other"}, "plan of another model"),
        ({"replicas": [{**REPLICA, "remat": "some"}]}, "expected one of none, dots, attention, full"),
        ({"replicas": [{**REPLICA, "speed": 1}]}, "unknown key 'speed'"),
    ],
)
def test_a_plan_that_cannot_run_is_one_line_and_leaves_nothing(world, tmp_path, changes, complaint):
    plan = write_plan(world, tmp_path, **changes)
    out = tmp_path / "run"
    result = lobra("train", "--config", world / "config.yaml", "--plan", plan, "--out", out)
    assert result.exit_code == 2, result.output
    assert complaint in result.output and result.output.strip().count("\n") == 0
    assert not out.exists()


def test_a_plan_is_looked_at_before_anything_is_measured(world, tmp_path):
    """Without a cost table, and with that of another run beside the plan."""
    plan = write_plan(world, tmp_path, num_devices=99, replicas=[{**REPLICA, "count": 9}])
    settings = ("--set", "planner.costs=null", "--out", tmp_path / "run")
    for path, complaint in ((plan, "the plan needs more devices"), (tmp_path / "gone.yaml", "gone.yaml: cannot read")):
        result = lobra("train", "--config", world / "config.yaml", "--plan", path, *settings)
        assert result.exit_code == 2 and result.output.startswith(f"error: {path}"), result.output
        assert complaint in result.output and not (tmp_path / "run").exists()
    (tmp_path / "costs.json").write_text((world / "costs.json").read_text().replace('"base"', '"other"', 1))
    plan = write_plan(world, tmp_path, model="else")
    result = lobra("train", "--config", world / "config.yaml", "--plan", plan, *settings)
    assert result.exit_code == 2 and "plan of another model (got 'else'); expected other" in result.output


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"provenance": {"num_tasks": 1}}, r"provenance.num_tasks.*got 1.*2 or more"),
        ({"provenance": {"rank": 2}}, r"provenance.rank.*got 2.*4 or more"),
        ({"provenance": {"dora": False}}, r"provenance.dora.*got False.*expected True:"),
        ({"provenance": {"averages": False}}, r"provenance.averages.*got False.*expected True:"),
        ({"provenance": {"targets": ["q", "v"]}}, r"provenance.targets.*got \['q', 'v'\].*expected.*up.*among them:"),
        ({"provenance": {"optimizers": ["sgd"]}}, r"provenance.optimizers.*got \['sgd'\].*adamw among them:"),
        ({"provenance": {"dtype": "bfloat16"}}, r"provenance.dtype.*float32"),
        ({"provenance": {"quantization": "int8"}}, r"provenance.quantization.*got 'int8'.*expected none"),
    ],
)
def test_a_cost_table_measured_for_less_is_refused(world, tmp_path, changes, complaint):
    raw = json.loads((world / "costs.json").read_text()) | changes
    (tmp_path / "costs.json").write_text(json.dumps(raw))
    result = train(world, tmp_path / "run", "--set", f"planner.costs={tmp_path / 'costs.json'}")
    assert result.exit_code == 2 and re.search(complaint, result.output), result.output
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_over(world, finished, tmp_path, monkeypatch):
    out = tmp_path / "early"
    kill_at(monkeypatch, 1)
    assert train(world, out, plan="many").exit_code == 130
    monkeypatch.undo()
    result = train(world, out, "--resume", plan="many")
    assert result.exit_code == 0, result.output
    assert difference(adapter(out, "short"), adapter(finished, "short")) == 0
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
    assert train(world, tmp_path / "run").exit_code == 130
    assert waited == [True]


def test_a_run_that_is_over_leaves_adapters_that_were_lost(world, finished, tmp_path):
    out = tmp_path / "over"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "adapters")
    result = train(world, out, "--resume", plan="many")
    assert result.exit_code == 0, result.output
    for name in ("short", "long"):
        assert difference(adapter(out, name), adapter(finished, name)) == 0


@pytest.mark.parametrize("plan", ["one.yaml", None])
def test_a_run_directory_that_cannot_be_written_is_said_before_anything_else(world, tmp_path, monkeypatch, plan):
    (tmp_path / "file").write_text("in the way")
    for name in ("data.load.load_tasks", "commands.train._measure"):
        monkeypatch.setattr(f"lobra_jax.{name}", lambda *_, name=name: pytest.fail(f"{name} was called"))
    out = tmp_path / "file" / "run"
    arguments = ("--set", "planner.costs=null") if plan is None else ("--plan", world / plan)
    result = lobra("train", "--config", world / "config.yaml", "--out", out, *arguments)
    line = f"error: {out}: --out: cannot write: Not a directory; expected a path that can be written\n"
    assert (result.exit_code, result.output) == (2, line)


@pytest.mark.parametrize("killed_in", [CostTable, Plan, Workload])
def test_a_run_killed_while_its_files_are_written_starts_or_resumes(world, tmp_path, monkeypatch, killed_in):
    def kill(*_):
        raise KeyboardInterrupt

    runs = []
    monkeypatch.setattr("lobra_jax.train.train", lambda inputs, out, resume, say: runs.append(resume))
    with monkeypatch.context() as patch:
        patch.setattr(killed_in, "save", kill)
        assert train(world, tmp_path / "run").exit_code == 130
    resume = ("--resume",) * (killed_in is Workload)  # the plan was written
    result = train(world, tmp_path / "run", *resume)
    assert result.exit_code == 0, result.output
    assert runs == [bool(resume)]


def test_a_cost_table_of_another_model_is_refused(world, tmp_path):
    raw = json.loads((world / "costs.json").read_text()) | {"model_fingerprint": "0" * 16}
    (tmp_path / "costs.json").write_text(json.dumps(raw))
    result = train(world, tmp_path / "run", "--set", f"planner.costs={tmp_path / 'costs.json'}")
    assert result.exit_code == 2 and "cost table of another model" in result.output
    assert not (tmp_path / "run").exists()


def test_without_a_plan_one_is_made_from_the_cost_table(world, tmp_path):
    out = tmp_path / "planned"
    result = lobra(
        "train", "--config", world / "config.yaml", "--out", out, "--tasks", "short",
        "--set", "devices.num_devices=1", "--set", "tasks.short.steps=1", "--set", "planner.num_buckets=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Plan.load(out / "plan.yaml").planner == "exact"


def go_on(world, out, given, *changes, task="long"):
    """Trains `task` alone from an adapter, at a rate so small that nothing moves."""
    stated = [part for change in changes for part in ("--set", change)]
    start = ["--set", f"tasks.{task}.adapter={given}", "--set", f"tasks.{task}.lr=1e-12"]
    return train(world, out, "--tasks", task, *start, *stated)


def test_training_goes_on_from_a_peft_adapter(world, finished, tmp_path):
    given = finished / "adapters" / "long"
    done = go_on(world, tmp_path / "on", given)
    assert done.exit_code == 0, done.output
    assert difference(adapter(tmp_path / "on", "long"), adapter(finished, "long")) < 1e-6
    fresh = train(world, tmp_path / "fresh", "--tasks", "long", "--set", "tasks.long.lr=1e-12")
    assert fresh.exit_code == 0, fresh.output
    assert difference(adapter(tmp_path / "fresh", "long"), adapter(finished, "long")) > 0.01


def test_rank_alpha_and_targets_are_taken_from_the_adapter(world, finished):
    from lobra_jax.config import load_config

    given = finished / "adapters" / "long"
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw["tasks"] = [{k: v for k, v in raw["tasks"][1].items() if k not in ("rank", "alpha", "targets")}]
    (world / "from_adapter.yaml").write_text(yaml.safe_dump(raw))
    (task,) = load_config(world / "from_adapter.yaml", [f"tasks.long.adapter={given}"]).tasks
    assert (task.rank, task.alpha, task.rslora, task.targets) == (4, 8.0, False, ("q", "v", "up"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("tasks.long.rank=8", "tasks.long: rank = 8 beside an adapter of another; expected 4 as in "),
        ("tasks.long.targets=[q]", "tasks.long: targets = ('q',) beside an adapter of another"),
        ("tasks.long.alpha=1", "tasks.long: alpha = 1.0 beside an adapter of another; expected 8"),
        ("tasks.long.adapter=nowhere", "cannot read the adapter's config: No such file"),
    ],
)
def test_an_adapter_unlike_the_config_is_refused(world, finished, tmp_path, change, complaint):
    done = go_on(world, tmp_path / "out", finished / "adapters" / "long", change)
    assert done.exit_code == 2
    assert complaint in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(world, finished, tmp_path):
    spec, layers = read_peft_adapter(finished / "adapters" / "long")
    write_peft_adapter(tmp_path / "shallow", spec, {"0": layers["0"]}, "base")
    done = go_on(world, tmp_path / "out", tmp_path / "shallow")
    assert "an adapter of other layers than the model's (got '1 layers'); expected 2 of base" in done.output
    narrow = {layer: {t: {**p, "a": p["a"][1:]} for t, p in pairs.items()} for layer, pairs in layers.items()}
    write_peft_adapter(tmp_path / "narrow", spec, narrow, "base")
    done = go_on(world, tmp_path / "out", tmp_path / "narrow")
    assert "_proj has the wrong shape (got (15, " in done.output


def test_what_is_wrong_with_the_base_is_said_before_anything_is_measured(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no weights")
    arguments = ("--set", f"model.path={tmp_path / 'base'}", "--set", "planner.costs=null")
    done = lobra("train", "--config", world / "config.yaml", "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {tmp_path / 'base' / 'model.safetensors'}: not readable as safetensors")
    assert not (tmp_path / "out").exists()


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
        kill_at(patch, 4)
        train(world, out, *NO_PROGRESS)
    done = train(world, out, "--resume", *NO_PROGRESS)
    assert done.exit_code == 0, done.output
    records = read_metrics(out / "metrics.jsonl")
    steps = {
        name: [r["step"] for r in records if r["kind"] == "task" and r["task"] == name] for name in ("short", "long")
    }
    assert steps == {"short": [1], "long": [1, 2, 3, 4, 5]}
    assert [(r["task"], r["step"]) for r in records if r.get("event") == "early_stop"] == [("short", 1)]
    assert difference(adapter(out, "long"), adapter(finished, "long")) < 1e-5


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
    done = lobra("export", "--run", finished, "--task", "short", "--best", "--out", tmp_path / "best")
    assert done.exit_code == 0, done.output
    missing = lobra("export", "--run", finished, "--task", "long", "--best", "--out", tmp_path / "none")
    assert missing.exit_code == 2
    assert "no adapter of this task (got 'long'); expected one of short" in missing.output


def test_a_run_is_over_when_every_task_has_ended(world, tmp_path):
    out = tmp_path / "run"
    done = train(world, out, "--tasks", "short", *NO_PROGRESS)
    assert done.exit_code == 0, done.output
    records = read_metrics(out / "metrics.jsonl")
    assert max(r["step"] for r in records if r["kind"] == "step") == 1
    assert [r["step"] for r in records if r.get("event") == "checkpoint"] == [1]
    start = read_peft_adapter(out / "best" / "short")[1]
    assert not any(pair["b"].any() for targets in start.values() for pair in targets.values())
    assert adapter(out, "short").keys()
