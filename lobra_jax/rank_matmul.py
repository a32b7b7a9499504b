"""A matmul that adds what adapters add while it has its result in registers: a Pallas kernel for Hopper GPUs.

XLA makes the low-rank part of an adapted linear as an array of its own, writes it and reads it again, which on an H200
is most of what adapters cost. Here a tile's sum over the base's features goes on over the ranks of the tasks whose
tokens lie in it. Several products can share one sum, as those do in the gradient of what several linears read.

A tile is 256 tokens, counted on through the rows of a micro-batch. Rows are of any length, so a tile may hold tokens of
several rows: each is a step of the sum in which the other tokens' low-rank values are zero. One warpgroup loads while
two multiply, and a block does many tiles, so that loads for one hide behind the products of another.

Shape letters as in `lora`; M tokens, N features that come out, C ranks of a row padded to whole steps, X tiles of
tokens, S rows of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

TILE_TOKENS = 256
"""Of a block: 128 of each of its two multiplying warpgroups."""
TILE_FEATURES = 128
STEP = 64
"""Of the dimension that is summed over, at a time: 128 bytes of bf16, the widest swizzle."""
STEPS_IN_FLIGHT = 4
"""Steps whose operands are in shared memory: 48 KiB each, of 227 KiB."""
STORED = 64
"""Rows and columns of a tile that are stored at a time."""
BAND = 8
"""Tiles of features that neighbouring blocks share, so that both operands stay in the L2 cache."""
LOADING_REGISTERS, MULTIPLYING_REGISTERS = 40, 232
MULTIPLYING = 2
"""Warpgroups of a block that multiply; one more loads."""
HOPPER = "9.0"
GROUP, BLOCK, WARPGROUP = "group", "block", "warpgroup"
"""Axes: clusters of blocks, blocks of a cluster, warpgroups of a block."""
CLUSTER = 2
"""Neighbouring blocks that do the same tokens: each loads half of them for both."""
INTERPRETED = 2
"""Blocks where there is no GPU to say how many processors it has. The interpreter has no clusters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankSteps:
    """The low-rank steps of each tile.

    Attributes:
      h: [M, S * C] bf16, a token's values in its own step, zero in the others.
      factors: [F, C, N], or [F, N, C] for a transposed product, bf16.
      which: [X * S] int32, the factors of each tile's steps.
    """

    h: Array
    factors: Array
    which: Array


def runs_here() -> bool:
    """Whether the devices of this process have what the kernel is made of."""
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == HOPPER


def takes(dtype: Any, *features: int) -> bool:
    """Whether activations of this dtype, and linears between these numbers of features, suit the kernel."""
    return dtype == jnp.bfloat16 and all(n % (CLUSTER * TILE_FEATURES) == 0 for n in features)


def _num_processors() -> int:
    return jax.devices()[0].core_count


def rank_steps(h_BLKR: Array, factors_TRN: Array, task_ids_BK: Array, *, transposed: bool) -> RankSteps:
    """Sorts the tokens' low-rank values into the steps of their tiles; a row's slots go together.

    The kernel looks factors up by task where rows have one slot and there are not fewer of them than tasks; else they
    are looked up by row before it.
    """
    b, length, num_slots, rank = h_BLKR.shape
    num_tasks, _, n = factors_TRN.shape
    first_row_X, step_M, num_steps = _steps(b, length)
    row_XS = np.minimum(first_row_X[:, None] + np.arange(num_steps)[None], b - 1)
    factors = factors_TRN.astype(h_BLKR.dtype)
    if num_slots == 1 and num_tasks <= b:
        which = task_ids_BK[:, 0][row_XS]
    else:
        which, factors = jnp.asarray(row_XS, jnp.int32), factors[task_ids_BK].reshape(b, num_slots * rank, n)
    h = h_BLKR.reshape(b * length, 1, num_slots * rank)
    if num_steps > 1:
        h = jnp.where(step_M[:, None, None] == np.arange(num_steps)[None, :, None], h, jnp.zeros_like(h))
    padding = -(num_slots * rank) % STEP
    factors = jnp.pad(factors, ((0, 0), (0, padding), (0, 0)))
    return RankSteps(
        h=jnp.pad(h, ((0, 0), (0, 0), (0, padding))).reshape(b * length, -1),
        factors=jnp.swapaxes(factors, 1, 2) if transposed else factors,
        which=which.reshape(-1),
    )


