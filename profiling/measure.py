"""Replicas to be measured: compiles shapes, asks for their bytes, times steps through `Replica.issue`.

Values do not matter to time, so weights, adapters and tokens are cheap made-up ones.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from lobra_jax.at_once import at_once
from lobra_jax.data.batches import MicroBatchArrays
from lobra_jax.devices import cut_up_bytes
from lobra_jax.lora import Adapters, TaskInputs
from lobra_jax.memory import leaf_bytes, memory_bytes, travelling_bytes
from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import EMBEDDING_STD, WeightSource, weight_shapes
from lobra_jax.optim import init_state
from lobra_jax.replica import Replica, ReplicaRun
from planner.lattice import Shape
from planner.plan import ParallelConfig
from profiling.grid import HostShare, host_share
from profiling.made_up import random_like, random_params

FILLER_SIZE = 65_521
"""Random numbers that made-up arrays repeat; a prime, so that rows of a matrix differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and on what.

    Attributes:
      model: base model shape.
      dtype: of weights and activations.
      num_tasks, rank, targets, dropout, dora: of the stacked adapters.
      optimizers: of the tasks, by name.
      averages, last_good: whether any task keeps a moving average, and adapters to go back to.
      devices: those of the run.
      limit_bytes: memory that may be used on each.
      lengths: ascending lengths from which shapes are made.
      max_tokens: the largest micro-batch that is of interest.
      repeats: readings of each shape, fewer for slow ones.
      cores: cores that simulated devices share; None for real accelerators.
      num_threads: compilations at a time.
      packed: measure packed micro-batches too.
      quantization: how the base's linears are stored.
      expected: capacities, in tokens, that are confirmed where they fit instead of being searched.
    """

    model: LlamaConfig
    dtype: Any
    num_tasks: int
    rank: int
    targets: tuple[str, ...]
    dropout: bool
    dora: bool
    optimizers: tuple[str, ...]
    averages: bool
    last_good: bool = False
    devices: Sequence[Any]
    limit_bytes: int
    lengths: tuple[int, ...]
    max_tokens: int
    repeats: int
    cores: int | None
    num_threads: int
    packed: bool = False
    quantization: str = "none"
    expected: Mapping[ParallelConfig, int] = dataclasses.field(default_factory=dict)

    def share(self, config: ParallelConfig) -> HostShare:
        if self.cores is None:
            return HostShare()
        return host_share(config.num_devices, num_devices=len(self.devices), cores=self.cores)


class Filler:
    """A weight source (and maker of any array) that repeats a few random numbers; norms are one."""

    def __init__(self, model: LlamaConfig, seed: int = 0) -> None:
        self._shapes = weight_shapes(model)
        block = np.random.default_rng(seed).standard_normal(FILLER_SIZE, np.float32)
        self._block = block * np.float32(EMBEDDING_STD)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        shape = self.slice_shape(self._shapes[name], index)
        return np.ones(shape, np.float32) if name.endswith("norm") else np.resize(self._block, shape)

    def like(self, spec: jax.ShapeDtypeStruct) -> jax.Array:
        """An array of this shape, dtype and sharding."""
        return jax.make_array_from_callback(
            spec.shape,
            spec.sharding,
            lambda index: np.resize(self._block, self.slice_shape(spec.shape, index)).astype(spec.dtype),
        )

    @staticmethod
    def slice_shape(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
        return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))


class Bench:
    """Replicas of one config on disjoint submeshes, ready to run steps of made-up micro-batches at the same time.

    The submeshes begin at device `first_device` of the setup.
    """

    def __init__(
        self, setup: Setup, config: ParallelConfig, *, copies: int, packed: bool = False, first_device: int = 0
    ) -> None:
        self.setup = setup
        g = config.num_devices
        devices = setup.devices[first_device : first_device + copies * g]
        self.replicas = [
            make_replica(setup, config, index, devices[index * g : (index + 1) * g], packed=packed)
            for index in range(copies)
        ]
        self._adapters: list[list[Adapters]] = []
        self._tasks: list[list[TaskInputs]] = []
        self._issuers = ThreadPoolExecutor(copies, thread_name_prefix="issue")

    def place(self, source: WeightSource | None = None) -> None:
        """Puts weights (made-up ones without a source) and adapters onto the devices; needed before `step_s`, not for
        compiling."""
        on_host = self.setup.cores is not None
        tasks = TaskInputs(
            scales=np.ones(self.setup.num_tasks, np.float32),
            dropout_rates=np.full(self.setup.num_tasks, 0.1 if self.setup.dropout else 0.0, np.float32),
            magnitudes={t: np.ones(self.setup.num_tasks, bool) for t in self.setup.targets}
            if self.setup.dora
            else None,
        )
        for replica in self.replicas:
            if source is None:
                make_up_weights(replica, on_host=on_host)
            else:
                replica.load(source)
            filler = Filler(self.setup.model)
            like = functools.partial(jax.tree.map, filler.like) if on_host else random_like
            self._adapters.append([like(layout.adapters) for layout in replica.layouts])
            self._tasks.append(replica.place_tasks(tasks))

    def compile(self, shapes: Sequence[Shape], *, copies: int) -> None:
        """Compiles shapes for the first `copies` replicas, several at a time."""
        with ThreadPoolExecutor(self.setup.num_threads, thread_name_prefix="compile") as executor:
            futures = [executor.submit(c) for replica in self.replicas[:copies] for c in replica.compilations(shapes)]
            for future in futures:
                future.result()

    def bytes(self, shapes: Sequence[Shape]) -> list[int]:
        """Bytes on the fullest device; compiles what is not compiled yet."""
        self.compile(shapes, copies=1)
        return [memory_bytes(self.replicas[0], shape) for shape in shapes]

    def step_s(self, shape: Shape, num_micro_batches: int) -> float:
        """Seconds of one step of equal micro-batches on all replicas at once, from issuing to the last gradient."""
        return self.run_s([made_up_batch(self.setup, shape)] * num_micro_batches)

    def run_s(self, batches: Sequence[MicroBatchArrays]) -> float:
        """The same of any micro-batches."""
        return self.run(batches)[1]

    def run(self, batches: Sequence[MicroBatchArrays]) -> tuple[list[ReplicaRun], float]:
        """(What every replica computed, seconds) of one step."""
        runs = [ReplicaRun(gradients=replica.zero_gradients()) for replica in self.replicas]
        jax.block_until_ready([run.gradients for run in runs])
        start = time.perf_counter()
        work = zip(self.replicas, runs, self._adapters, self._tasks, strict=True)
        at_once(
            self._issuers,
            [functools.partial(replica.issue, run, batches, *placed) for replica, run, *placed in work],
        )
        jax.block_until_ready([(run.gradients, run.losses) for run in runs])
        return runs, time.perf_counter() - start


def make_up_weights(replica: Replica, *, on_host: bool) -> None:
    """Gives a replica weights of no meaning, on its own devices unless they are to be quantised.

    `on_host` repeats a few numbers instead, which is cheaper where devices are simulated.
    """
    if on_host or replica.quantization != "none":
        replica.load(Filler(replica.model))
    else:
        replica.params = random_params(replica)


def make_replica(
    setup: Setup, config: ParallelConfig, index: int, devices: Sequence[Any], *, packed: bool = False
) -> Replica:
    return Replica(
        index=index,
        model=setup.model,
        submesh=make_submesh(config, devices),
        num_tasks=setup.num_tasks,
        max_rank=setup.rank,
        targets=setup.targets,
        dropout=setup.dropout,
        dora=setup.dora,
        dtype=setup.dtype,
        quantization=setup.quantization,
        packed=packed,
    )


def made_up_batch(setup: Setup, shape: Shape) -> MicroBatchArrays:
    """Random tokens, every one of them a target, tasks in turn over the rows."""
    rows, length = shape
    rng = np.random.default_rng(rows * length)
    tokens, targets = rng.integers(0, setup.model.vocab_size, (2, rows, length), dtype=np.int32)
    return MicroBatchArrays(
        tokens=tokens,
        targets=targets,
        loss_weights=np.full((rows, length), 1 / (rows * length), np.float32),
        task_ids=(np.arange(rows) % setup.num_tasks).astype(np.int32),
        dropout_ids=rng.integers(0, 2**32, rows, dtype=np.uint32),
    )


def fixed_bytes(replica: Replica) -> int:
    """Weights, adapters and gradient sums on the fullest device."""
    return max(leaf_bytes(layout.params) + 2 * leaf_bytes(layout.adapters) for layout in replica.layouts)


def reserve_bytes(setup: Setup, replica: Replica) -> int:
    """Bytes on a device that a step needs beside its programs', whatever the micro-batch.

    Its share of what training keeps: master adapters, optimisers' states, averages and last good adapters where there
    are any (layers go round the devices). On one device alone the master adapters are those that its programs take.
    Else gradients and new adapters travel while programs run, as much as the fullest stage's.
    """
    kept, adapters = kept_bytes(setup, replica), [layout.adapters for layout in replica.layouts]
    of_stage = max(map(leaf_bytes, adapters))
    if len(setup.devices) == 1:
        return kept - of_stage
    return kept + (max(map(travelling_bytes, adapters)) if replica.parallel.tp > 1 else 2 * of_stage)


def program_limit_bytes(setup: Setup, replica: Replica, *, platform: str) -> int:
    """Bytes on a device of that platform for a replica's programs, its weights and adapters among them.

    All but what a step needs beside them and, of several devices, what may lie in gaps too small for use.
    """
    return setup.limit_bytes - reserve_bytes(setup, replica) - cut_up_bytes(platform, len(setup.devices))


def kept_bytes(setup: Setup, replica: Replica) -> int:
    """A device's share of what training keeps, once."""
    adapters = {layer: pairs for layout in replica.layouts for layer, pairs in layout.adapters.items()}
    layer_bytes = max(_state_bytes(setup, pairs) for pairs in adapters.values())
    return -(-len(adapters) // min(len(setup.devices), len(adapters))) * layer_bytes


def _state_bytes(setup: Setup, pairs: Any) -> int:
    """What training keeps of one layer."""
    leaves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pairs)
    moments = jax.eval_shape(lambda pairs: init_state(pairs, setup.num_tasks, setup.optimizers), leaves)
    kept = [leaves, moments, *[leaves] * (setup.last_good + setup.averages)]
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
