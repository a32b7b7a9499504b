"""A cost table of a device that is not there, from what is published of it and from traced programs.

A micro-batch on a stage of `layers` layers, over tp devices, takes

    t = layers x layer + head of the last stage                                                           [seconds]
    layer = products + attention + fused elementwise work + what is kept + kernel launches + collectives
    products = sum of max(FLOPs / matmul rate, bytes / memory rate)                                           (1)
    attention = (1 + again + 2.5) forward FLOPs / attention rate + its bytes / memory rate                    (2)
    elementwise = FUSED_PASSES x bytes of the base's products that are activations / memory rate              (3)
    kept = 2 x bytes kept for the backward / memory rate                                                      (4)
    collectives = COLLECTIVES x hidden bytes x (tp - 1) / tp / link rate                                      (5)

`again` is 1 with remat full, which runs the flash kernel once more. (1) is counted (`profiling.work`), the rates are
shares of published numbers (`profiling.device_specs`), the constants below are from a trace of one H200.

A device's bytes are counted where a program can tell them (weights, adapters, what layers keep) and modelled where only
the device's own compiler could (temporaries), see `peak_bytes`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from lobra_jax.loss import MAX_CHUNK_TOKENS
from lobra_jax.memory import leaf_bytes
from lobra_jax.mesh import split_layers
from lobra_jax.models.remat import MLP_CHUNK_TOKENS
from planner.config_cost import ConfigCost, CostPoint
from planner.fit import fitted_cost
from planner.lattice import Shape
from planner.plan import ParallelConfig
from profiling.device_specs import DeviceSpec, Efficiency
from profiling.measure import Setup, make_replica, program_limit_bytes
from profiling.memory import find_capacity
from profiling.work import Product, Work, attention_flops, kept_bytes, traced_work

ATTENTION_BACKWARD = 2.5
"""Of the forward's FLOPs: five products instead of two."""
ATTENTION_HIDDEN_PASSES = 20
"""Times that attention reads or writes an array of the hidden size, forward and backward."""
FUSED_PASSES = 2.0
"""Bytes of fused elementwise kernels for each of the base's products' activations: 81 ms at 8 x 2048 tokens."""
KERNELS_OF_PRODUCT = 3
"""Kernels that run for each product of the program: its own and what is fused around it."""
KERNEL_S = 3e-6
"""Between one kernel's end and the next one's start."""
ISSUE_S, ISSUE_WIDE_S = 0.9e-3, 1.25e-3
"""The host needs so long to issue a layer's kernels, forward and backward, to one device, to several: medians of 1 x
256 tokens without a pipeline in the tables of H200 hosts. Short micro-batches wait for that."""
COLLECTIVES = {"none": 8, "dots": 10, "attention": 11, "full": 11}
"""Gathers and scatters of hidden activations for a layer: two of each forward and backward, and those done again."""
TEMPORARY_HIDDEN, TEMPORARY_MLP = 12, 6
"""Arrays of hidden and of feed-forward size that exist at once in a layer's backward, where they are not kept."""
LOGITS_COPIES = 3
"""Arrays of logits, in float32, that exist at once in a chunk of the loss."""
STATE_PASSES = 14
"""Times that gradient sum, update and spreading read or write an array of the adapters' size."""
CHUNKED = ("attention", "full")


