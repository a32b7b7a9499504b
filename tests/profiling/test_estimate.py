"""Cost tables foretold without the devices: what they must have of any real one, and the command that compares them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.memory import leaf_bytes
from lobra_jax.models.config import PRESETS
from planner.cost import CostTable
from planner.plan import ParallelConfig
from profiling.device_specs import SPECS, Efficiency
from profiling.estimate import ISSUE_S, ISSUE_WIDE_S, Estimator
from profiling.measure import Setup, make_replica, program_limit_bytes

CONFIG = Path(__file__).parents[2] / "configs" / "runs" / "cost_tables.yaml"
ALONE, WIDE = ParallelConfig(tp=1, pp=1, remat="dots"), ParallelConfig(tp=2, pp=1, remat="dots")


def estimator(device="h200", **changes):
    setup = Setup(
        model=PRESETS["llama2-7b"],
        dtype=jnp.dtype("float32"),
        num_tasks=6,
        rank=16,
        targets=("q", "k", "v", "o", "gate", "up", "down"),
        dropout=False,
        dora=False,
        optimizers=("adamw",),
        averages=False,
        devices=jax.devices()[:4],
        limit_bytes=40 * 2**30,
        lengths=(256, 2048, 16384),
        max_tokens=16384,
        repeats=1,
        cores=None,
        num_threads=1,
    )
    return Estimator(dataclasses.replace(setup, **changes), SPECS[device], Efficiency())


@pytest.fixture(scope="module")
def of_h200():
    return estimator()


def test_short_micro_batches_wait_for_the_host_and_long_ones_do_not(of_h200):
    layers = of_h200.setup.model.num_layers
    for config, issue_s in ((ALONE, ISSUE_S), (WIDE, ISSUE_WIDE_S)):
        head_s = of_h200.slot_s(config, (1, 16)) - layers * issue_s
        assert 0 < head_s < layers * issue_s / 4
        assert of_h200.slot_s(config, (8, 2048)) > 4 * layers * issue_s


def test_twice_the_rows_take_twice_as_long_and_two_devices_little_more_than_half(of_h200):
    assert of_h200.slot_s(ALONE, (8, 2048)) == pytest.approx(2 * of_h200.slot_s(ALONE, (4, 2048)), rel=0.02)
    assert 0.5 < of_h200.slot_s(WIDE, (8, 2048)) / of_h200.slot_s(ALONE, (8, 2048)) < 0.75


def test_slower_memory_and_matmuls_take_longer(of_h200):
    times = [estimator(device).slot_s(ALONE, (8, 2048)) for device in ("h200", "h100-80g", "a100-80g")]
    assert times == sorted(times) and times[2] > 2 * times[0]


def test_a_capacity_is_the_most_that_fits_beside_what_a_step_keeps(of_h200):
    for config in (ALONE, WIDE):
        cost = of_h200.estimate(config)
        replica = make_replica(of_h200.setup, config, 0, of_h200.setup.devices[: config.num_devices])
        fixed = [leaf_bytes(layout.params) + 2 * leaf_bytes(layout.adapters) for layout in replica.layouts]
        limit = program_limit_bytes(of_h200.setup, replica, platform="gpu")
        assert of_h200.peak_bytes(config, (1, cost.capacity_tokens), fixed) <= limit
        if cost.capacity_tokens < of_h200.setup.max_tokens:
            assert of_h200.peak_bytes(config, (1, int(1.2 * cost.capacity_tokens)), fixed) > limit
        assert all(point.peak_bytes <= limit for point in cost.points)


def test_the_commands_foretell_a_table_and_say_how_far_off_it_is(tmp_path):
    tables = []
    for device in ("h200", "a100-80g"):
        tables.append(tmp_path / f"{device}.json")
        arguments = ["--config", str(CONFIG), "--set", "model.dtype=float32", "--estimate", device, "--devices", "8"]
        arguments += ["--configs", "1x1,2x1", "--set", "planner.remats=[dots,full]", "--lengths", "256,2048"]
        done = CliRunner().invoke(main, ["profile", *arguments, "--max-tokens", "4096", "--out", str(tables[-1])])
        assert done.exit_code == 0, done.output
        assert f"estimated for {device}, not measured" in done.output
    table = CostTable.load(tables[0])
    assert {str(cost.config) for cost in table.configs} == {
        "(tp1,pp1,dots)",
        "(tp1,pp1,full)",
        "(tp2,pp1,dots)",
        "(tp2,pp1,full)",
    }
    same, other = ([str(tables[0]), str(tables[0])], [str(tables[1]), str(tables[0])])
    errors = []
    for pair in (same, other):
        done = CliRunner().invoke(main, ["bench", "estimate", *pair, "--out", str(tmp_path / "error.json")])
        assert done.exit_code == 0, done.output
        errors.append(json.loads((tmp_path / "error.json").read_text())["mean_error"])
    assert errors[0] < 0.05 and errors[1] > 0.5  # of itself, what its own fit is off
