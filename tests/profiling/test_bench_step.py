"""`lobra bench`: its numbers are of what it says, and a mistake is one line. Speed is not tested."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.models.config import PRESETS
from profiling.bench.ceiling import floor_flops

TINY = PRESETS["tiny"]


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_floor_flops_of_a_layer_by_hand():
    model = dataclasses.replace(TINY, num_layers=1)
    tokens, length = 2 * 32, 32
    linears = 4 * 64 * 64 + 3 * 64 * 160
    causal_forward = 2 * 2 * tokens * length * 64 / 2
    by_hand = 4 * tokens * (linears + 64 * 512) + 3.5 * causal_forward
    assert floor_flops(model, 2, length) == by_hand
    deeper = floor_flops(dataclasses.replace(model, num_layers=3), 2, length)
    assert deeper - by_hand == 2 * (by_hand - 4 * tokens * 64 * 512)


def test_step_reports_every_case(tmp_path):
    out = tmp_path / "step.json"
    result = bench(
        *("step", "--model", "tiny", "--layers", 1, "--dtype", "float32", "--shapes", "2x32", "--remats", "none,full"),
        *("--tasks", 2, "--ranks", "2,4", "--targets", "q,down", "--steps", 3, "--micro-batches", 2, "--out", out),
        *("--trace", tmp_path / "traces"),
    )
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {row["remat"] for row in record["rows"]} == {"none", "full"}
    assert record["check"]["gradient_error"] < 1e-5 and record["check"]["loss_error"] < 1e-5
    for row in record["rows"]:
        assert row["ranks"] == [2, 4] and row["micro_batches"] == 2 and len(row["all_step_s"]) == 3
        assert row["tokens_per_s_per_device"] == pytest.approx(2 * 2 * 32 / row["step_s"])
        assert row["share_of_ceiling"] == pytest.approx(row["floor_flop_rate"] / row["matmul_rate"])
        # A busy host may note the last backward's end as late as the update's.
        assert 0 <= row["sum_update_s"] < row["step_s"] and row["predicted_bytes"] > 0
        assert str(row["case"]) in result.output
        trace = row["trace"]
        assert [step["step"] for step in trace["steps"]] == [1, 2, 3]
        assert trace["classes"]["matmul"] > 0
        assert sum(trace["classes"].values()) == pytest.approx(trace["window_s"] * (1 - trace["idle_share"]), abs=1e-7)
    assert len(list((tmp_path / "traces").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "tinny"), "--model: unknown preset, did you mean 'tiny'?"),
        (("--model", "tiny", "--shapes", "8x"), "--shapes: not a shape (got '8x'); expected ROWSxLENGTH"),
        (("--model", "tiny", "--ranks", "0"), "--ranks: not a list of numbers (got '0')"),
        (
            ("--model", "tiny", "--remats", "dot"),
            "--remats: unknown name, did you mean 'dots'? (got 'dot'); expected one of none, dots",
        ),
        (("--model", "tiny", "--tp", "4", "--pp", "4"), "more devices than there are (got 16)"),
        (("--model", "tiny", "--out", "gone/step.json"), "--out: no such folder"),
    ],
)
def test_mistake_is_one_line(arguments, says):
    result = bench("step", *arguments)
    assert result.exit_code == 2
    assert says in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peers_run_the_same_shape(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "peers.json"
    result = bench(
        *("peers", "--model", "tiny", "--layers", 1, "--dtype", "float32", "--shapes", "2x16", "--rank", 2),
        *("--checkpointing", "off", "--steps", 1, "--out", out),
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["tokens_per_s_per_device"] == pytest.approx(2 * 16 / row["step_s"])
    assert 0 < row["loss"] < 10
