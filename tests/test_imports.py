"""What is loaded by loading what: the import contracts hold statically (`lint-imports`), these hold at run time."""

import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

import lobra_jax.data
import planner
from lobra_jax import __version__

JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax"}
PLANNING = {"numba", "scipy", "pyscipopt"}
"""What only planning and dispatching need; Numba compiles when the planner is first loaded, for seconds."""


def modules_of(package: ModuleType) -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")]
    return [package.__name__, *(name for name in names if not name.endswith("__main__"))]


def loaded_by(names: Iterable[str]) -> set[str]:
    """Top-level modules in a fresh interpreter after importing these."""
    program = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_whole_planner_loads_without_jax_or_the_runtime() -> None:
    assert not loaded_by(modules_of(planner)) & (JAX_FAMILY | {"lobra_jax", "profiling"})


def test_config_and_data_load_without_jax_or_what_plans() -> None:
    names = ["lobra_jax.config", *modules_of(lobra_jax.data)]
    assert not loaded_by(names) & (JAX_FAMILY | PLANNING | {"matplotlib", "profiling"})


def test_commands_that_plan_nothing_load_without_what_plans() -> None:
    names = ["lobra_jax.cli", "lobra_jax.commands.tokenize", "lobra_jax.commands.export", "lobra_jax.export"]
    assert not loaded_by(names) & PLANNING


def test_the_runtime_loads_without_profiling() -> None:
    assert "profiling" not in loaded_by(name for name in modules_of(lobra_jax) if name != "lobra_jax.__main__")


def test_training_loads_without_a_solver_or_plots() -> None:
    assert not loaded_by(["lobra_jax.train"]) & {"pyscipopt", "matplotlib", "torch"}


@pytest.mark.parametrize("package", ["lobra_jax", "planner", "profiling"])
def test_every_source_is_a_module_of_its_package(package: str) -> None:
    """A folder without `__init__.py` would work from a checkout and be missing from the distribution."""
    root = Path(lobra_jax.__file__).parents[1] / package
    for source in root.rglob("*.py"):
        assert (source.parent / "__init__.py").exists(), source


def test_the_distribution_carries_the_version() -> None:
    assert importlib.metadata.version("lobra-jax") == __version__
