"""`lobra profile` on simulated devices: the table, capacities under a memory limit, resuming, mistakes."""

import dataclasses
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.config import load_config, model_config
from lobra_jax.devices import HEAP_BYTES
from lobra_jax.memory import leaf_bytes, memory_bytes
from planner.cost import CostTable
from planner.plan import ParallelConfig
from profiling import config_cost
from profiling.ahead import Searches
from profiling.config_cost import search_capacity, time_configs
from profiling.measure import Bench, Setup, program_limit_bytes, reserve_bytes
from profiling.memory import DoesNotFitError
from profiling.packed import measure_packed
from profiling.rounds import measure_round, rounds_of
from profiling.table import partial_path

LIMIT = 1_500_000
SMALLER_LIMIT = 800_000
NUM_DEVICES = 4
"""More than the cores of small hosts, which simulated devices then share."""
SHAPES = ("--lengths", "16,128", "--repeats", "1", "--max-tokens", "256")
WHOLE = ParallelConfig(tp=1, pp=1, remat="none")
OTHER_TABLE = Path(__file__).parents[2] / "configs" / "costs" / "llama2_7b_a100_40g.json"
WIDE = ParallelConfig(tp=2, pp=1, remat="none")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_config_json):
    folder = tmp_path_factory.mktemp("profile")
    (folder / "config.json").write_text(tiny_config_json)
    task = {"files": "none.jsonl", "batch_size": 2, "steps": 1, "targets": ["q", "down"]}
    content = {
        "model": {"path": ".", "dtype": "float32"},
        "devices": {"simulated": 8, "num_devices": NUM_DEVICES, "memory_bytes": LIMIT},
        "planner": {"remats": ["none"]},
        "tasks": [{"name": "a", "rank": 2, **task}, {"name": "b", "rank": 4, **task}],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def profile(*args):
    return CliRunner().invoke(main, ["profile", *map(str, args)])


@pytest.fixture(scope="module")
def profiled(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "costs.json"
    result = profile("--config", config_file, "--out", out, *SHAPES, "--configs", "1x1,1x2,2x1")
    assert result.exit_code == 0, result.output
    return CostTable.load(out), out, result.output


def setup_of(config_file, limit=LIMIT):
    return Setup(
        model=model_config(load_config(config_file, check_files=False)),
        dtype=jnp.float32,
        num_tasks=2,
        rank=4,
        targets=("q", "down"),
        dropout=False,
        dora=False,
        optimizers=("adamw",),
        averages=False,
        devices=jax.devices(),
        limit_bytes=limit,
        lengths=(16, 128),
        max_tokens=256,
        repeats=1,
        cores=2,
        num_threads=2,
    )


def quick_setup(config_file, **changes):
    """Where it is not capacities that matter: one layer, and little more than one micro-batch to compile."""
    setup = setup_of(config_file)
    model = dataclasses.replace(setup.model, num_layers=1)
    quick = {"model": model, "cores": None, "lengths": (16, 32), "max_tokens": 32}
    return dataclasses.replace(setup, **(quick | changes))


def test_table_has_every_config_with_times_and_a_held_out_error(profiled, config_file):
    table, _, output = profiled
    assert {(c.config.tp, c.config.pp) for c in table.configs} == {(1, 1), (1, 2), (2, 1)}
    assert table.model_fingerprint == model_config(load_config(config_file, check_files=False)).fingerprint
    assert table.step_overhead_s > 0 and all(cost.packed is None for cost in table.configs)
    for cost in table.configs:
        assert cost.fit_error is not None and cost.fit_error.num_held_out == sum(p.held_out for p in cost.points) == 1
        assert all(p.seconds > 0 and 0 < p.peak_bytes <= LIMIT for p in cost.points)
        assert all(p.rows * p.length <= cost.capacity_tokens for p in cost.points)
        assert cost.micro_batch_s(1, cost.capacity_tokens) >= cost.micro_batch_s(1, 16) >= 0
        assert str(cost.capacity_tokens) in output
    assert "(3 of 3 configs)" in output


def test_packed_micro_batches_are_measured_with_short_and_with_long_sequences(config_file):
    setup = quick_setup(config_file, devices=jax.devices()[:1], lengths=(16, 48))
    cost = measure_packed(setup, WHOLE, 96)
    assert cost is not None and cost.capacity_tokens == 96
    shapes = [(point.rows, point.length) for point in cost.points]
    assert set(shapes) == {(2, 48), (1, 48), (1, 32)} and len(shapes) == 4
    assert {point.squares for point in cost.points[:1] + cost.points[3:]} == {2 * 3 * 16**2, 2 * 48**2}
    for point in cost.points:
        assert 0 < point.peak_bytes <= LIMIT
        assert cost.micro_batch_s(point.rows, point.length, point.squares) > 0


def test_few_layers_foretell_the_capacity_of_many(config_file, monkeypatch):
    """The model itself is then compiled in one round."""
    base = setup_of(config_file)
    model = dataclasses.replace(base.model, num_layers=9)
    changes = {"limit_bytes": 2_500_000, "lengths": (16,), "max_tokens": 256}
    setup = dataclasses.replace(base, model=model, cores=None, targets=("q",), **changes)
    rounds = []
    compile_shapes = Bench.compile

    def noted(self, shapes, *, copies):
        if shapes and self.setup.model.num_layers == model.num_layers:
            rounds.append(list(shapes))
        compile_shapes(self, shapes, copies=copies)

    monkeypatch.setattr(Bench, "compile", noted)
    found = search_capacity(setup, WHOLE)
    assert len(rounds) == 1 and 16 < found.capacity_tokens < setup.max_tokens
    assert max(found.sizes.values()) <= setup.limit_bytes
    assert max(found.bench.bytes([(1, int(1.3 * found.capacity_tokens))])) > setup.limit_bytes


def test_a_known_capacity_is_confirmed_and_one_that_is_of_no_use_is_searched(config_file):
    base = dataclasses.replace(setup_of(config_file), max_tokens=512)
    searched = search_capacity(base, WHOLE).capacity_tokens
    less = searched // 32 * 16

    def found(expected):
        return search_capacity(dataclasses.replace(base, expected={WHOLE: expected}), WHOLE)

    known = found(less)
    assert known.capacity_tokens == less < searched
    assert {(1, less), (less // 16, 16)} <= known.sizes.keys()
    assert max(rows * length for rows, length in known.sizes) == less
    assert found(512).capacity_tokens == found(base.lengths[0] - 1).capacity_tokens == searched


def test_profile_confirms_an_earlier_tables_capacities_and_says_so(profiled, config_file, tmp_path):
    table, _, _ = profiled
    smaller = tmp_path / "smaller.json"
    raw = table.to_dict()
    raw["hardware"]["memory_bytes"] = LIMIT // 2
    for cost in raw["configs"]:
        cost["capacity_tokens"] = 96 if cost["tp"] * cost["pp"] == 1 else 256
    smaller.write_text(json.dumps(raw))
    out = tmp_path / "costs.json"
    args = ("--lengths", "16,128", "--repeats", "1", "--max-tokens", "320", "--configs", "1x1,2x1")
    result = profile("--config", config_file, "--out", out, *args, "--capacities", smaller)
    assert result.exit_code == 0, result.output
    assert f"found with {LIMIT // 2:,} bytes a device" in " ".join(result.output.split())
    again = CostTable.load(out)
    assert again[WHOLE].capacity_tokens == 96
    # 256 was the largest micro-batch asked for then, so that it is searched anew now.
    assert again.provenance["known_capacities"] == {str(WHOLE): 96}
    assert "known_capacities" not in table.provenance


class Together:
    """Stands for `Bench.step_s`: all configs meet at their first step, and at that after one of every shape."""

    def __init__(self, found):
        self.meet = threading.Barrier(len(found), timeout=60)  # breaks unless all come to it
        self.number = {searched.bench: len(searched.sizes) for searched in found}
        self.steps = {searched.bench: [] for searched in found}

    def __call__(self, bench, shape, num_micro_batches):
        if len(self.steps[bench]) in (0, self.number[bench]):
            self.meet.wait()
        self.steps[bench].append(shape)
        return 0.3 * num_micro_batches


def test_configs_on_devices_of_their_own_are_timed_together(config_file, monkeypatch):
    setup = quick_setup(config_file)
    full = dataclasses.replace(WHOLE, remat="full")
    found = [search_capacity(setup, config, first_device=first) for config, first in ((WHOLE, 0), (WIDE, 1), (full, 3))]
    used = [device.id for searched in found for device in searched.bench.replicas[0].submesh.devices]
    assert used == [0, 1, 2, 3]
    steps = Together(found)
    monkeypatch.setattr(Bench, "step_s", lambda self, shape, m: steps(self, shape, m))
    costs = []
    time_configs(setup, found, costs.append)
    assert [cost.config for cost in costs] == [WHOLE, WIDE, full]
    for searched in found:  # every shape has run once before any is timed
        assert set(steps.steps[searched.bench][: len(searched.sizes)]) == set(searched.sizes)
    for cost, searched in zip(costs, found, strict=True):
        assert cost.capacity_tokens == searched.capacity_tokens
        assert {(point.rows, point.length) for point in cost.points} == set(searched.sizes)
        assert all(point.seconds > 0 for point in cost.points)


def test_a_round_keeps_what_was_timed_though_others_fail_or_do_not_fit(config_file, monkeypatch):
    setup = quick_setup(config_file)
    full = dataclasses.replace(WHOLE, remat="full")
    dots = dataclasses.replace(WHOLE, remat="dots")
    first_devices = {dots: 0, WHOLE: 1, full: 2}

    def search(config):
        if config == dots:
            raise DoesNotFitError("too small")
        return search_capacity(setup, config, first_device=first_devices[config])

    def step_s(bench, shape, num_micro_batches):
        if bench.replicas[0].submesh.parallel == WHOLE:
            raise RuntimeError("broke")
        return 0.1 * num_micro_batches

    monkeypatch.setattr(Bench, "step_s", step_s)
    monkeypatch.setattr(config_cost, "_warm_up", lambda searched: None)
    kept = {}
    with pytest.raises(RuntimeError, match="broke"):
        measure_round(setup, Searches(search, list(first_devices), at_once=3), first_devices, kept.__setitem__)
    assert set(kept) == {dots, full}
    assert kept[dots] == "too small" and kept[full].config == full


def test_a_round_of_packed_runs_has_both_costs_of_each_config(config_file):
    setup = quick_setup(config_file, packed=True, lengths=(16, 48), max_tokens=96)
    configs = [WHOLE, dataclasses.replace(WHOLE, remat="full")]
    (placed,) = rounds_of(setup, configs)
    first_devices = dict(placed)
    searches = Searches(lambda c: search_capacity(setup, c, first_device=first_devices[c]), configs, at_once=2)
    kept = {}
    measure_round(setup, searches, first_devices, kept.__setitem__)
    assert set(kept) == set(configs) and first_devices == {configs[0]: 0, configs[1]: 1}
    assert all(cost.packed is not None and cost.packed.points and cost.points for cost in kept.values())


def test_table_says_how_it_was_measured(profiled):
    table, _, _ = profiled
    assert table.hardware["platform"] == "cpu" and table.hardware["num_devices"] == NUM_DEVICES
    assert table.hardware["memory_bytes"] == LIMIT
    assert set(table.hardware["host_sharing"]["by_devices"]) >= {"1", "2"}
    assert (table.provenance["num_tasks"], table.provenance["rank"]) == (2, 4)
    assert table.quantization == table.provenance["quantization"] == "none"


@pytest.mark.parametrize("config", [WHOLE, WIDE], ids=str)
def test_capacity_is_within_the_limit_by_the_compilers_count(profiled, config_file, config):
    setup = setup_of(config_file)
    bench = Bench(setup, config, copies=1)
    shape = (1, profiled[0][config].capacity_tokens)
    bench.compile([shape], copies=1)
    assert memory_bytes(bench.replicas[0], shape) + reserve_bytes(setup, bench.replicas[0]) <= LIMIT


def test_what_travels_is_reserved_whole_however_wide_the_replica(config_file):
    setup = setup_of(config_file)
    alone, wide = (Bench(setup, config, copies=1).replicas[0] for config in (WHOLE, WIDE))
    parts = leaf_bytes(wide.layouts[0].adapters)
    assert 0 < reserve_bytes(setup, alone) == reserve_bytes(setup, wide) - parts


def test_on_several_gpus_a_piece_of_a_program_is_left_free(config_file):
    setup = setup_of(config_file)
    replica = Bench(setup, WHOLE, copies=1).replicas[0]
    alone = dataclasses.replace(setup, devices=setup.devices[:1])
    for which in (setup, alone):
        limits = [program_limit_bytes(which, replica, platform=platform) for platform in ("cpu", "gpu")]
        assert limits[0] == which.limit_bytes - reserve_bytes(which, replica)
        assert limits[0] - limits[1] == (HEAP_BYTES if which is setup else 0)


def test_capacity_grows_with_width_and_shrinks_with_memory(profiled, config_file, tmp_path):
    table, _, _ = profiled
    assert table[WIDE].capacity_tokens > table[WHOLE].capacity_tokens
    out = tmp_path / "costs.json"
    smaller = f"devices.memory_bytes={SMALLER_LIMIT}"
    result = profile("--config", config_file, "--out", out, *SHAPES, "--configs", "1x1", "--set", smaller)
    assert result.exit_code == 0, result.output
    assert CostTable.load(out)[WHOLE].capacity_tokens < table[WHOLE].capacity_tokens


def test_resume_measures_only_what_is_missing(profiled, config_file, tmp_path):
    table, out, _ = profiled
    assert not partial_path(out).exists()
    again = tmp_path / "costs.json"
    header = {key: getattr(table, key) for key in ("model", "model_fingerprint", "hardware", "provenance")}
    partial = {"header": header, "table": table.to_dict(), "dropped": []}
    partial_path(again).write_text(json.dumps(partial))

    result = profile("--config", config_file, "--out", again, *SHAPES, "--configs", "1x1,1x2,2x1")

    assert result.exit_code == 0, result.output
    assert "3 of 3 configs were measured before" in result.output
    assert CostTable.load(again).configs == table.configs
    assert not partial_path(again).exists()


def test_user_mistakes_are_one_line(config_file, tmp_path):
    good = ("--config", config_file, "--out", tmp_path / "costs.json", *SHAPES)
    for args, words in [
        ((*good, "--set", "devices.memory_bytes=null"), ["devices.memory_bytes", "4GiB"]),
        (
            (*good, "--set", "devices.memory_bytes=1KiB"),
            ["devices.memory_bytes", "and their state need"],
        ),
        ((*good, "--set", "devices.simulated=5"), ["devices.simulated", "8 cpu devices"]),
        ((*good, "--set", "devices.simulated=null", "--set", "devices.num_devices=9"), ["num_devices", "at most 8"]),
        ((*good, "--configs", "4x1"), ["--configs", "4x1", "1x1"]),
        ((*good, "--lengths", "20"), ["--lengths", "multiples of 16"]),
        ((*good, "--capacities", tmp_path / "no.json"), ["no.json", "costs.json"]),
        ((*good, "--capacities", OTHER_TABLE), [str(OTHER_TABLE), "model", "llama2-7b"]),
        ((*good, "--capacities", OTHER_TABLE, "--estimate", "h200"), ["--capacities", "--estimate"]),
        (("--config", config_file, "--out", tmp_path / "no" / "costs.json"), ["--out", "existing folder"]),
        (("--config", config_file, "--out", tmp_path / "costs.json"), ["tasks.a.files", "not found", "none.jsonl"]),
    ]:
        result = profile(*args)
        assert result.exit_code == 2, (args, result.output)
        error = result.output.strip().splitlines()[-1]
        assert error.startswith("error: ") and all(word in error for word in words), error
        assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize(("out", "problem"), [("", "a folder"), ("/proc/costs.json", "cannot write")])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(
    config_file, tmp_path, monkeypatch, out, problem
):
    monkeypatch.setattr("profiling.cli.run_profile", lambda *_, **__: pytest.fail("it measures"))
    result = profile("--config", config_file, "--out", tmp_path / out, *SHAPES)
    assert result.exit_code == 2 and f"--out: {problem}" in result.output, result.output
    assert result.output.count("\n") == 1


def test_damaged_partial_file_is_named(config_file, tmp_path):
    out = tmp_path / "costs.json"
    partial_path(out).write_text("{")
    result = profile("--config", config_file, "--out", out, *SHAPES)
    assert result.exit_code == 2 and partial_path(out).name in result.output.replace("\n", "")
