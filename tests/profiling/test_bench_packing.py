"""`lobra bench packing`: what it writes, on a model of one layer."""

import json

import pytest
from click.testing import CliRunner

from planner.errors import UserError
from profiling.bench.packing import main

SMALL = [
    "--layers",
    "1",
    "--context-length",
    "32",
    "--shorter",
    "64",
    "--max-tokens",
    "64",
    "--batch-scale",
    "0.01",
]


@pytest.mark.slow
def test_both_ways_run_the_same_tokens_and_packed_rows_pad_less(tmp_path):
    out = tmp_path / "packing.json"
    result = CliRunner().invoke(main, [*SMALL, "--steps", "1", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    padded, packed = record["rows"]["padded"], record["rows"]["packed"]
    assert padded["tokens_a_step"] == packed["tokens_a_step"] > 0
    assert 0 <= packed["padding_share"] < padded["padding_share"]
    assert record["chosen"] in ("padded", "packed")
    assert record["plan"]["model"] == "small"


def test_lengths_over_a_micro_batch_are_refused_before_anything_is_measured():
    arguments = [*SMALL, "--context-length", "512"]
    with pytest.raises(UserError, match="--context-length: longer than a micro-batch"):
        main.main(arguments, standalone_mode=False)
