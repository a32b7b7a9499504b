"""Published numbers of devices, and what share of them real programs reach: all that an estimate knows of a device."""

from __future__ import annotations

import dataclasses

from planner.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One accelerator.

    Attributes:
      kind: its name in cost tables.
      matmul_flops: dense bf16 multiply-adds x 2 a second, as published, without sparsity.
      memory_bytes: on the device.
      memory_bytes_per_s: of that memory.
      link_bytes_per_s: to another device of the host, one direction.
    """

    kind: str
    matmul_flops: float
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float


SPECS = {
    "a100-40g": DeviceSpec(
        kind="NVIDIA A100-SXM4-40GB",
        matmul_flops=312e12,
        memory_bytes=40 * GIB,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=300e9,
    ),
    "a100-80g": DeviceSpec(
        kind="NVIDIA A100-SXM4-80GB",
        matmul_flops=312e12,
        memory_bytes=80 * GIB,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
    ),
    "h100-80g": DeviceSpec(
        kind="NVIDIA H100 80GB HBM3",
        matmul_flops=989.4e12,
        memory_bytes=80 * GIB,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
    ),
    "h200": DeviceSpec(
        kind="NVIDIA H200",
        matmul_flops=989.4e12,
        memory_bytes=141_000_000_000,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the published numbers that programs reach, from one H200 (Llama-2 7B shapes, bf16, JAX 0.11.2).

    Attributes:
      matmul: 433 TFLOP of linears and head in 614 ms of matmul kernels, 8 x 2048 tokens.
      attention: what 1 x 16384 tokens took longer than 8 x 2048 (504 ms) for 277 TFLOP more.
      memory: a copy reaches 4.2 of 4.8 TB/s.
      link: a replica of two devices against one of half the layers' work, 8 x 2048 tokens.
      allocatable: of a device's memory, what JAX takes unless it is told otherwise.
    """

    matmul: float = 0.71
    attention: float = 0.56
    memory: float = 0.875
    link: float = 0.6
    allocatable: float = 0.75


def device_spec(name: str) -> DeviceSpec:
    if name not in SPECS:
        raise UserError("unknown device", key="--estimate", value=name, expected=f"one of {', '.join(SPECS)}")
    return SPECS[name]
