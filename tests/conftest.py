"""Sets JAX up before any test imports it: eight simulated CPU devices, strict promotion, a compile cache.

Where JAX_PLATFORMS names an accelerator, it is that one instead, with the flags that runs have.

Environment variables rather than `jax.config`: tests of the planner then import no JAX, and programs that a test
starts inherit the same settings.
"""

import os
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

from lobra_jax.devices import set_accelerator_flags

NUM_SIMULATED_DEVICES = 8
REPOSITORY = Path(__file__).resolve().parent.parent
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_experimental_ynn_fusion_type=",
    "--xla_cpu_parallel_codegen_split_count=1",
    # XLA ends the process for a flag that it does not know; later ones do not know this one.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
)
"""Little models are compiled for longer than they run: without costly optimisation, without MLIR's pipeline for each
fusion or a runtime for each matmul, and in one module of LLVM's. It spares about a third."""

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_PLATFORMS"] != "cpu":
    set_accelerator_flags()
elif "xla_force_host_platform_device_count" not in _flags:
    _own = (f"--xla_force_host_platform_device_count={NUM_SIMULATED_DEVICES}", *QUICKLY_COMPILED)
    os.environ["XLA_FLAGS"] = " ".join([_flags, *_own]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

hypothesis.settings.register_profile(
    "repository",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repository")


LONGEST_FIRST = ("test_resume.py", "test_contract.py", "test_profile.py", "test_docs.py")
"""Files that a worker has to itself for minutes: last, the others would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run only where JAX was told of one: `JAX_PLATFORMS=cuda pytest -m gpu`."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if os.environ["JAX_PLATFORMS"] == "cpu":
        skip = pytest.mark.skip(reason="needs an accelerator: run with JAX_PLATFORMS=cuda")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