@functools.cache
def _steps(rows: int, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(each tile's first row [X], which of its tile's rows a token [M] lies in, the most rows in a tile)."""
    tokens = np.arange(rows * length)
    first_row_X = tokens[::TILE_TOKENS] // length
    step_M = tokens // length - first_row_X[tokens // TILE_TOKENS]
    return first_row_X, step_M, int(step_M.max()) + 1


def matmul(
    lhs: Sequence[Array], rhs: Sequence[Array], ranks: RankSteps | None, *, transposed: bool, interpret: Any = False
) -> Array:
    """[M, N] bf16: the sum of lhs_j rhs_j, and of each token's low-rank values with its own factors.

    Args:
      lhs: [M, K_j] bf16.
      rhs: [K_j, N] bf16, or [N, K_j] with `transposed`.
      interpret: Pallas' parameters to run it without a GPU, for tests.
    """
    (m, _), n = lhs[0].shape, rhs[0].shape[0 if transposed else 1]
    blocks, cluster = (INTERPRETED, 1) if interpret else (_num_processors(), CLUSTER)
    grid = _Grid(tokens=m, features=n, clusters=blocks // cluster, cluster=cluster)
    spans = [_Span(depth=a.shape[1]) for a in lhs]
    inputs = [*lhs, *rhs]
    if ranks is not None:
        depth = ranks.factors.shape[2 if transposed else 1]
        spans.append(_Span(depth=depth, repeats=ranks.h.shape[1] // depth))
        inputs = [*lhs, ranks.h, *rhs, ranks.factors, ranks.which]
    return _kernel(grid, tuple(spans), ranks is not None, transposed, interpret)(*inputs)


@functools.cache
def _kernel(grid: _Grid, spans: tuple[_Span, ...], has_ranks: bool, transposed: bool, interpret: Any) -> Any:
    """Jitted, and one for all linears of the same shape: a program then traces and lowers it once."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    body = functools.partial(_body, grid=grid, spans=spans, has_ranks=has_ranks, transposed=transposed)
    swizzled = {"transforms": (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(2 * STEP))}
    rhs_tile = (TILE_FEATURES, STEP) if transposed else (STEP, TILE_FEATURES)
    used = functools.partial(plgpu.ClusterBarrier, collective_axes=(BLOCK,)) if grid.cluster > 1 else plgpu.Barrier

    def rank_matmul(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(body, refs),
            plgpu.SMEM((STEPS_IN_FLIGHT, TILE_TOKENS, STEP), jnp.bfloat16, **swizzled),
            plgpu.SMEM((STEPS_IN_FLIGHT, *rhs_tile), jnp.bfloat16, **swizzled),
            plgpu.SMEM((MULTIPLYING, 2, STORED, STORED), jnp.bfloat16, **swizzled),
            plgpu.Barrier(num_arrivals=2, num_barriers=STEPS_IN_FLIGHT),
            used(num_arrivals=MULTIPLYING, num_barriers=STEPS_IN_FLIGHT),
            collective_axes=WARPGROUP,
        )

    clustered = {"cluster": (grid.cluster,), "cluster_names": (BLOCK,)} if grid.cluster > 1 else {}
    return jax.jit(
        plgpu.kernel(
            rank_matmul,  # traces have its name
            out_type=jax.ShapeDtypeStruct((grid.tokens, grid.features), jnp.bfloat16),
            grid=(grid.clusters,),
            grid_names=(GROUP,),
            num_threads=MULTIPLYING + 1,
            thread_name=WARPGROUP,
            **clustered,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=interpret,
        )
    )


@dataclasses.dataclass(frozen=True)
class _Span:
    """Steps over one operand pair: `depth` features, `repeats` times with other factors."""

    depth: int
    repeats: int = 1

    @property
    def num_steps(self) -> int:
        return self.depth * self.repeats // STEP


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Tiles of the result, and how many clusters of blocks share them out."""

    tokens: int
    features: int
    clusters: int
    cluster: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a cluster."""
        return -(-self.tokens // TILE_TOKENS), self.features // (self.cluster * TILE_FEATURES)

    def turns(self) -> Array:
        """How many tiles are this block's."""
        first = lax.axis_index(GROUP)
        return lax.div(self.tiles[0] * self.tiles[1] - first + self.clusters - 1, jnp.int32(self.clusters))

    def place(self, turn: Array) -> tuple[Array, Array]:
        """(tile of tokens, tile of features) that this block does at a turn."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        tile = lax.axis_index(GROUP) + turn * self.clusters
        token_tile, feature_tile = plgpu.planar_snake(tile, self.tiles, 1, BAND)
        if self.cluster > 1:
            feature_tile = feature_tile * self.cluster + lax.axis_index(BLOCK)
        return token_tile, feature_tile


def _body(
    refs: Sequence[Any],
    lhs_tiles: Any,
    rhs_tiles: Any,
    out_tiles: Any,
    loaded: Any,
    used: Any,
    *,
    grid: _Grid,
    spans: Sequence[_Span],
    has_ranks: bool,
    transposed: bool,
) -> None:
    """What each warpgroup of a block does; `loaded` and `used` are barriers by step in flight."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    count = len(spans)
    lhs, rhs, which, out = refs[:count], refs[count : 2 * count], refs[2 * count], refs[-1]
    warpgroup = lax.axis_index(WARPGROUP)
    num_steps = sum(span.num_steps for span in spans)

    shared = {"collective_axes": BLOCK} if grid.cluster > 1 else {}

    def buffer(step: Array) -> Array:
        return lax.rem(step, jnp.int32(STEPS_IN_FLIGHT))

    @pl.when(warpgroup == MULTIPLYING)
    def load() -> None:
        plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

        def load_tile(turn: Array, step: Array) -> Array:
            token_tile, feature_tile = grid.place(turn)
            tokens = pl.ds(token_tile * TILE_TOKENS, TILE_TOKENS)
            features = pl.ds(feature_tile * TILE_FEATURES, TILE_FEATURES)
            for index, span in enumerate(spans):
                of_ranks = has_ranks and index == count - 1

                def load_step(
                    k: Array, step: Array, *, index: int = index, span: _Span = span, ranks: bool = of_ranks
                ) -> Array:
                    to = buffer(step)

                    @pl.when(step >= STEPS_IN_FLIGHT)
                    def wait() -> None:
                        plgpu.barrier_wait(used.at[to])

                    left = pl.ds(k * STEP, STEP)
                    plgpu.copy_gmem_to_smem(lhs[index].at[tokens, left], lhs_tiles.at[to], loaded.at[to], **shared)
                    right, source = left, rhs[index]
                    if ranks:
                        repeat = lax.div(k, jnp.int32(span.depth // STEP))
                        source = source.at[which[token_tile * span.repeats + repeat]]
                        right = pl.ds(lax.rem(k, jnp.int32(span.depth // STEP)) * STEP, STEP)
                    at = (features, right) if transposed else (right, features)
                    plgpu.copy_gmem_to_smem(source.at[at], rhs_tiles.at[to], loaded.at[to])
                    return step + 1

                step = lax.fori_loop(0, span.num_steps, load_step, step)
            return step

        total = lax.fori_loop(0, grid.turns(), load_tile, jnp.int32(0))
        for last in range(STEPS_IN_FLIGHT, 0, -1):

            @pl.when(total >= last)
            def wait(last: int = last) -> None:
                plgpu.barrier_wait(used.at[buffer(total - last)])

    @pl.when(warpgroup < MULTIPLYING)
    def multiply() -> None:
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        own_tokens = TILE_TOKENS // MULTIPLYING

        def multiply_tile(turn: Array, first: Array) -> Array:
            def add_up(total: Any) -> Array:
                def add(k: Array, _: None) -> None:
                    at = buffer(first + k)
                    plgpu.barrier_wait(loaded.at[at])
                    right = rhs_tiles.at[at]
                    plgpu.wgmma(
                        total,
                        lhs_tiles.at[at, pl.ds(warpgroup * own_tokens, own_tokens)],
                        right.transpose((1, 0)) if transposed else right,
                    )
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(used.at[at])

                lax.fori_loop(0, num_steps, add, None)
                return total[...]

            total = pl.run_scoped(add_up, plgpu.ACC((own_tokens, TILE_FEATURES), jnp.float32)).astype(jnp.bfloat16)
            token_tile, feature_tile = grid.place(turn)
            for number, part in enumerate(np.ndindex(own_tokens // STORED, TILE_FEATURES // STORED)):
                row, column = (int(i) * STORED for i in part)
                piece = out_tiles.at[warpgroup, number % 2]  # the other one may be on its way
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                piece[...] = total[row : row + STORED, column : column + STORED]
                plgpu.commit_smem()
                to_row = token_tile * TILE_TOKENS + warpgroup * own_tokens + row
                to_column = feature_tile * TILE_FEATURES + column
                plgpu.copy_smem_to_gmem(piece, out.at[pl.ds(to_row, STORED), pl.ds(to_column, STORED)])
            return first + num_steps

        lax.fori_loop(0, grid.turns(), multiply_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
