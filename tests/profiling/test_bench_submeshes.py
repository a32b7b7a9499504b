"""`lobra bench submeshes`: every cut of the model computes the same, and its rows agree with themselves."""

import json

import jax
import pytest
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import PRESETS
from lobra_jax.replica import Replica
from planner.plan import ParallelConfig
from profiling.made_up import random_adapters, random_params

SMALL = "--model tiny --layers 2 --dtype float32 --tasks 2 --rank 2 --targets q,down --steps 3".split()


def submeshes(*arguments):
    return CliRunner().invoke(main, ["bench", "submeshes", *SMALL, *map(str, arguments)])


def test_every_cut_of_two_devices_is_timed_and_checked(tmp_path):
    out = tmp_path / "submeshes.json"
    result = submeshes("--devices", 2, "--shape", "2x16", "--micro-batches", 3, "--remat", "none", "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["devices"] == "2 x cpu" and record["commit"] and record["versions"]["jax"]
    rows = {(row["tp"], row["pp"]): row for row in record["rows"]}
    assert list(rows) == [(1, 1), (1, 2), (2, 1)]
    assert rows[1, 1]["efficiency"] == 1
    for (tp, pp), row in rows.items():
        assert row["gradient_error"] < 1e-5 and row["loss_error"] < 1e-5 and row["passed"]
        assert row["tokens_per_s_per_device"] == pytest.approx(3 * 2 * 16 / row["step_s"] / (tp * pp))
        assert row["efficiency"] == pytest.approx(
            row["tokens_per_s_per_device"] / rows[1, 1]["tokens_per_s_per_device"]
        )
        assert row["bubble_share"] == pytest.approx((pp - 1) / (3 + pp - 1))
        assert len(row["stage_idle_share"]) == pp and all(-1e-9 <= idle <= 1 for idle in row["stage_idle_share"])
        assert row["predicted_step_s"] > 0 and 0 <= row["sum_update_share"] < 1
        assert f"(tp{tp},pp{pp},none): step" in result.output


def test_only_those_named_are_timed(tmp_path):
    out = tmp_path / "submeshes.json"
    result = submeshes("--devices", 2, "--shape", "2x16", "--micro-batches", 1, "--configs", "2x1", "--out", out)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["tp"], row["pp"], row["efficiency"]) for row in record["rows"]] == [(2, 1, None)]
    assert "--configs 2x1" in record["command"] and "of one device's" not in result.output


def test_random_weights_do_not_depend_on_the_cut():
    def made(tp, pp):
        config = ParallelConfig(tp=tp, pp=pp, remat="none")
        replica = Replica(
            index=0,
            model=PRESETS["tiny"],
            submesh=make_submesh(config, jax.devices()[: tp * pp]),
            num_tasks=1,
            max_rank=2,
            targets=("q",),
            dropout=False,
            dtype="float32",
        )
        weights = {name: array for stage in random_params(replica) for name, array in stage.items()}
        adapters = random_adapters(replica, [LoraSpec(rank=2, alpha=2, targets=("q",))])
        return weights | {f"{layer}.{x}": pairs["q"][x] for layer, pairs in adapters.items() for x in "ab"}

    whole, cut = made(1, 1), made(2, 2)
    assert whole.keys() == cut.keys()
    assert all((jax.device_get(whole[name]) == jax.device_get(cut[name])).all() for name in whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "2x16,4x16"), "--shape: more than one (got '2x16,4x16'); expected one ROWSxLENGTH"),
        (("--targets", "q,upp"), "--targets: unknown name, did you mean 'up'? (got 'upp'); expected one of q, k, v"),
        (("--devices", 99), "--devices: more than there are (got 99); expected at most 8"),
        (
            ("--devices", 2, "--configs", "1x3"),
            "--configs: no such config here (got '1x3'); expected TPxPP of 1x1, 1x2, 2x1",
        ),
        (("--model", "tinny"), "--model: unknown preset, did you mean 'tiny'?"),
        (("--out", "gone/s.json"), "--out: no such folder"),
    ],
)
def test_mistake_is_one_line(arguments, says):
    result = submeshes(*arguments)
    assert result.exit_code == 2
    assert says in result.output and len(result.output.splitlines()) == 1
