"""The work of a training step, counted in its traced program: nothing is compiled, allocated or run.

The traced program is counted, not a compiled one: XLA on a CPU merges what rematerialisation would do again with what
was done before, its attention is not the flash kernel, and it takes a loop's body once. Dead code goes first. One layer
and two tell any number of layers, as all are one function; a small micro-batch tells any other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval

from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.llama import abstract_stage
from lobra_jax.sharding import StageSharding
from lobra_jax.stage import Residuals, StageFunctions, StageLayout, stage_layout
from planner.lattice import Shape
from planner.plan import ParallelConfig
from profiling.measure import Setup

ATTENTION_BATCH_DIMS = 2
"""A product over rows and heads is attention's; one over rows is of gathered adapters; the base's has neither."""

ROWS, LENGTH = 2, 208
"""The micro-batch that is traced: work and bytes go with its tokens or rows. No other dimension of a model is 208."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product of a program.

    Attributes:
      token_flops: multiply-adds x 2 for each token of the micro-batch.
      token_bytes, row_bytes, fixed_bytes: of its operands and result, for each token, each row, and whatever the shape.
      is_low_rank: one of adapters, gathered by row.
    """

    token_flops: float
    token_bytes: float
    row_bytes: float
    fixed_bytes: float
    is_low_rank: bool

    def flops(self, shape: Shape) -> float:
        return self.token_flops * shape[0] * shape[1]

    def moved_bytes(self, shape: Shape) -> float:
        return self.activation_bytes(shape) + self.row_bytes * shape[0] + self.fixed_bytes

    def activation_bytes(self, shape: Shape) -> float:
        return self.token_bytes * shape[0] * shape[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The products of each layer, and those of the head, in forward, loss and backward; attention's are left out."""

    layer: tuple[Product, ...]
    head: tuple[Product, ...]


def traced_work(setup: Setup, remat: str, tp: int) -> Work:
    """What a micro-batch takes on all devices that share a layer, counted.

    Left out is what kernels make that pass over the same arrays anyway: of adapters, where a device has a layer alone.
    """
    one, two = (collections.Counter(_products(setup, remat, tp, num_layers)) for num_layers in (1, 2))
    layer = two - one
    return Work(layer=tuple(layer.elements()), head=tuple((one - layer).elements()))


def kept_bytes(setup: Setup, remat: str, tp: int) -> int:
    """Bytes that a layer keeps of each token for its backward, on devices with the flash kernel."""
    one, two = (_residual_bytes(setup, remat, tp, num_layers) for num_layers in (1, 2))
    statistics = 0 if remat == "full" else 4 * setup.model.num_heads
    return (two - one) // (ROWS * LENGTH) + statistics


def attention_flops(model: LlamaConfig, shape: Shape) -> int:
    """Of one layer's forward: two products of each query with the keys up to its own, on average half of them."""
    rows, length = shape
    return 2 * rows * length * length * model.num_heads * model.head_dim


def _layout(setup: Setup, remat: str, tp: int, layers: range, num_layers: int) -> StageLayout:
    model = dataclasses.replace(setup.model, num_layers=num_layers)
    functions = StageFunctions(
        abstract=abstract_stage(model, layers, setup.dtype),
        sharding=_sharding(setup, tp),
        remat=remat,
        dropout=setup.dropout,
        dora=setup.dora,
        num_tasks=setup.num_tasks,
    )
    return stage_layout(functions, setup.rank, setup.targets)


def _sharding(setup: Setup, tp: int) -> StageSharding:
    return make_submesh(ParallelConfig(tp=tp, pp=1, remat="none"), setup.devices[:tp]).stages[0]


def _products(setup: Setup, remat: str, tp: int, num_layers: int) -> list[Product]:
    layout = _layout(setup, remat, tp, range(num_layers), num_layers)
    batch = layout.batch(ROWS, LENGTH)
    traced = jax.make_jaxpr(layout.functions.fused)(
        layout.adapters, layout.params, layout.adapters, layout.tasks, batch.tokens, batch
    )
    program, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return list(_walk(program))


def _walk(program: Any) -> Iterator[Product]:
    """The products of a program and of those inside it; the loop of the loss runs once for so few tokens."""
    for equation in program.eqns:
        if equation.params.get("branches_platforms"):
            continue  # kernels, and what stands for them elsewhere
        assert equation.primitive.name != "while", "a loop whose runs cannot be counted"
        if equation.primitive.name == "dot_general":
            _, (batch, _) = equation.params["dimension_numbers"]
            if len(batch) < ATTENTION_BATCH_DIMS:
                yield _product(equation, is_low_rank=len(batch) > 0)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)


def _product(equation: Any, *, is_low_rank: bool) -> Product:
    (contracted, _), _ = equation.params["dimension_numbers"]
    operands = [variable.aval for variable in equation.invars]
    result = equation.outvars[0].aval
    depth = math.prod(operands[0].shape[dim] for dim in contracted)
    arrays = [*operands, result]
    of_tokens = [array for array in arrays if LENGTH in array.shape]
    of_rows = [array for array in arrays if is_low_rank and LENGTH not in array.shape]
    return Product(
        token_flops=2 * math.prod(result.shape) * depth / (ROWS * LENGTH),
        token_bytes=sum(map(_bytes, of_tokens)) / (ROWS * LENGTH),
        row_bytes=sum(map(_bytes, of_rows)) / ROWS,
        fixed_bytes=sum(map(_bytes, arrays)) - sum(map(_bytes, of_tokens)) - sum(map(_bytes, of_rows)),
        is_low_rank=is_low_rank,
    )


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _residual_bytes(setup: Setup, remat: str, tp: int, num_layers: int) -> int:
    layout = _layout(setup, remat, tp, range(num_layers), num_layers + 1)
    batch = layout.batch(ROWS, LENGTH)
    forward = functools.partial(layout.functions.forward, Residuals())
    _, kept, _ = jax.eval_shape(forward, layout.params, layout.adapters, layout.tasks, batch.tokens, batch)
    return sum(_bytes(leaf) for leaf in kept if _is_of_tokens(leaf.shape))


def _is_of_tokens(shape: Sequence[int]) -> bool:
    """Whether an array goes with rows x length: scores [.., length, length] do not exist beside a flash kernel."""
    return shape[:1] == (ROWS,) and list(shape).count(LENGTH) == 1
