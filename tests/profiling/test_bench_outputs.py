"""Every benchmark says at its start what it could not write at its end, and takes no seed that NumPy refuses."""

import importlib

import pytest
from click.testing import CliRunner

from planner.errors import UserError

UNWRITABLE = "/proc/out.json"
COMMANDS = {
    "bench.dispatch:main": (),
    "bench.estimate:main": ("a.json", "b.json"),
    "bench.load:main": (),
    "bench.packing:main": (),
    "bench.parity:main": (),
    "bench.peers:main": (),
    "bench.planning:bench": ("--reference", "."),
    "bench.quantization:main": (),
    "bench.step:main": (),
    "bench.submeshes:main": (),
    "bench.tokenize:main": (),
    "bench.unlike_tables:bench": ("--reference", "."),
    "experiments:main": (),
}
SEEDED = ("bench.dispatch:main", "bench.packing:main", "bench.unlike_tables:bench", "experiments:main")


def run(target, *arguments):
    module, _, name = target.partition(":")
    command = getattr(importlib.import_module(f"profiling.{module}"), name)
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.mark.parametrize("target", COMMANDS)
def test_an_output_that_cannot_be_written_is_said_first(target):
    with pytest.raises(UserError, match="--out: cannot write: .*; expected a path that can be written") as caught:
        run(target, *COMMANDS[target], "--out", UNWRITABLE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", SEEDED)
def test_a_seed_below_zero_is_refused(target, tmp_path):
    result = run(target, *COMMANDS[target], "--out", str(tmp_path / "out"), "--seed", "-1")
    assert result.exit_code == 2 and "Invalid value for '--seed'" in result.output
