"""`lobra explain` and `lobra simulate` as a user runs them, and where they find a plan's inputs."""

import json

import click
import pytest
from click.testing import CliRunner

from planner.cli import explain, simulate
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.inputs import beside
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.plan_output import plan_and_write
from planner.planning import PlanningFlags
from planner.planning_options import planning_options
from planner.workload import TaskLengths, Workload

NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=2, pp=1, remat="none")


def cost(config, capacity):
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 2e-3))


COSTS = CostTable(model="m", model_fingerprint="f", hardware={}, configs=(cost(NARROW, 64), cost(WIDE, 256)))
WORKLOAD = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={20: 0.75, 200: 0.25}),))
PLAN = Plan(
    model="m",
    num_devices=3,
    replicas=(
        ReplicaGroup(count=1, config=WIDE, capacity_tokens=256),
        ReplicaGroup(count=1, config=NARROW, capacity_tokens=64),
    ),
    buckets=(32, 208),
)
STRATEGY = "strategy_config:\n - {dp: 1, tp: 1, pp: 1, max_tokens: 64}\n - {dp: 1, tp: 2, pp: 1, max_tokens: 256}\n"
LISTS = ["--lobra-plan", "64,256", "1,1", "1,2", "1,1"]


@pytest.fixture
def folder(tmp_path):
    PLAN.save(tmp_path / "plan.yaml")
    COSTS.save(tmp_path / "plan.costs.json")
    WORKLOAD.save(tmp_path / "plan.lengths.json")
    return tmp_path


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_explain_needs_the_plan_alone_when_its_inputs_lie_beside_it(folder):
    shown = run(explain, folder / "plan.yaml", "--html", folder / "plan.html", "--time-limit", 5)

    assert "replica 0 (tp2,pp1,none)" in shown
    assert "planned anew" in shown
    assert "replica 1 (tp1,pp1,none)" in (folder / "plan.html").read_text()


def test_inputs_of_a_run_folder_are_found_too(folder):
    (folder / "plan.costs.json").rename(folder / "costs.json")
    (folder / "plan.lengths.json").rename(folder / "lengths.json")
    assert "planned anew" not in run(explain, folder / "plan.yaml", "--no-compare")


def test_named_inputs_win_over_those_beside_the_plan(folder):
    (folder / "plan.lengths.json").write_text("not json")
    WORKLOAD.save(folder / "other.json")
    shown = run(explain, folder / "plan.yaml", "--no-compare", "--lengths", folder / "other.json")
    assert "(8 sequences)" in shown


def test_original_strategy_file_and_comma_lists_stand_for_a_plan(folder):
    (folder / "strategy.yaml").write_text(STRATEGY)
    inputs = ["--costs", folder / "plan.costs.json", "--lengths", folder / "plan.lengths.json"]

    from_file = run(simulate, "--plan", folder / "strategy.yaml", *inputs, "--steps", 2, "--out", folder / "a.json")
    from_lists = run(simulate, *LISTS, *inputs, "--steps", 2, "--out", folder / "b.json")
    assert "1x(tp1,pp1,none) 1x(tp2,pp1,none)" in from_file and "1x(tp2,pp1,none)" in from_lists
    a, b = (json.loads((folder / name).read_text()) for name in ("a.json", "b.json"))
    assert a["plan"] == b["plan"]
    assert [step["replica_s"] for step in a["steps"]] == [step["replica_s"] for step in b["steps"]]


