"""What is measured: which parallel configs, which micro-batch shapes, and how simulated devices share their host.

Pure arithmetic, without JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np

from lobra_jax.models.config import LlamaConfig
from planner.errors import UserError
from planner.lattice import Shape
from planner.plan import ParallelConfig
from planner.workload import Workload

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
LENGTH_ALIGN = 16
"""Measured lengths are multiples of this many tokens, as the planner's buckets are."""
CAPACITY_ALIGN = 64
"""Capacities of at least `LARGE_CAPACITY_TOKENS` are multiples of this, smaller ones of `LENGTH_ALIGN`."""
LARGE_CAPACITY_TOKENS = 1024
MIN_MAX_TOKENS = {"cpu": 1024}
"""Least largest micro-batch by platform, unless the user says otherwise: a few rows pay even for short sequences."""
MIN_MAX_TOKENS_OTHERWISE = 4096
MIN_SHAPES_TO_TEST = 3
"""With fewer measured shapes all are fitted and none tests the fit."""
SHORT_QUANTILE = 0.1
"""The shortest measured length covers this share of the sequences."""


def parallel_configs(
    model: LlamaConfig,
    *,
    num_devices: int,
    max_tp: int | None = None,
    max_pp: int | None = None,
    remats: Sequence[str],
) -> tuple[ParallelConfig, ...]:
    """Every (tp, pp, remat) that the model allows on `num_devices`, narrow ones first, remats of one shape together."""
    shapes = [
        (tp, pp)
        for tp in TENSOR_PARALLEL_SIZES
        if tp <= (max_tp or num_devices) and model.supports_tp(tp)
        for pp in range(1, min(max_pp or num_devices, model.num_layers) + 1)
        if tp * pp <= num_devices
    ]
    shapes.sort(key=lambda shape: (shape[0] * shape[1], shape[0]))
    return tuple(ParallelConfig(tp=tp, pp=pp, remat=remat) for tp, pp in shapes for remat in remats)


def side_by_side(
    configs: Sequence[ParallelConfig], *, num_devices: int
) -> tuple[tuple[tuple[ParallelConfig, int], ...], ...]:
    """Rounds of (config, its first device): as many configs of one round as there are devices for, in their order."""
    rounds: list[list[tuple[ParallelConfig, int]]] = []
    taken = num_devices
    for config in configs:
        if taken + config.num_devices > num_devices:
            rounds.append([])
            taken = 0
        rounds[-1].append((config, taken))
        taken += config.num_devices
    return tuple(tuple(group) for group in rounds)


def align_up(tokens: float, multiple: int = LENGTH_ALIGN) -> int:
    return math.ceil(tokens / multiple) * multiple


def align_capacity(tokens: float) -> int:
    """The largest capacity not above `tokens` that has the right multiple; 0 if there is none."""
    whole = int(tokens)
    multiple = CAPACITY_ALIGN if whole >= LARGE_CAPACITY_TOKENS else LENGTH_ALIGN
    return whole // multiple * multiple


def default_lengths(workload: Workload) -> tuple[int, ...]:
    """Three lengths that span a workload: one that short sequences have, the longest, and their geometric mean."""
    counts = workload.expected_counts()
    lengths, weights = np.array(list(counts)), np.array(list(counts.values()))
    below = np.cumsum(weights) / weights.sum()
    shortest = align_up(int(lengths[min(np.searchsorted(below, SHORT_QUANTILE), len(lengths) - 1)]))
    longest = align_up(workload.max_length)
    return tuple(sorted({shortest, align_up(math.sqrt(shortest * longest)), longest}))


def default_max_tokens(longest: int, platform: str) -> int:
    """The largest micro-batch worth asking for: on accelerators two of the longest sequences, on a CPU one."""
    if platform in MIN_MAX_TOKENS:
        return align_up(max(MIN_MAX_TOKENS[platform], longest), CAPACITY_ALIGN)
    return align_up(max(MIN_MAX_TOKENS_OTHERWISE, 2 * longest), CAPACITY_ALIGN)


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "64,512,4608" -> ascending lengths, multiples of 16; raises `UserError`."""
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    ascending = list(lengths) == sorted(set(lengths))
    if not lengths or not ascending or lengths[0] < 1 or any(length % LENGTH_ALIGN for length in lengths):
        raise UserError(
            "bad value",
            key="--lengths",
            value=text,
            expected=f"ascending multiples of {LENGTH_ALIGN} such as 64,512,4608",
        )
    return lengths


def parse_configs(text: str, configs: Sequence[ParallelConfig]) -> tuple[ParallelConfig, ...]:
    """Those of `configs` that "1x1,2x1" (tp x pp each) names; raises `UserError` for one that is not among them."""
    known = dict.fromkeys(f"{config.tp}x{config.pp}" for config in configs)
    wanted = text.replace(" ", "").split(",")
    for name in wanted:
        if name not in known:
            expected = f"TPxPP of {', '.join(known)}"
            raise UserError("no such config here", key="--configs", value=name, expected=expected)
    return tuple(config for config in configs if f"{config.tp}x{config.pp}" in wanted)


def probe_shapes(lengths: Sequence[int], max_tokens: int) -> tuple[Shape, ...]:
    """Single rows between which the memory of others is interpolated; no longer than `max_tokens`."""
    return tuple(dict.fromkeys((1, min(length, max_tokens)) for length in lengths))


def extreme_shapes(lengths: Sequence[int], capacity: int) -> tuple[Shape, ...]:
    """The micro-batches of `capacity` tokens with the longest row there can be and with the most rows."""
    return tuple(dict.fromkeys(((1, capacity), (capacity // lengths[0], lengths[0]))))


def between_shapes(lengths: Sequence[int], capacity: int) -> tuple[Shape, ...]:
    """Full micro-batches between the extremes: of the inner lengths, or of a length midway if none has two rows."""
    inner = tuple((capacity // length, length) for length in lengths[1:-1] if 2 * length <= capacity)
    if inner:
        return inner
    length = min(align_up(math.sqrt(lengths[0] * capacity)), capacity)
    return ((capacity // length, length),)


def full_shapes(lengths: Sequence[int], capacity: int) -> tuple[Shape, ...]:
    """What a capacity is confirmed on. Not the extremes alone: other lengths may run other code (attention does)."""
    return tuple(dict.fromkeys((*extreme_shapes(lengths, capacity), *between_shapes(lengths, capacity))))


def held_out_shape(lengths: Sequence[int], capacity: int, measured: Collection[Shape]) -> Shape | None:
    """The measured shape that the fit is tested on instead of made from; None if it would leave too few."""
    extremes = extreme_shapes(lengths, capacity)
    candidates = [s for s in between_shapes(lengths, capacity) if s in measured and s not in extremes]
    return candidates[0] if candidates and len(measured) >= MIN_SHAPES_TO_TEST else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostShare:
    """How a config is measured on devices that share one host's cores.

    `copies` replicas run at the same time on disjoint submeshes, and their seconds are multiplied by `factor`: what a
    micro-batch takes when every device is busy.
    """

    copies: int = 1
    factor: float = 1.0


def host_share(config_devices: int, *, num_devices: int, cores: int) -> HostShare:
    """For simulated devices: enough copies to fill the cores, then the slowdown from there to all devices busy."""
    copies = min(num_devices // config_devices, math.ceil(cores / config_devices))
    return HostShare(copies=copies, factor=max(num_devices, cores) / max(copies * config_devices, cores))
