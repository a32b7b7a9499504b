"""The devices of a run: simulated ones, how many, how much memory each may use, and where compiled programs are kept.

Imports JAX only inside its functions: `configure` has to speak before JAX looks for devices.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import UserError

if TYPE_CHECKING:
    from lobra_jax.config import DevicesConfig

COUNT_FLAG = "--xla_force_host_platform_device_count"
ACCELERATOR_FLAGS = ("--xla_gpu_enable_triton_gemm=false", "--xla_disable_hlo_passes=rematerialization")
"""Set unless XLA_FLAGS has them already. On an H200 the library's matmuls took a step of a 7B model with six adapters
from 920 to 887 ms against those that XLA generates. Kernels stay in CUDA graphs: launched one by one the step took 870
ms in place of 855 (profiling/results/h200_step.json). What is made anew is the plan's to choose: XLA, where a program
is too large, would choose more, after which bytes no longer grow with the micro-batch, and take long over it."""

HEAP_BYTES = 3 << 28
"""What a program needs on a GPU for a while it asks for in pieces of at most so many bytes, but for arrays that are
larger, not in one: states and adapters come and go beside it and cut up the room. By XLA's analysis programs of 7B and
13B at 40 GiB need at most 0.1 GiB more, with pieces of 512 MiB up to 0.5; one of 66 GiB took 0.4 GiB more on an H200,
and as long (profiling/results/h200_tries.json)."""

CACHE_FOLDER = "xla"
MIN_COMPILE_S_TO_CACHE = 0.2
"""Programs that compile faster are not worth a file."""


def configure(config: DevicesConfig, *, cache_dir: Path) -> None:
    """Sets JAX up for a run; call it before anything else touches a device.

    With `simulated` JAX sees that many CPU devices and nothing else. Compiled programs are kept in `cache_dir`/xla,
    unless JAX was already told of a place (JAX_COMPILATION_CACHE_DIR).

    Raises:
      UserError: devices are simulated, but JAX is already running on others.
    """
    if config.simulated is not None:
        _simulate(config.simulated)
    else:
        set_accelerator_flags()
    import jax

    find_programs_again()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / CACHE_FOLDER))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S_TO_CACHE)


def find_programs_again() -> None:
    """Lets the compilation cache know a program of several devices again that has cuDNN's attention.

    How that is cut up is a Python callback, whose address would be part of the program's key, another one in every
    process. JAX leaves such addresses in because programs might differ in nothing else; ours with the same operands
    call one and the same attention.
    """
    import jax

    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)


def set_accelerator_flags() -> None:
    """Adds `ACCELERATOR_FLAGS` to XLA_FLAGS, those apart that it has."""
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in ACCELERATOR_FLAGS if flag.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def _simulate(count: int) -> None:
    before = {name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS")}
    other_flags = re.sub(rf"{COUNT_FLAG}=\S*", "", before["XLA_FLAGS"] or "").strip()
    os.environ["XLA_FLAGS"] = f"{other_flags} {COUNT_FLAG}={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" not in sys.modules:
        return
    import jax

    # The settings still count if JAX has not made its devices yet; if it has, they have to be the right ones.
    found = jax.devices()
    if found[0].platform != "cpu" or len(found) != count:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        raise UserError(
            f"JAX already runs on {len(found)} {found[0].platform} devices in this process",
            key="devices.simulated",
            value=count,
            expected="that many CPU devices, or a fresh process",
        )


def run_devices(config: DevicesConfig) -> list[Any]:
    """The devices to use: the first `num_devices`, or all. Raises `UserError` if there are fewer."""
    import jax

    devices = jax.devices()
    if config.num_devices is not None and config.num_devices > len(devices):
        raise UserError(
            "more devices than there are",
            key="devices.num_devices",
            value=config.num_devices,
            expected=f"at most {len(devices)} ({devices[0].device_kind})",
        )
    return devices[: config.num_devices]


def memory_limit(config: DevicesConfig, device: Any) -> int:
    """Bytes that a run may use on each device: `memory_bytes`, else what the device itself offers JAX.

    Raises:
      UserError: neither is known (CPU devices do not say), or `memory_bytes` is more than JAX may take of the device.
    """
    offered = (device.memory_stats() or {}).get("bytes_limit")
    if config.memory_bytes is None and offered is None:
        raise UserError(
            f"a {device.platform} device does not tell its memory",
            key="devices.memory_bytes",
            expected='a limit per device, such as "4GiB"',
        )
    if config.memory_bytes is None:
        return int(offered)
    if offered is not None and config.memory_bytes > offered:
        raise UserError(
            f"more than JAX may take of a {device.device_kind}",
            key="devices.memory_bytes",
            value=config.memory_bytes,
            expected=f"at most {offered} (XLA_PYTHON_CLIENT_MEM_FRACTION of its memory), or null for all of that",
        )
    return config.memory_bytes


def peak_bytes(devices: Sequence[Any]) -> int | None:
    """Of the fullest device since the process began; None where devices do not tell."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def compiler_options(device: Any) -> dict[str, int]:
    """XLA's options for the programs of a stage on such devices."""
    return {"xla_multiheap_size_constraint_per_heap": HEAP_BYTES} if device.platform == "gpu" else {}


def cut_up_bytes(platform: str, num_devices: int) -> int:
    """What is left free of a device, of several, so that programs find their pieces.

    Gradients, adapters and states that come and go beside programs leave gaps smaller than a piece. On four H100 held
    to 40 GiB a program for which 1.1 GiB more than it needs were there ran out of memory after some steps
    (profiling/results/h100_tries.json); one piece more is left now, which has not been tried on GPUs yet.
    """
    return HEAP_BYTES if platform == "gpu" and num_devices > 1 else 0
