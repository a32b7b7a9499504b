"""Every file under configs/ loads and opens with the command that runs it."""

import re
from pathlib import Path

import pytest

from lobra_jax.config import load_config
from lobra_jax.data.templates import TEMPLATES, render, with_columns
from planner.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
README = ROOT / "README.md"
NEED_OWN_FILES = {"own_data.yaml"}
"""Examples that name a user's own files, which are not here."""


RUNS = sorted(path for path in (CONFIGS / "runs").iterdir() if path.is_file())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_run_config_loads_and_says_how_to_run_it(path):
    config = load_config(path, check_files=path.name not in NEED_OWN_FILES)
    # Without a cost table one is measured, and simulated devices do not tell their memory.
    assert config.devices.simulated is None or config.devices.memory_bytes is not None
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert "lobra train" in head or f"lobra train --config configs/runs/{path.name}" in path.read_text(encoding="utf-8")


def test_gin_and_yaml_examples_are_the_same_run():
    runs = CONFIGS / "runs"
    assert load_config(runs / "synthetic_tiny.gin") == load_config(runs / "synthetic_tiny.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "tasks").iterdir()), ids=lambda path: path.name)
def test_task_config_loads_and_says_how_to_use_it(path, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{preset: tiny}}\ntasks:\n  - {{use: {path}}}\n", encoding="utf-8")
    (task,) = load_config(run, check_files=False).tasks
    assert task.name == path.stem
    assert {"prompt", "completion"} <= set(task.columns)
    assert "/" in task.dataset.name
    assert f"{{use: configs/tasks/{path.name}, " in path.read_text(encoding="utf-8")
    record = {
        column.partition(".")[0]: {"contexts": ["x"]} if "." in column else "x" for column in task.columns.values()
    }
    assert render(with_columns(record, task.columns), task.template)[-1].text == "x"


@pytest.mark.parametrize("path", sorted((CONFIGS / "lengths").iterdir()), ids=lambda path: path.name)
def test_histogram_loads(path):
    assert Workload.load(path).tasks


def test_every_config_in_the_readme_loads(tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path, check_files=False)


def test_the_data_page_names_every_template():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"\n| {template} | " in text for template in TEMPLATES)
