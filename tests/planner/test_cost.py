"""Cost tables and histograms with values that cannot be are refused in one line that names file, key and value."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from planner.config_cost import ConfigCost, ShapeTime, mixed
from planner.cost import CostTable
from planner.errors import UserError
from planner.explain import explain
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.problem import build_problem
from planner.simulate import simulate
from planner.workload import Workload

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TABLE = json.loads((CONFIGS / "costs" / "llama2_7b_a100_40g.json").read_text(encoding="utf-8"))
LENGTHS = json.loads((CONFIGS / "lengths" / "lobra_six_tasks.json").read_text(encoding="utf-8"))


def written(folder, raw):
    path = folder / "file.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def refusal(load, path):
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fixed_s", -0.01),
        ("fixed_s", float("nan")),
        ("fixed_s", float("inf")),
        ("capacity_tokens", 3059.5),
        ("capacity_tokens", "3059"),
        ("capacity_tokens", 0),
        ("coefficients", [0.0, 0.0, float("nan"), 0.0, 0.0, 0.0]),
        ("coefficients", [0.0] * 5),
    ],
)
def test_a_config_with_an_impossible_value_is_refused_by_name(tmp_path, key, value):
    raw = copy.deepcopy(TABLE)
    raw["configs"][0][key] = value
    text = refusal(CostTable.load, written(tmp_path, raw))
    assert key in text and f"(tp{raw['configs'][0]['tp']},pp{raw['configs'][0]['pp']}," in text


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_impossible_step_overhead_is_refused(tmp_path, value):
    assert "step_overhead_s" in refusal(CostTable.load, written(tmp_path, TABLE | {"step_overhead_s": value}))


@pytest.mark.parametrize("load", [CostTable.load, Workload.load])
def test_a_list_is_no_table(tmp_path, load):
    assert "not a mapping" in refusal(load, written(tmp_path, [1, 2]))


@pytest.mark.parametrize("value", [2.5, "4", 0])
def test_a_batch_size_that_is_no_number_of_sequences_is_refused(tmp_path, value):
    raw = copy.deepcopy(LENGTHS)
    raw["tasks"][0]["batch_size"] = value
    text = refusal(Workload.load, written(tmp_path, raw))
    assert "batch_size" in text and repr(value) in text


def changed(raw, where, value):
    """A copy of `raw` with the value at a path of keys replaced; None removes the key, NULL is null."""
    raw = copy.deepcopy(raw)
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = json.loads(json.dumps(value)) if value is not NULL else None
    return raw


NULL = object()
FIRST = "configs[0] (tp{tp},pp{pp},{remat})".format(**TABLE["configs"][0])


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("hardware",), NULL, "hardware: bad value (got null); expected a mapping"),
        (("hardware",), "h100", "hardware: bad value (got 'h100')"),
        (("provenance",), NULL, "provenance: bad value (got null)"),
        (("provenance",), {"estimated": True}, "provenance.estimated: bad value (got True); expected a mapping"),
        (("provenance",), {"estimated": {}}, "provenance.estimated.device: missing"),
        (("model",), 7, "model: bad value (got 7)"),
        (("model",), NULL, "model: bad value (got null)"),
        (("version",), 2, "version: unsupported cost table version (got 2)"),
        (("configs",), ["x"], "configs[0]: bad value (got 'x'); expected a mapping"),
        (("configs",), {}, "configs: bad value (got {})"),
        (("configs", 1, "tp"), None, "configs[1].tp: missing; expected an integer >= 1"),
        (("configs", 0, "remat"), NULL, "configs[0].remat: bad value (got null); expected one of none, dots"),
        (("configs", 0, "coefficients", 2), "x", f"{FIRST}.coefficients[2]: bad value (got 'x'); expected a finite"),
        (("configs", 0, "coefficients", 2), NULL, f"{FIRST}.coefficients[2]: bad value (got null)"),
        (("configs", 0, "coefficients", 2), 10**400, f"{FIRST}.coefficients[2]: bad value (got 1000"),
        (("configs", 0, "capacity_tokens"), True, f"{FIRST}.capacity_tokens: bad value (got True)"),
        (("configs", 0, "fixeds"), 3, "configs[0]: unknown key 'fixeds'; expected fixed_s"),
        (("configs", 0, "points"), [1], f"{FIRST}.points[0]: bad value (got 1); expected a mapping"),
        (("configs", 0, "points"), [{"rows": 1}], f"{FIRST}.points[0].length: missing"),
        (("configs", 0, "points"), [{"row": 1}], f"{FIRST}.points[0]: unknown key 'row'"),
        (("configs", 0, "fit_error"), "x", f"{FIRST}.fit_error: bad value (got 'x')"),
        (("configs", 0, "timed"), [{"rows": 1, "length": 8}], f"{FIRST}.timed[0].seconds: missing"),
        (("configs", 0, "timed"), [{"rows": 1, "length": 8, "seconds": 0}], f"{FIRST}.timed[0].seconds: bad value"),
        (("configs", 0, "timed"), [{"rows": 0, "length": 8, "seconds": 1}], f"{FIRST}.timed[0].rows: bad value"),
        (("configs", 0, "timed"), [{"row": 1}], f"{FIRST}.timed[0]: unknown key 'row'"),
        (("configs", 0, "packed"), {"capacity_tokens": 9}, f"{FIRST}.packed.coefficients: missing"),
    ],
)
def test_what_is_wrong_in_a_table_is_said_with_key_and_value(tmp_path, where, value, complaint):
    assert complaint in refusal(CostTable.load, written(tmp_path, changed(TABLE, where, value)))


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("tasks",), {"dolly": {}}, "tasks: bad value (got {'dolly': {}}); expected a list of tasks"),
        (("tasks", 0), "x", "tasks[0]: bad value (got 'x'); expected a mapping"),
        (("tasks", 0, "name"), NULL, "tasks[0].name: bad value (got null)"),
        (("tasks", 0, "batch_size"), None, "tasks[0] 'a'.batch_size: missing; expected an integer >= 1"),
        (("tasks", 0, "batch_size"), True, "tasks[0] 'a'.batch_size: bad value (got True)"),
        (("tasks", 0, "lengths"), [200], "tasks[0] 'a'.lengths: not a mapping (got [200])"),
        (("tasks", 0, "lengths", "20.5"), 0.5, "tasks[0] 'a'.lengths['20.5']: bad length"),
        (("tasks", 0, "lengths", "020"), 0.5, "tasks[0] 'a'.lengths['020']: the length 20 twice"),
        (("tasks", 0, "lengths", "20"), "half", "tasks[0] 'a'.lengths['20']: bad value (got 'half')"),
        (("tasks", 0, "lengths", "20"), -0.5, "tasks[0] 'a'.lengths['20']: bad value (got -0.5)"),
        (("tasks", 0, "lengths", "20"), 1.5, "length 20 with share 1.5"),
    ],
)
def test_what_is_wrong_in_a_histogram_is_said_with_key_and_value(tmp_path, where, value, complaint):
    raw = {"tasks": [{"name": "a", "batch_size": 4, "lengths": {"20": 0.5, "40": 0.5}}]}
    assert complaint in refusal(Workload.load, written(tmp_path, changed(raw, where, value)))


def test_a_time_below_zero_is_said_with_the_file_wherever_it_is_met(tmp_path):
    raw = copy.deepcopy(TABLE)
    for config in raw["configs"]:
        config["coefficients"] = [0.0, 0.0, -1e-4, 0.0, 0.0, 0.0]
    costs = CostTable.load(written(tmp_path, raw))
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps({"tasks": [{"name": "a", "batch_size": 4, "lengths": {"20": 1.0}}]}))
    workload = Workload.load(lengths)
    first = costs.configs[0]
    group = ReplicaGroup(count=1, config=first.config, capacity_tokens=first.capacity_tokens)
    plan = Plan(model=costs.model, num_devices=16, replicas=(group,), buckets=(32,))
    for use in (
        lambda _: build_problem(workload, costs, 16),
        lambda _: simulate(plan, costs, workload, num_steps=1),
        lambda _: explain(plan, costs, workload, compare=False),
    ):
        assert "coefficients: cost table of (tp" in refusal(use, tmp_path / "file.json")


def test_what_in_a_plan_does_not_go_with_costs_and_lengths_is_said_with_its_file(tmp_path):
    costs, workload = CostTable.from_dict(TABLE), Workload.load(CONFIGS / "lengths" / "lobra_six_tasks.json")
    first = costs.configs[0]
    group = ReplicaGroup(count=1, config=first.config, capacity_tokens=first.capacity_tokens)
    wide = ReplicaGroup(count=1, config=ParallelConfig(tp=16, pp=1, remat="none"), capacity_tokens=32)
    path = tmp_path / "plan.yaml"
    for changes, complaint in (
        ({}, "buckets: sequences of"),
        ({"model": "other"}, "model: plan of another model"),
        ({"replicas": (wide,)}, "replicas[0]: no costs of (tp16,pp1,none)"),
        ({"replicas": (group.holding(10**6),)}, "replicas[0].capacity_tokens: more than"),
    ):
        made = {"model": costs.model, "num_devices": 16, "replicas": (group,), "buckets": (32,)} | changes
        Plan(**made).save(path)
        plan = Plan.load(path)
        assert complaint in refusal(lambda _, plan=plan: simulate(plan, costs, workload, num_steps=1), path)
        assert complaint in refusal(lambda _, plan=plan: explain(plan, costs, workload, compare=False), path)


def test_keys_that_the_format_does_not_have_are_let_be(tmp_path):
    """Tables are written by programs, some by newer ones."""
    raw = copy.deepcopy(TABLE) | {"remark": "of mine"}
    raw["configs"][0]["remark"] = 1
    assert CostTable.load(written(tmp_path, raw)) == CostTable.from_dict(TABLE)


def test_micro_batches_that_were_timed_take_what_they_took_and_others_what_is_fitted(tmp_path):
    table = CostTable.load(written(tmp_path, TABLE))
    cost = table.configs[0]
    timed = dataclasses.replace(cost, timed=(ShapeTime(rows=2, length=512, seconds=9.5),))
    path = tmp_path / "timed.json"
    dataclasses.replace(table, configs=(timed, *table.configs[1:])).save(path)
    read = CostTable.load(path)
    assert read.configs == (timed, *table.configs[1:])
    assert read.configs[0].micro_batch_s(2, 512) == 9.5
    assert read.configs[0].micro_batch_s(1, 512) == cost.micro_batch_s(1, 512)
    assert read.configs[0].holding([600]).micro_batch_s(2, 512) == 9.5
    assert "timed" not in TABLE["configs"][0] and "timed" not in table.to_dict()["configs"][0]


def test_a_config_of_several_policies_has_the_times_of_each():
    def cost(remat, capacity, seconds):
        times = (ShapeTime(rows=1, length=32, seconds=seconds), ShapeTime(rows=1, length=64, seconds=2 * seconds))
        config = ParallelConfig(tp=1, pp=1, remat=remat)
        return ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0, 0, 1, 0, 0, 0), timed=times)

    both = mixed([cost("none", 32, 5.0), cost("full", 64, 7.0)])
    assert [both.micro_batch_s(1, length) for length in (16, 32, 64)] == [16, 5.0, 14.0]


def test_plans_are_made_by_what_is_fitted(tmp_path):
    table = CostTable.load(written(tmp_path, TABLE | {"provenance": {"estimated": {"device": "h200"}}}))
    timed = dataclasses.replace(
        table,
        configs=tuple(
            dataclasses.replace(cost, timed=(ShapeTime(rows=1, length=16384, seconds=99.0),)) for cost in table.configs
        ),
    )
    assert timed.is_timed and not table.is_timed
    assert timed.fitted() == table == table.fitted()
    assert "but for the micro-batches of a plan" in timed.estimate_note and "but for" not in table.estimate_note
    workload = Workload.load(CONFIGS / "lengths" / "lobra_six_tasks.json")
    problems = [build_problem(workload, costs, 16) for costs in (table, timed)]
    assert problems[0] == problems[1]
