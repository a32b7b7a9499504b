"""`lobra plan` from a run config and without one."""

import dataclasses
import json
import re

import pytest
import yaml

from lobra_jax.cli import main
from lobra_jax.commands.plan import planned_devices
from lobra_jax.config import load_config
from lobra_jax.models.config import PRESETS
from planner import drift
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan
from planner.workload import TaskLengths, Workload

TINY = PRESETS["tiny"]
NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=2, pp=1, remat="full")
WORKLOAD = Workload(
    tasks=(
        TaskLengths(name="a", batch_size=8, lengths={20: 0.5, 30: 0.5}),
        TaskLengths(name="b", batch_size=4, lengths={60: 0.5, 200: 0.5}),
    )
)


def cost(config, capacity):
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 2e-3))


COSTS = CostTable(
    model=TINY.name,
    model_fingerprint=TINY.fingerprint,
    hardware={},
    configs=(cost(NARROW, 64), cost(WIDE, 256)),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a config on synthetic data, its histogram and a cost table; the working folder of the test."""
    config = {
        "model": {"preset": "tiny", "dtype": "float32"},
        "data": {"source": "synthetic", "lengths": "hist.json", "num_examples": 256},
        "tasks": [
            {"name": "a", "batch_size": 8, "steps": 1, "context_length": 256},
            {"name": "b", "batch_size": 4, "steps": 1, "context_length": 256},
        ],
        "devices": {"num_devices": 4},
        "planner": {"buckets": [32, 64, 200], "solve_time_limit_s": 20},
    }
    (tmp_path / "C.yaml").write_text(yaml.safe_dump(config))
    WORKLOAD.save(tmp_path / "hist.json")
    COSTS.save(tmp_path / "costs.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lobra(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_config_brings_lengths_devices_and_planner(folder, capsys):
    assert lobra("plan", "--config", "C.yaml", "--costs", "costs.json", "--out", "plan.yaml") == 0

    plan = Plan.load("plan.yaml")
    assert (plan.model, plan.num_devices, plan.planner, plan.buckets) == ("tiny", 4, "exact", (32, 64, 200))
    printed = capsys.readouterr().out
    assert str(plan) in printed and "proven bound" in printed and "gap" in printed
    assert {task.name for task in Workload.load("plan.lengths.json").tasks} == {"a", "b"}
    assert lobra("explain", "plan.yaml", "--no-compare") == 0
    assert "replica 0" in capsys.readouterr().out


def test_flags_and_overrides_win_over_the_config(folder):
    code = lobra(
        *("plan", "--config", "C.yaml", "--set", "planner.costs=costs.json", "--set", "planner.planner=prune"),
        *("--devices", 3, "--buckets", "64,256", "--remats", "full", "--out", "plan.yaml"),
    )

    assert code == 0
    plan = Plan.load("plan.yaml")
    assert (plan.num_devices, plan.planner, plan.buckets) == (3, "prune", (64, 256))
    assert {group.config.remat for group in plan.replicas} == {"full"}


@pytest.mark.parametrize("planner", ["exact", "minlp", "prune", "group"])
def test_every_planner_plans_without_a_config(folder, planner):
    code = lobra(
        *("plan", "--costs", "costs.json", "--lengths", "hist.json", "--devices", 4, "--planner", planner),
        *("--proposal", "off", "--out", "plan.yaml"),
    )
    assert code == 0
    assert Plan.load("plan.yaml").planner == planner


def test_original_files_are_planned_from_unchanged(folder, capsys):
    (folder / "T.csv").write_text(
        "tp,seq_len,mbs,time\n"
        + "".join(
            f"{t},{s},{b},{(2 + b * s / 100) / t}\n" for t in (1, 2) for s in (32, 64, 128, 256) for b in (1, 2, 4)
        )
    )
    (folder / "M.csv").write_text("tp,pp,sp,max_tokens\n1,1,1,64\n2,1,1,256\n1,2,1,128\n")
    code = lobra(
        *("plan", "--lobra-time", "T.csv", "--lobra-memory", "M.csv", "--num-layers", 4, "--model", "seven"),
        *("--lengths", "hist.json", "--devices", 4, "--out", "plan.yaml"),
    )
    assert code == 0
    assert Plan.load("plan.yaml").model == "seven"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--costs", "costs.json", "--lengths", "hist.json"], "error: --devices: missing"),
        (["--config", "C.yaml"], "error: C.yaml: planner.costs: missing"),
        (["--config", "C.yaml", "--costs", "other.json"], "error: other.json: model: cost table of another model"),
        (
            ["--config", "C.yaml", "--costs", "costs.json", "--lengths", "hist.json"],
            "error: --lengths: not with --config",
        ),
        (["--set", "a=1", "--devices", "2"], "error: --set: --set without a config"),
        (["--config", "C.yaml", "--costs", "costs.json", "--devices", "1"], "error: num_devices: sequences of 200"),
        (["--config", "C.yaml", "--costs", "costs.json", "--planner", "magic"], "error: "),
    ],
)
def test_mistakes_are_one_line_with_status_two_and_write_nothing(folder, capsys, arguments, complaint):
    dataclasses.replace(COSTS, model_fingerprint="another").save("other.json")

    assert lobra("plan", *arguments, "--out", "plan.yaml") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(complaint) and printed.count("\n") == 1
    assert not (folder / "plan.yaml").exists()


def test_a_plan_that_cannot_be_written_is_said_before_anything_is_read(folder, capsys):
    (folder / "file").write_text("in the way")
    assert lobra("plan", "--config", "gone.yaml", "--out", "file/plan.yaml") == 2
    line = "error: file: --out: cannot write: Not a directory; expected a path that can be written\n"
    assert capsys.readouterr().err == line


def set_devices(folder, **devices):
    raw = yaml.safe_load((folder / "C.yaml").read_text())
    (folder / "C.yaml").write_text(yaml.safe_dump({**raw, "devices": devices}))


@pytest.mark.parametrize(
    ("devices", "flag", "expected"),
    [
        ({"num_devices": 4, "simulated": 6}, 2, 2),
        ({"num_devices": 4, "simulated": 6}, None, 4),
        ({"simulated": 6}, None, 6),
        ({}, None, 3),
    ],
)
def test_number_of_devices_is_the_flags_the_configs_or_the_cost_tables(folder, capsys, devices, flag, expected):
    set_devices(folder, **devices)
    costs = dataclasses.replace(COSTS, hardware={"num_devices": 3})

    assert planned_devices(load_config("C.yaml"), costs, flag) == expected
    printed = capsys.readouterr().out
    assert printed == ("planning for 3 devices, as many as the cost table was measured on\n" if expected == 3 else "")


def test_a_plan_is_made_for_the_devices_that_the_cost_table_was_measured_on(folder, capsys):
    set_devices(folder)
    dataclasses.replace(COSTS, hardware={"num_devices": 3}).save("costs.json")

    assert lobra("plan", "--config", "C.yaml", "--costs", "costs.json", "--out", "plan.yaml") == 0
    assert Plan.load("plan.yaml").num_devices == 3
    assert capsys.readouterr().out.startswith("planning for 3 devices")


@pytest.mark.parametrize("hardware", [{}, {"num_devices": None}, {"num_devices": "two"}, {"num_devices": 0}])
def test_an_unknown_number_of_devices_is_one_line(folder, capsys, hardware):
    set_devices(folder)
    dataclasses.replace(COSTS, hardware=hardware).save("costs.json")

    assert lobra("plan", "--config", "C.yaml", "--costs", "costs.json", "--out", "plan.yaml") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: devices.num_devices") and printed.count("\n") == 1


def test_a_robust_plan_reports_its_times_and_the_regret_of_the_plain_one(folder, capsys):
    code = lobra(
        *("plan", "--config", "C.yaml", "--costs", "costs.json", "--time-limit", 3),
        *("--robust", "p95", "--samples", 8, "--out", "plan.yaml"),
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "95th percentile" in printed and "p95" in printed and "regret" in printed
    written = json.loads((folder / "plan.robust.json").read_text())
    assert written["objective"] == "p95" and written["num_samples"] == 8
    assert written["plan"] == str(Plan.load("plan.yaml"))


def write_run(folder, lengths):
    (folder / "run").mkdir()
    lobra("plan", "--config", "C.yaml", "--costs", "costs.json", "--out", "run/plan.yaml")
    COSTS.save(folder / "run/costs.json")
    WORKLOAD.save(folder / "run/lengths.json")
    records = [
        {"kind": "task", "step": step, "task": name, "lengths": counts}
        for step in (1, 2)
        for name, counts in lengths.items()
    ]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_check_says_whether_a_runs_plan_suits_the_lengths_seen(folder, capsys):
    write_run(folder, {"a": {"32": 8}, "b": {"64": 2, "208": 2}})  # 208 is 200 rounded up, over the last bucket
    assert lobra("plan", "--check", "run", "--samples", 4, "--time-limit", 2) == 0
    printed = capsys.readouterr().out
    assert "lengths of 2 steps" in printed and "still good" in printed


def test_check_says_where_the_search_for_better_plans_was_not_over(folder, capsys, monkeypatch):
    write_run(folder, {"a": {"32": 8}, "b": {"64": 4}})
    capsys.readouterr()
    solve_robust = drift.solve_robust

    def unproven(*args, **options):
        found = solve_robust(*args, **options)
        predicted = dataclasses.replace(found.mean_plan.predicted, gap=0.4)
        return dataclasses.replace(found, mean_plan=dataclasses.replace(found.mean_plan, predicted=predicted))

    assert lobra("plan", "--check", "run", "--samples", 4, "--time-limit", 2) == 0
    assert "--time-limit" not in capsys.readouterr().out
    monkeypatch.setattr(drift, "solve_robust", unproven)
    assert lobra("plan", "--check", "run", "--samples", 4, "--time-limit", 2) == 0
    assert "40% from proven: with a longer --time-limit" in capsys.readouterr().out


def test_check_compares_with_plans_that_keep_to_the_runs_constraints(folder, capsys):
    write_run(folder, {"a": {"32": 8}, "b": {"64": 4}})
    assert lobra("plan", "--check", "run", "--samples", 4, "--time-limit", 2) == 0
    assert "worth planning anew" in capsys.readouterr().out
    text = (folder / "C.yaml").read_text()
    config = yaml.safe_load(text)
    config["planner"] = config.get("planner", {}) | {"pinned": str(Plan.load("run/plan.yaml")).split()}
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert lobra("plan", "--check", "run", "--samples", 4, "--time-limit", 2) == 0
    assert "still good" in capsys.readouterr().out


def test_check_of_a_run_without_lengths_is_one_line(folder, capsys):
    write_run(folder, {})
    assert lobra("plan", "--check", "run") == 2
    assert "metrics.jsonl: lengths: no lengths recorded" in capsys.readouterr().err


def test_check_of_a_run_that_has_not_trained_says_that_it_has_to(folder, capsys):
    write_run(folder, {"a": {"32": 8}})
    (folder / "run/metrics.jsonl").unlink()
    assert lobra("plan", "--check", "run") == 2
    printed = capsys.readouterr().err
    assert "run/metrics.jsonl: no metrics" in printed and "expected a run that has trained a step" in printed


def quantised(name, factor):
    """The cost table, `factor` times as quick and with twice the capacity."""
    configs = tuple(
        dataclasses.replace(
            c, capacity_tokens=2 * c.capacity_tokens, coefficients=tuple(x / factor for x in c.coefficients)
        )
        for c in COSTS.configs
    )
    return dataclasses.replace(COSTS, configs=configs, provenance={"quantization": name})


def test_compare_prints_the_best_plan_of_each_quantization_soonest_first(folder, capsys):
    quantised("int8", 4.0).save(folder / "int8.json")
    quantised("nf4", 2.0).save(folder / "nf4.json")
    compare = ("--compare", "nf4.json", "--compare", "int8.json")
    assert lobra("plan", "--config", "C.yaml", "--costs", "costs.json", "--out", "plan.yaml", *compare) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("quantization ")]
    assert [line.split()[1] for line in lines] == ["int8:", "nf4:", "none:"]
    step_s = [float(line.split("step ")[1].split()[0]) for line in lines]
    assert step_s == sorted(step_s)
    assert CostTable.load(folder / "plan.costs.json").quantization == "none"
    assert Plan.load(folder / "plan.yaml").predicted.step_s == pytest.approx(step_s[-1], rel=1e-3)
    said = re.search(r"^to take int8: lobra plan (.*) \.\.\., and lobra train (.*) \.\.\.$", out, re.MULTILINE)
    assert lobra("plan", "--config", "C.yaml", *said[1].split(), "--out", "int8.yaml") == 0
    assert Plan.load(folder / "int8.yaml").predicted.step_s == pytest.approx(step_s[0], rel=1e-3)
    assert said[2] == "--set model.quantization=int8"


@pytest.mark.parametrize(
    ("table", "arguments", "complaint"),
    [
        (quantised("none", 1.0), (), "the same quantisation twice"),
        (dataclasses.replace(COSTS, model_fingerprint="0" * 16), (), "cost table of another model"),
        (quantised("int8", 1.0), ("--buckets-report",), "--compare with --buckets-report"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_one_line(folder, capsys, table, arguments, complaint):
    table.save(folder / "other.json")
    files = ("--config", "C.yaml", "--costs", "costs.json", "--out", "plan.yaml", "--compare", "other.json")
    assert lobra("plan", *files, *arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.strip().count("\n") == 0
    assert not (folder / "plan.yaml").exists()


def test_a_cost_table_of_another_quantization_is_refused(folder, capsys):
    quantised("nf4", 1.0).save(folder / "nf4.json")
    assert lobra("plan", "--config", "C.yaml", "--costs", "nf4.json", "--out", "plan.yaml") == 2
    error = capsys.readouterr().err
    found = re.search(
        r"nf4.json: provenance.quantization: .*\(got 'nf4'\); expected none as the config says, or (.*)\n", error
    )
    wanted = found[1].split()
    assert wanted == ["--set", "model.quantization=nf4"]
    assert lobra("plan", "--config", "C.yaml", *wanted, "--costs", "nf4.json", "--out", "plan.yaml") == 0