def estimated_shapes(lengths: Sequence[int], capacity: int) -> list[Shape]:
    """One row, half the rows and all that there is room for, of the lengths and of those between at doublings."""
    between, length = [], lengths[0]
    while length <= capacity:
        between.append(length)
        length *= 2
    fitting = sorted({*between, *(length for length in lengths if length <= capacity), capacity})
    return sorted({(rows, n) for n in fitting for rows in (1, capacity // n // 2, capacity // n) if rows >= 1})


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The model of one device's times and bytes."""

    setup: Setup
    spec: DeviceSpec
    efficiency: Efficiency
    work: Callable[[str, int], Work] = dataclasses.field(init=False)
    kept: Callable[[str, int], int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # What is traced without a pipeline holds for every pp.
        object.__setattr__(self, "work", functools.cache(functools.partial(traced_work, self.setup)))
        object.__setattr__(self, "kept", functools.cache(functools.partial(kept_bytes, self.setup)))

    def estimate(self, config: ParallelConfig) -> ConfigCost:
        """Capacity, times and fit of one config. Raises `DoesNotFitError` if it holds no micro-batch at all."""
        setup = self.setup
        replica = make_replica(setup, config, 0, setup.devices[: config.num_devices])
        fixed = [leaf_bytes(layout.params) + 2 * leaf_bytes(layout.adapters) for layout in replica.layouts]
        limit = program_limit_bytes(setup, replica, platform="gpu")

        def measure(shapes: Sequence[Shape]) -> list[int]:
            return [self.peak_bytes(config, shape, fixed) for shape in shapes]

        capacity = find_capacity(
            measure, limit_bytes=limit, fixed_bytes=max(fixed), lengths=setup.lengths, max_tokens=setup.max_tokens
        )
        shapes = estimated_shapes(setup.lengths, capacity.tokens)
        points = [
            CostPoint(rows=shape[0], length=shape[1], seconds=self.slot_s(config, shape), peak_bytes=size)
            for shape, size in zip(shapes, measure(shapes), strict=True)
        ]
        return fitted_cost(config, capacity.tokens, points)

    def slot_s(self, config: ParallelConfig, shape: Shape) -> float:
        """Seconds that a micro-batch occupies the slowest stage."""
        work = self.work(config.remat, config.tp)
        layer_s = self._products_s(work.layer, shape, config.tp) + self._attention_s(config, shape)
        layer_s += self._collectives_s(config, shape)
        layer_s += 2 * shape[0] * shape[1] * self.kept(config.remat, config.tp) / (self._memory_bytes_per_s * config.tp)
        layer_s = max(layer_s, ISSUE_S if config.tp == 1 else ISSUE_WIDE_S)
        head_s = self._products_s(work.head, shape, config.tp)
        stages = split_layers(self.setup.model, config.pp)
        return max(len(layers) * layer_s + (head_s if layers is stages[-1] else 0.0) for layers in stages)

    def _products_s(self, products: tuple[Product, ...], shape: Shape, tp: int) -> float:
        flops_per_s = self.efficiency.matmul * self.spec.matmul_flops * tp
        bytes_per_s = self._memory_bytes_per_s * tp
        total = 0.0
        for product in products:
            total += max(product.flops(shape) / flops_per_s, product.moved_bytes(shape) / bytes_per_s)
            total += KERNELS_OF_PRODUCT * KERNEL_S
            if not product.is_low_rank:
                total += FUSED_PASSES * product.activation_bytes(shape) / bytes_per_s
        return total

    def _attention_s(self, config: ParallelConfig, shape: Shape) -> float:
        forward = attention_flops(self.setup.model, shape)
        runs = 1 + (config.remat == "full") + ATTENTION_BACKWARD
        rate = self.efficiency.attention * self.spec.matmul_flops * config.tp
        moved = ATTENTION_HIDDEN_PASSES * self._hidden_bytes(shape)
        return runs * forward / rate + moved / (self._memory_bytes_per_s * config.tp)

    def _collectives_s(self, config: ParallelConfig, shape: Shape) -> float:
        moved = COLLECTIVES[config.remat] * self._hidden_bytes(shape) * (config.tp - 1) / config.tp
        return moved / (self.efficiency.link * self.spec.link_bytes_per_s)

    @property
    def _memory_bytes_per_s(self) -> float:
        return self.efficiency.memory * self.spec.memory_bytes_per_s

    def _hidden_bytes(self, shape: Shape) -> int:
        return shape[0] * shape[1] * self.setup.model.hidden_size * self.setup.dtype.itemsize

    def peak_bytes(self, config: ParallelConfig, shape: Shape, fixed_bytes: list[int]) -> int:
        """Bytes on the fullest stage's devices: what is fixed, what layers keep of the micro-batches in flight, and the
        temporaries of one layer's backward and of a chunk of the loss."""
        setup, tokens = self.setup, shape[0] * shape[1]
        chunked = config.remat in CHUNKED and config.tp == 1 and not setup.dropout
        mlp_tokens = min(tokens, MLP_CHUNK_TOKENS) if chunked else tokens
        temporary = TEMPORARY_HIDDEN * tokens * setup.model.hidden_size
        temporary += TEMPORARY_MLP * mlp_tokens * setup.model.intermediate_size
        logits = LOGITS_COPIES * 4 * min(tokens, MAX_CHUNK_TOKENS) * setup.model.vocab_size
        stages = split_layers(setup.model, config.pp)
        peaks = []
        for stage, (layers, fixed) in enumerate(zip(stages, fixed_bytes, strict=True)):
            in_flight = config.pp - stage
            kept = in_flight * len(layers) * tokens * self.kept(config.remat, config.tp)
            last = logits if stage == config.pp - 1 else 0
            peaks.append(fixed + (kept + temporary * setup.dtype.itemsize + last) // config.tp)
        return max(peaks)

    def step_overhead_s(self) -> float:
        """Seconds of gradient sum, update and new adapters on all devices."""
        replica = make_replica(self.setup, ParallelConfig(tp=1, pp=1, remat="none"), 0, self.setup.devices[:1])
        adapters = leaf_bytes(replica.layouts[0].adapters)
        homes = min(len(self.setup.devices), self.setup.model.num_layers)
        exchanged = 0 if homes == 1 else 2 * adapters
        moved = STATE_PASSES * adapters / homes
        return moved / self._memory_bytes_per_s + exchanged / (self.efficiency.link * self.spec.link_bytes_per_s)
