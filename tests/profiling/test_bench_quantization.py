"""The benchmark of quantised bases, on a model of a few thousand weights."""

import json

import pytest
from click.testing import CliRunner

from lobra_jax.models.config import PRESETS
from planner.errors import UserError
from profiling.bench.quantization import main

TINY = "--preset tiny --layers 1 --dtype float32 --repeats 1 --tasks 1 --rank 1".split()


def test_rows_tell_bytes_and_differences_from_the_unquantised_base(tmp_path):
    out = tmp_path / "q.json"
    flags = ["--shapes", "1x16", "--remat", "none", "--quantizations", "nf4", "--out", str(out)]
    result = CliRunner().invoke(main, [*TINY, *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    none, nf4 = record["rows"]
    assert (none["quantization"], nf4["quantization"]) == ("none", "nf4")
    weights = sum(fan_in * fan_out for fan_in, fan_out in PRESETS["tiny"].target_shapes.values())
    assert (none["linear_bytes"], nf4["linear_bytes"]) == (4 * weights, weights * 4.5 / 8)
    assert none["weight_bytes"] - nf4["weight_bytes"] == none["linear_bytes"] - nf4["linear_bytes"]
    assert none["loss_difference"] == none["gradient_difference"] == 0
    assert 0 < abs(nf4["loss_difference"]) < 0.1 and 0 < nf4["gradient_difference"] < 1
    assert all(row["step_s"] > 0 and row["peak_bytes"] > row["weight_bytes"] for row in record["rows"])
    assert record["commit"] and record["versions"]["jax"] and record["device"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(["--quantizations", "int3"], "unknown quantization"), (["--shapes", "16"], "not a shape")],
)
def test_a_mistake_says_what_was_expected(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        CliRunner().invoke(main, [*TINY, *flags], catch_exceptions=False)
