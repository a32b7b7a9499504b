"""Devices of a run: simulated ones in a fresh process, limits, mistakes."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from lobra_jax.config import DevicesConfig
from lobra_jax.devices import (
    ACCELERATOR_FLAGS,
    HEAP_BYTES,
    compiler_options,
    configure,
    cut_up_bytes,
    memory_limit,
    run_devices,
)
from planner.errors import UserError

FRESH = """
import sys
from pathlib import Path
from lobra_jax.config import DevicesConfig
from lobra_jax.devices import configure
configure(DevicesConfig(simulated=3), cache_dir=Path(sys.argv[1]))
import jax
print(len(jax.devices()), jax.devices()[0].platform, jax.config.jax_compilation_cache_dir)
"""


def test_fresh_process_gets_simulated_devices_and_a_compilation_cache(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["3", "cpu", str(tmp_path / "xla")]


CUT_BY_CALLBACK = """
import sys
from pathlib import Path
from lobra_jax.compilation import CompilationCount
from lobra_jax.config import DevicesConfig
from lobra_jax.devices import configure
configure(DevicesConfig(simulated=2), cache_dir=Path(sys.argv[1]))
import jax, numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

@custom_partitioning
def doubled(x):
    return 2 * x

def partition(mesh, arguments, result):
    return mesh, lambda x: 2 * x, arguments[0].sharding, (arguments[0].sharding,)

doubled.def_partition(partition=partition, sharding_rule="i -> i")
rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
count = CompilationCount()
jax.jit(doubled, in_shardings=rows, out_shardings=rows).lower(jax.ShapeDtypeStruct((8,), np.float32)).compile()
print(count.total, count.from_cache)
"""


def test_another_process_finds_a_program_again_that_a_callback_cuts_up(tmp_path):
    """As it does cuDNN's attention."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}

    def run(padding):
        command = [sys.executable, "-c", padding + CUT_BY_CALLBACK, tmp_path]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run("") == ["1", "0"]
    assert run("elsewhere = [object() for _ in range(10**6)]") == ["1", "1"]


@pytest.mark.parametrize("given", [None, "--xla_gpu_enable_triton_gemm=true"])
def test_flags_for_accelerators_give_way_to_the_users_own(monkeypatch, tmp_path, given):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    other = "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", f"{other} {given}" if given else other)
    configure(DevicesConfig(), cache_dir=tmp_path)
    ours = [flag for flag in ACCELERATOR_FLAGS if given is None or flag.split("=")[0] != given.split("=")[0]]
    assert os.environ["XLA_FLAGS"].split() == [other, *([given] if given else []), *ours]


def test_programs_ask_for_room_in_pieces_on_a_gpu_alone():
    options = {platform: compiler_options(SimpleNamespace(platform=platform)) for platform in ("gpu", "cpu")}
    assert options == {"gpu": {"xla_multiheap_size_constraint_per_heap": HEAP_BYTES}, "cpu": {}}
    assert HEAP_BYTES < 2**31  # XLA reads an int32


def test_a_piece_is_left_free_where_several_gpus_exchange_adapters():
    assert cut_up_bytes("gpu", 2) == HEAP_BYTES
    assert cut_up_bytes("gpu", 1) == cut_up_bytes("cpu", 8) == 0


def test_a_process_on_other_devices_refuses_and_is_left_as_it_was(tmp_path):
    number = len(jax.devices())
    configure(DevicesConfig(simulated=number), cache_dir=tmp_path)
    flags = os.environ["XLA_FLAGS"]
    with pytest.raises(UserError, match=f"devices.simulated: JAX already runs on {number} cpu devices"):
        configure(DevicesConfig(simulated=number + 1), cache_dir=tmp_path)
    assert os.environ["XLA_FLAGS"] == flags


def test_the_first_devices_are_used_and_there_must_be_enough():
    assert run_devices(DevicesConfig(num_devices=2)) == jax.devices()[:2]
    assert run_devices(DevicesConfig()) == jax.devices()
    with pytest.raises(UserError, match="devices.num_devices: .*got 99.*at most"):
        run_devices(DevicesConfig(num_devices=99))


def test_memory_limit_is_the_configs_else_the_devices():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    assert memory_limit(DevicesConfig(memory_bytes=5), Device({"bytes_limit": 7})) == 5
    assert memory_limit(DevicesConfig(), Device({"bytes_limit": 7})) == 7
    for stats in (None, {}):
        with pytest.raises(UserError, match="devices.memory_bytes.*4GiB"):
            memory_limit(DevicesConfig(), Device(stats))


def test_memory_limit_agrees_with_what_jax_may_take():
    class Device:
        device_kind = "H200"

        def memory_stats(self):
            return {"bytes_limit": 7}

    assert memory_limit(DevicesConfig(memory_bytes=7), Device()) == 7
    with pytest.raises(UserError, match="devices.memory_bytes: more than JAX may take of a H200 .got 8.; .* at most 7"):
        memory_limit(DevicesConfig(memory_bytes=8), Device())
