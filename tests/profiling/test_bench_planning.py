"""The benchmark of planning times on drawn instances."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.planners import solver
from planner.problem import build_problem
from profiling.bench import unlike_tables

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="LobRA's published files are not here")


def test_planned_instances_are_written_with_their_gaps(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--reference", str(REFERENCE), "--out", str(out), "--devices", "16", "--instances", "1", "--seed", "6"]
    result = CliRunner().invoke(unlike_tables.bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "within 1 %" in result.output
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["gap"] == pytest.approx((row["step_s"] - row["bound_s"]) / row["step_s"]) and row["cpu_s"] > 0
    workload, costs = unlike_tables.instance(REFERENCE, 16, 6)  # the same again
    problem = build_problem(workload, costs, 16, time_limit_s=30.0)
    assert (row["seed"], row["num_configs"], row["num_sequences"]) == (6, len(problem.configs), sum(problem.counts))
    predicted = solver("exact")(problem).predicted
    assert predicted.bound_s <= row["step_s"] * (1 + 1e-9) and row["bound_s"] <= predicted.step_s * (1 + 1e-9)
