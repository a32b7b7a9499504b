"""Every file under configs/ loads, and opens with the command that runs it."""

from pathlib import Path

import pytest

from lobra_jax.config import load_config
from planner.workload import Workload

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NEED_OWN_FILES = {"own_data.yaml"}
"""Examples that name a user's own files, which are not here."""


@pytest.mark.parametrize("path", sorted((CONFIGS / "runs").iterdir()), ids=lambda path: path.name)
def test_run_config_loads_and_says_how_to_run_it(path):
    load_config(path, check_files=path.name not in NEED_OWN_FILES)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert "lobra train" in head or f"lobra train --config configs/runs/{path.name}" in path.read_text(encoding="utf-8")


def test_gin_and_yaml_examples_are_the_same_run():
    runs = CONFIGS / "runs"
    assert load_config(runs / "synthetic_tiny.gin") == load_config(runs / "synthetic_tiny.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "lengths").iterdir()), ids=lambda path: path.name)
def test_histogram_loads(path):
    assert Workload.load(path).tasks