def test_simulate_prints_and_writes_the_totals(folder):
    shown = run(simulate, "--plan", folder / "plan.yaml", "--steps", 3, "--seed", 5, "--out", folder / "out.json")
    written = json.loads((folder / "out.json").read_text())

    assert "3 simulated steps, dispatch balance, seed 5" in shown
    assert f"p95 {written['p95_step_s']:.4g} s" in shown
    assert len(written["steps"]) == 3
    assert set(written["steps"][0]) >= {"replica_s", "step_s", "tokens", "padded_tokens", "gpu_seconds"}


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        (explain, ["nowhere.yaml"], r"nowhere.yaml: no such file"),
        (explain, [], r"PLAN: name one plan"),
        (simulate, [], r"PLAN: name one plan"),
        (explain, ["plan.yaml", *LISTS], r"PLAN: name one plan"),
        (explain, ["bare.yaml"], r"bare.yaml: no costs beside the plan; expected bare.costs.json or costs.json"),
        (simulate, ["--plan", "plan.yaml", "--lobra-time", "t.csv"], r"--lobra-memory: missing"),
        (simulate, ["--plan", "plan.yaml", "--costs", "plan.costs.json", "--num-layers", "2"], r"both --costs and"),
        (simulate, ["--plan", "plan.yaml", "--lobra-tasks", "t.json"], r"--lobra-statistics: missing"),
        (
            simulate,
            ["--lobra-plan", "64", "1", "1", "1", "--costs", "plan.costs.json", "--lengths", "plan.lengths.json"],
            r"max_tokens: sequences of 200 tokens fit no replica \(got 64\); expected at least 200",
        ),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, command, arguments, complaint):
    monkeypatch.chdir(folder)
    PLAN.save("bare.yaml")

    with pytest.raises(UserError, match=complaint) as error:
        run(command, *arguments)
    assert "\n" not in str(error.value)


@click.command()
@planning_options
def show(**flags):
    """Stands for `lobra plan`: prints its flags."""
    click.echo(PlanningFlags(**flags))


def test_planning_flags_are_parsed_and_absent_ones_are_none():
    assert run(show) == str(PlanningFlags(**dict.fromkeys(PlanningFlags.__dataclass_fields__)))
    shown = run(show, "--planner", "group", "--proposal", "off", "--buckets", "256,512", "--remats", "none,full")
    for expected in ("planner='group'", "proposal=False", "buckets=(256, 512)", "remats=('none', 'full')"):
        assert expected in shown
    with pytest.raises(UserError, match="--remats: unknown policy"):
        run(show, "--remats", "some")


def test_planning_writes_the_plan_and_its_inputs_and_explain_reads_them(tmp_path):
    from rich.console import Console

    out = tmp_path / "new" / "p.yaml"
    flags = PlanningFlags(**dict.fromkeys(PlanningFlags.__dataclass_fields__))
    with open(tmp_path / "log", "w") as log:
        plan = plan_and_write(WORKLOAD, COSTS, 3, out, flags, Console(file=log, width=200))

    assert Plan.load(out) == plan
    assert CostTable.load(beside(out, "costs")) == COSTS
    assert Workload.load(beside(out, "lengths")) == WORKLOAD
    shown = (tmp_path / "log").read_text()
    assert str(plan) in shown and "proven bound" in shown and "gap" in shown
    assert "the same plan" in run(explain, out, "--time-limit", 5)


def test_failed_planning_writes_nothing(tmp_path):
    from rich.console import Console

    flags = PlanningFlags(**dict.fromkeys(PlanningFlags.__dataclass_fields__))
    with pytest.raises(UserError, match="200 tokens"):
        plan_and_write(WORKLOAD, COSTS, 1, tmp_path / "p.yaml", flags, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan.yaml", "plan.costs.json", "plan.lengths.json"])
def test_a_kill_while_a_file_is_saved_leaves_the_old_one(folder, monkeypatch, name):
    def kill(*_):
        raise KeyboardInterrupt

    saved = {"plan.yaml": PLAN, "plan.costs.json": COSTS, "plan.lengths.json": WORKLOAD}[name]
    before = (folder / name).read_bytes()
    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        saved.save(folder / name)
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize("option", ["--seed", "--lengths-seed"])
def test_a_seed_below_zero_is_refused(folder, option):
    result = CliRunner().invoke(simulate, ["--plan", str(folder / "plan.yaml"), option, "-1"])
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(("command", "option"), [(explain, "--html"), (simulate, "--out")])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, command, option):
    (tmp_path / "file").write_text("")
    plan = [] if command is simulate else ["nowhere.yaml"]
    with pytest.raises(UserError, match=rf"file: {option}: cannot write: Not a directory"):
        run(command, *plan, option, tmp_path / "file" / "out")


def test_help_shows_an_example():
    for command in (explain, simulate):
        assert "Example:" in run(command, "--help")
