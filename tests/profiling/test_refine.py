"""`lobra profile --plan` and `bench experiment --refine`: costs that know what a plan's micro-batches take."""

import dataclasses
import json
import re

import jax
import pytest
import yaml
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.config import load_config, model_config
from lobra_jax.out_of_memory import Failure, OutOfMemoryError
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from profiling.measure import Bench
from profiling.plan_shapes import time_shapes, wanted_shapes

BUCKETS = (16, 32)
HOURS = (0.0, 0.0, 1e3, 0.0, 0.0, 1e3)
"""Coefficients that nothing here takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config_json):
    folder = tmp_path_factory.mktemp("refine")
    (folder / "config.json").write_text(tiny_config_json)
    lengths = {"tasks": [{"name": "a", "batch_size": 4, "lengths": {"10": 0.5, "30": 0.5}}]}
    (folder / "lengths.json").write_text(json.dumps(lengths))
    content = {
        "model": {"path": ".", "dtype": "float32"},
        "data": {"source": "synthetic", "lengths": "lengths.json", "num_examples": 32},
        "devices": {"num_devices": 3, "memory_bytes": "4MiB"},
        "planner": {"buckets": list(BUCKETS), "row_options": 2, "mix_remats": True},
        "tasks": [{"name": "a", "batch_size": 4, "context_length": 64, "steps": 1, "rank": 2, "targets": ["q"]}],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    table(folder).save(folder / "plan.costs.json")
    plan().save(folder / "plan.yaml")
    return folder


def table(folder, **changes):
    shapes = model_config(load_config(folder / "run.yaml"))
    configs = [ParallelConfig(tp=tp, pp=1, remat=remat) for tp, remat in ((1, "none"), (1, "full"), (2, "dots"))]
    given = {
        "model": shapes.name,
        "model_fingerprint": shapes.fingerprint,
        "hardware": {"device_kind": "cpu"},
        "configs": tuple(
            ConfigCost(config=config, capacity_tokens=tokens, coefficients=HOURS)
            for config, tokens in zip(configs, (16, 64, 64), strict=True)
        ),
    }
    return CostTable(**(given | changes))


def plan(model="refine", count=1):
    groups = (
        ReplicaGroup(count=count, config=ParallelConfig(tp=2, pp=1, remat="dots"), capacity_tokens=64),
        ReplicaGroup(
            count=1,
            config=ParallelConfig(tp=1, pp=1, remat="none+full"),
            capacity_tokens=64,
            smaller_capacities=(16,),
        ),
    )
    devices = sum(group.num_devices for group in groups)
    return Plan(model=model, num_devices=devices, replicas=groups, buckets=BUCKETS, row_options=2)


def refine_arguments(folder, *arguments, config="run.yaml", plan_file="plan.yaml", out="out.json"):
    fixed = ("profile", "--config", folder / config, "--plan", folder / plan_file, "--out", folder / out)
    return list(map(str, (*fixed, *arguments)))


def refine(folder, *arguments, **files):
    return CliRunner().invoke(main, refine_arguments(folder, *arguments, **files))


def test_shapes_belong_to_the_policy_that_runs_them():
    assert wanted_shapes(plan()) == {
        ParallelConfig(tp=2, pp=1, remat="dots"): ((1, 32), (2, 16), (2, 32), (4, 16)),
        ParallelConfig(tp=1, pp=1, remat="none"): ((1, 16),),
        ParallelConfig(tp=1, pp=1, remat="full"): ((1, 32), (2, 32)),
    }


@pytest.fixture(scope="module")
def refined(folder):
    named = dataclasses.replace(plan(), model=table(folder).model)
    named.save(folder / "plan.yaml")
    result = refine(folder, "--repeats", 2)
    assert result.exit_code == 0, result.output
    return CostTable.load(folder / "out.json"), result.output


def test_every_micro_batch_of_the_plan_is_timed_and_nothing_else_changed(folder, refined):
    new, output = refined
    before = table(folder)
    for cost, old in zip(new.configs, before.configs, strict=True):
        assert [(t.rows, t.length) for t in cost.timed] == sorted(wanted_shapes(plan())[cost.config])
        assert dataclasses.replace(cost, timed=()) == old
        for time in cost.timed:
            assert 0 < cost.micro_batch_s(time.rows, time.length) == time.seconds < 60
        for length in BUCKETS:
            seconds = [time.seconds for time in cost.timed if time.length == length]
            assert seconds == sorted(seconds)
        assert f"{cost.config}: {len(cost.timed)} micro-batches timed" in output
    assert new.provenance["timed_plan"] == str(plan())
    assert new[ParallelConfig(tp=1, pp=1, remat="none+full")].holding([16, 64]).micro_batch_s(1, 32) < 60


def test_more_rows_are_never_told_to_take_less(folder, monkeypatch):
    from profiling.cli import make_setup

    seconds = {(1, 16): 3.0, (2, 16): 2.0, (4, 16): 4.0, (1, 32): 1.0}
    monkeypatch.setattr(Bench, "compile", lambda *_, **__: None)
    monkeypatch.setattr(Bench, "place", lambda self: None)
    monkeypatch.setattr(Bench, "step_s", lambda self, shape, m: m * seconds[shape])
    setup = make_setup(load_config(folder / "run.yaml"), None, 64, 1, None, None)
    setup = dataclasses.replace(setup, cores=None)
    config = ParallelConfig(tp=1, pp=1, remat="none")
    done = []
    (cost,) = (one for one in table(folder).configs if one.config == config)
    costs = table(folder, configs=(dataclasses.replace(cost, fixed_s=0.25),))
    times = time_shapes(setup, {config: tuple(seconds)}, costs, done.append)
    found = {(time.rows, time.length): time.seconds for time in times[config]}
    assert found == pytest.approx({(1, 16): 2.75, (2, 16): 2.75, (4, 16): 3.75, (1, 32): 0.75})
    assert done == [config]


def test_mistakes_are_said_before_anything_is_timed(folder, refined, monkeypatch):
    monkeypatch.setattr("profiling.plan_shapes.time_shapes", lambda *_: pytest.fail("it measures"))
    model = table(folder).model
    for arguments, said in {
        ("--lengths", "16"): "--lengths: not with --plan (got '16'); expected --repeats alone beside it",
        ("--estimate", "h200"): "--estimate: not with --plan",
        ("--set", "training.batching=packed"): "training.batching: not with --plan (got 'packed')",
    }.items():
        result = refine(folder, *arguments)
        assert result.exit_code != 0 and said in result.output, result.output
    dataclasses.replace(plan(count=2), model=model).save(folder / "large.yaml")
    table(folder).save(folder / "large.costs.json")
    result = refine(folder, plan_file="large.yaml")
    assert (
        "large.yaml: replicas: the plan needs more devices than there are (got 5); expected at most 3" in result.output
    )
    dataclasses.replace(plan(), model=model).save(folder / "other.yaml")
    for changes, said in (
        ({"hardware": {"device_kind": "H200"}}, "hardware.device_kind: the costs are of other devices (got 'H200')"),
        ({"model_fingerprint": "x"}, "cost table of another model"),
        ({"configs": table(folder).configs[:2]}, "the cost table lacks a config of the plan"),
    ):
        table(folder, **changes).save(folder / "other.costs.json")
        result = refine(folder, plan_file="other.yaml")
        assert result.exit_code != 0 and said in result.output, result.output
    more = dataclasses.replace(plan(), model=model)
    more = dataclasses.replace(more, replicas=(more.replicas[0].holding(65), *more.replicas[1:]))
    more.save(folder / "other.yaml")
    table(folder).save(folder / "other.costs.json")
    result = refine(folder, plan_file="other.yaml")
    assert (
        "other.yaml: capacity_tokens: more than (tp2,pp1,dots) holds (got '65'); expected at most 64" in result.output
    )
    assert "--out: the plan itself" in refine(folder, out="plan.yaml").output
    plan(model="another").save(folder / "other.yaml")
    table(folder).save(folder / "other.costs.json")
    assert "plan of another model" in refine(folder, plan_file="other.yaml").output
    dataclasses.replace(plan(), model=model).save(folder / "alone.yaml")
    assert "planner.costs: no cost table for the plan" in refine(folder, plan_file="alone.yaml").output


def test_a_device_without_room_is_one_line(folder, refined, monkeypatch):
    for error, said in (
        (OutOfMemoryError([Failure(replica=0, shape=(2, 32))]), "out of device memory, replica 0 with 2 x 32 tokens"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), "out of device memory for weights and adapters"),
    ):
        monkeypatch.setattr(Bench, "step_s", Raising(error))
        result = refine(folder)
        assert result.exit_code == 2 and f"plan.yaml: replicas: {said}" in result.output, result.output


class Raising:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


def test_lengths_are_the_plans_and_no_data_is_looked_for(folder, refined, monkeypatch):
    monkeypatch.setattr("profiling.plan_shapes.time_shapes", lambda setup, *_: pytest.fail(f"lengths {setup.lengths}"))
    (folder / "elsewhere.yaml").write_text((folder / "run.yaml").read_text().replace("lengths.json", "nowhere.json"))
    with pytest.raises(pytest.fail.Exception, match=re.escape(f"lengths {BUCKETS}")):
        CliRunner().invoke(main, refine_arguments(folder, config="elsewhere.yaml"), catch_exceptions=False)


def test_an_experiment_foretells_its_steps_by_them(folder, refined, tmp_path):
    table(folder).save(tmp_path / "costs.json")
    command = ("bench", "experiment", "--config", folder / "run.yaml", "--out", tmp_path / "out")
    options = ("--costs", tmp_path / "costs.json", "--systems", "ours-mixed", "--steps", 2, "--refine", "--repeats", 1)
    result = CliRunner().invoke(main, list(map(str, (*command, *options))))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "experiment.json").read_text(encoding="utf-8"))
    assert record["set_up"]["refined"] is True and " --refine " in record["command"]
    assert all(step["predicted_step_s"] < 60 for step in record["parts"]["ours-mixed"]["steps"])
