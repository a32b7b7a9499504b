"""What `lobra train` refuses before any device work: one line, and nothing is left."""

from __future__ import annotations

import json
import re
import shutil

import pytest


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
    done = world.train(tmp_path / "run", "--trace", steps)
    assert done.exit_code == 2 and complaint in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "run").exists()


def test_packed_rows_without_packed_times_are_refused(world, tmp_path):
    raw = json.loads((world / "costs.json").read_text())
    for config in raw["configs"]:
        del config["packed"]
    (tmp_path / "costs.json").write_text(json.dumps(raw))
    settings = (f"planner.costs={tmp_path / 'costs.json'}", "training.batching=packed")
    result = world.train(tmp_path / "run", *(part for setting in settings for part in ("--set", setting)))
    assert result.exit_code == 2 and "no packed times" in result.output and "Traceback" not in result.output


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
    plan = world.write_plan(tmp_path, **changes)
    out = tmp_path / "run"
    result = world.lobra("train", "--config", world / "config.yaml", "--plan", plan, "--out", out)
    assert result.exit_code == 2, result.output
    assert complaint in result.output and result.output.strip().count("\n") == 0
    assert not out.exists()


def test_a_plan_is_looked_at_before_anything_is_measured(world, tmp_path):
    """Without a cost table, and with that of another run beside the plan."""
    plan = world.write_plan(tmp_path, num_devices=99, replicas=[{**REPLICA, "count": 9}])
    settings = ("--set", "planner.costs=null", "--out", tmp_path / "run")
    for path, complaint in ((plan, "the plan needs more devices"), (tmp_path / "gone.yaml", "gone.yaml: cannot read")):
        result = world.lobra("train", "--config", world / "config.yaml", "--plan", path, *settings)
        assert result.exit_code == 2 and result.output.startswith(f"error: {path}"), result.output
        assert complaint in result.output and not (tmp_path / "run").exists()
    (tmp_path / "costs.json").write_text((world / "costs.json").read_text().replace('"base"', '"other"', 1))
    plan = world.write_plan(tmp_path, model="else")
    result = world.lobra("train", "--config", world / "config.yaml", "--plan", plan, *settings)
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
    result = world.train(tmp_path / "run", "--set", f"planner.costs={tmp_path / 'costs.json'}")
    assert result.exit_code == 2 and re.search(complaint, result.output), result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plan", ["one.yaml", None])
def test_a_run_directory_that_cannot_be_written_is_said_before_anything_else(world, tmp_path, monkeypatch, plan):
    (tmp_path / "file").write_text("in the way")
    for name in ("data.load.load_tasks", "commands.train._measure"):
        monkeypatch.setattr(f"lobra_jax.{name}", lambda *_, name=name: pytest.fail(f"{name} was called"))
    out = tmp_path / "file" / "run"
    arguments = ("--set", "planner.costs=null") if plan is None else ("--plan", world / plan)
    result = world.lobra("train", "--config", world / "config.yaml", "--out", out, *arguments)
    line = f"error: {out}: --out: cannot write: Not a directory; expected a path that can be written\n"
    assert (result.exit_code, result.output) == (2, line)


def test_a_cost_table_of_another_model_is_refused(world, tmp_path):
    raw = json.loads((world / "costs.json").read_text()) | {"model_fingerprint": "0" * 16}
    (tmp_path / "costs.json").write_text(json.dumps(raw))
    result = world.train(tmp_path / "run", "--set", f"planner.costs={tmp_path / 'costs.json'}")
    assert result.exit_code == 2 and "cost table of another model" in result.output
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_base_is_said_before_anything_is_measured(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no weights")
    arguments = ("--set", f"model.path={tmp_path / 'base'}", "--set", "planner.costs=null")
    done = world.lobra("train", "--config", world / "config.yaml", "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {tmp_path / 'base' / 'model.safetensors'}: not readable as safetensors")
    assert not (tmp_path / "out").exists()
