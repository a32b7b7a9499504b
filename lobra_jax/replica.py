"""One replica: the base model on one submesh, its compiled programs, and the issuing of one step's micro-batches.

Knows nothing of other replicas, of data sets or of the optimiser.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from lobra_jax.data.batches import MicroBatchArrays, Segments
from lobra_jax.lora import Adapters, TaskInputs
from lobra_jax.mesh import Submesh, check_model_fits, split_layers
from lobra_jax.models.config import LlamaConfig, check_quantization
from lobra_jax.models.llama import abstract_stage
from lobra_jax.models.quantized import SCALE, block_dim, dequantized, quantized
from lobra_jax.models.weights import WeightSource
from lobra_jax.out_of_memory import blaming
from lobra_jax.packed import SegmentInputs
from lobra_jax.program_names import GRADIENT_SUM, named
from lobra_jax.schedule import BACKWARD, FORWARD, Action, issue_order, one_f_one_b
from lobra_jax.sharding import TARGET_AXES
from lobra_jax.stage import (
    BatchInputs,
    StageFunctions,
    StageLayout,
    StageProgram,
    compile_evaluation,
    compile_training,
    stage_layout,
)
from lobra_jax.watch import Watch
from planner.lattice import Shape

LOAD_THREADS = 4
"""Weights read at once: as many are held by the host, once as stored and once as placed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Issued:
    """An action handed to the devices, from `handed_at` (`perf_counter` seconds) on; `done` is a small output that is
    ready when the action is."""

    action: Action
    shape: Shape
    handed_at: float
    done: Array


@dataclasses.dataclass(kw_only=True)
class ReplicaRun:
    """One step of one replica, filled while it is issued: gradient sums by stage, losses [T] by micro-batch.

    `watch` is told of each action as soon as it was issued, if there is one. `first_runs` counts shapes whose programs
    had not run before, which takes longer.
    """

    gradients: list[Adapters]
    watch: Watch | None = None
    losses: list[Array] = dataclasses.field(default_factory=list)
    issued: list[Issued] = dataclasses.field(default_factory=list)
    first_runs: int = 0

    def note(self, issued: Issued) -> None:
        self.issued.append(issued)
        if self.watch is not None:
            self.watch.add(issued.action.stage, issued.done)


class Replica:
    """The base model on one submesh.

    Args:
      index: the replica's number in the plan.
      model: the base model's shape.
      submesh: its devices.
      num_tasks: tasks stacked in the adapters.
      max_rank: padded rank of the adapters.
      targets: linears that have adapters.
      dropout: whether any task uses LoRA dropout.
      dora: whether any task uses DoRA.
      dtype: of the base weights and activations.
      quantization: how the layers' linears are stored: none, int8, nf4 or fp8.
      packed: whether its training programs take packed rows.
    """

    def __init__(
        self,
        *,
        index: int,
        model: LlamaConfig,
        submesh: Submesh,
        num_tasks: int,
        max_rank: int,
        targets: Sequence[str],
        dropout: bool,
        dora: bool = False,
        dtype: Any,
        quantization: str = "none",
        packed: bool = False,
    ) -> None:
        check_model_fits(model, submesh.parallel)
        check_quantization(model, quantization)
        self.index = index
        self.model = model
        self.quantization = quantization
        self.packed = packed
        self.parallel = submesh.parallel
        self.submesh = submesh
        self.stage_layers = split_layers(model, submesh.parallel.pp)
        self.layouts: tuple[StageLayout, ...] = tuple(
            stage_layout(
                StageFunctions(
                    abstract=abstract_stage(model, layers, dtype, quantization),
                    sharding=dataclasses.replace(sharding, by_rows=not (dropout or dora)),
                    remat=submesh.parallel.remat,
                    dropout=dropout,
                    dora=dora,
                    num_tasks=num_tasks,
                ),
                max_rank,
                targets,
            )
            for layers, sharding in zip(self.stage_layers, submesh.stages, strict=True)
        )
        self.params: list[dict[str, Array]] = []
        self._training: dict[Shape, tuple[StageProgram, ...]] = {}
        self._remats: dict[Shape, str] = {}
        self._evaluation: dict[Shape, tuple[jax.stages.Compiled, ...]] = {}
        self._have_run: set[Shape] = set()
        self._lock = threading.Lock()
        self._zeros = [
            jax.jit(
                named(functools.partial(_zeros, layout), GRADIENT_SUM, "zeros"),
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, layout.adapters),
            )
            for layout in self.layouts
        ]

    def __str__(self) -> str:
        return f"replica {self.index} {self.parallel}"

    def load(self, source: WeightSource) -> None:
        """Reads each weight straight into the shards of its stage, a few weights at a time.

        What is quantised is so on its devices, weight by weight, from `dtype` as it would be without.
        """
        quantising = threading.Lock()

        def read(layout: StageLayout, name: str) -> dict[str, Array]:
            spec = layout.params[name]
            is_quantised = name + SCALE in layout.params
            target = name.rpartition(".")[2]
            shape = self.model.target_shapes[target] if is_quantised else spec.shape
            weight = jax.make_array_from_callback(
                shape, spec.sharding, lambda index: source.read(name, index).astype(layout.dtype, copy=False)
            )
            if not is_quantised:
                return {name: weight}
            shardings = (spec.sharding, layout.params[name + SCALE].sharding)
            # One at a time: programs on several devices must start in the same order on all.
            with quantising:
                made = _quantiser(self.quantization, block_dim(TARGET_AXES[target]), shardings)(weight)
                values, scale = jax.block_until_ready(made)
            return {name: values, name + SCALE: scale}

        with ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="load") as executor:
            futures = [
                [executor.submit(read, layout, name) for name in layout.params if not name.endswith(SCALE)]
                for layout in self.layouts
            ]
            self.params = [
                {name: array for future in stage for name, array in future.result().items()} for stage in futures
            ]

    def copy_weights(self, other: Replica) -> None:
        """Takes the weights of a replica of the same width and stages, from device to device."""
        self.params = [
            {name: jax.device_put(array, layout.params[name].sharding) for name, array in params.items()}
            for layout, params in zip(self.layouts, other.params, strict=True)
        ]

    def column_norms(self, targets: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """layer -> target -> [out] float32: norms of the base's columns, where DoRA's magnitudes start.

        Those of the weights as they are read back where they are quantised.
        """

        def norm(layout: StageLayout, params: dict[str, Array], name: str) -> np.ndarray:
            dim = block_dim(TARGET_AXES[name.rpartition(".")[2]])
            return np.asarray(_norms(params[name], params.get(name + SCALE), self.quantization, dim, layout.dtype))

        return {
            str(layer): {target: norm(layout, params, f"layers.{layer}.{target}") for target in targets}
            for layout, layers, params in zip(self.layouts, self.stage_layers, self.params, strict=True)
            for layer in layers
        }

    def compilations(
        self,
        shapes: Sequence[Shape],
        evaluation_shapes: Sequence[Shape] = (),
        *,
        remat_of: Callable[[int], str] | None = None,
    ) -> list[Callable[[], object]]:
        """What is left to compile for these shapes, as calls that may run in parallel; all must run before a step.

        `remat_of` tells the policy of each length where the replica has several.
        """
        remats = {shape: self.parallel.remat if remat_of is None else remat_of(shape[1]) for shape in shapes}
        return [
            *(
                functools.partial(self._compile_training, shape, remat)
                for shape, remat in remats.items()
                if self._remats.get(shape) != remat
            ),
            *(
                functools.partial(self._compile_evaluation, shape)
                for shape in evaluation_shapes
                if shape not in self._evaluation
            ),
            *(lambda zeros=zeros: jax.block_until_ready(zeros()) for zeros in self._zeros),
        ]

    def _compile_training(self, shape: Shape, remat: str) -> None:
        with blaming(self.index, shape):
            programs = tuple(
                compile_training(layout.with_remat(remat), *shape, packed=self.packed) for layout in self.layouts
            )
        with self._lock:
            self._training[shape], self._remats[shape] = programs, remat
            self._have_run.discard(shape)

    def _compile_evaluation(self, shape: Shape) -> None:
        with blaming(self.index, shape):
            programs = tuple(compile_evaluation(layout, *shape) for layout in self.layouts)
        with self._lock:
            self._evaluation[shape] = programs

    @property
    def training_shapes(self) -> list[Shape]:
        """Those that are compiled."""
        return list(self._training)

    def training_programs(self, shape: Shape) -> tuple[StageProgram, ...]:
        """The compiled programs of a shape, by stage; KeyError unless compiled."""
        return self._training[shape]

    def empty_micro_batch(self, shape: Shape) -> MicroBatchArrays:
        """One without any weight: it runs the shape's training programs and adds nothing to a gradient."""
        first, last = (layout.batch(*shape, packed=self.packed) for layout in (self.layouts[0], self.layouts[-1]))

        def zeros(leaf: jax.ShapeDtypeStruct | None) -> np.ndarray:
            return np.zeros(leaf.shape, leaf.dtype)

        segments = first.segments
        return MicroBatchArrays(
            tokens=zeros(first.tokens),
            targets=zeros(last.targets),
            loss_weights=zeros(last.loss_weights),
            task_ids=zeros(first.task_ids),
            dropout_ids=zeros(first.dropout_ids),
            segments=None if segments is None else Segments(**{k: zeros(leaf) for k, leaf in vars(segments).items()}),
        )

    def zero_gradients(self) -> list[Adapters]:
        with blaming(self.index):
            return [zeros() for zeros in self._zeros]

    def place_tasks(self, tasks: TaskInputs) -> list[TaskInputs]:
        """Puts per-task values [T] onto every stage."""
        return [jax.device_put(tasks, layout.functions.sharding.replicated) for layout in self.layouts]

    def place_batch(self, arrays: MicroBatchArrays) -> list[BatchInputs]:
        """Puts a micro-batch where it is needed: tokens on the first stage, targets and weights on the last."""
        placed = []
        packed = arrays.segments
        segments = None if packed is None else SegmentInputs(**vars(packed))
        for layout in self.layouts:
            f = layout.functions
            batch = BatchInputs(
                task_ids=arrays.task_ids,
                dropout_ids=arrays.dropout_ids,
                tokens=arrays.tokens if f.is_first else None,
                targets=arrays.targets if f.is_last else None,
                loss_weights=arrays.loss_weights if f.is_last else None,
                segments=segments,
            )
            placed.append(jax.device_put(batch, f.sharding.replicated))
        return placed

    def issue(
        self,
        run: ReplicaRun,
        micro_batches: Sequence[MicroBatchArrays],
        adapters: Sequence[Adapters],
        tasks: Sequence[TaskInputs],
    ) -> None:
        """Issues one step in 1F1B order.

        Args:
          run: receives gradients (added to what is there), losses and the issued actions.
          micro_batches: the step's micro-batches, the most expensive first; may be empty.
          adapters: by stage, placed as the stage's layout says.
          tasks: by stage.

        Raises:
          OutOfMemoryError: a device had no room for a micro-batch, as far as issuing it tells.
        """
        batches: dict[int, list[BatchInputs]] = {}
        inputs: dict[tuple[int, int], Array] = {}
        residuals: dict[tuple[int, int], Any] = {}
        cotangents: dict[tuple[int, int], Array] = {}
        for action in issue_order(one_f_one_b(self.parallel.pp, len(micro_batches))):
            stage, m = action.stage, action.micro_batch
            shape: Shape = micro_batches[m].tokens.shape
            label = f"replica {self.index} stage {stage} {action.phase} {m}"
            handed_at = time.perf_counter()
            with blaming(self.index, shape), jax.profiler.TraceAnnotation(label):
                program = self._training[shape][stage]
                if m not in batches:
                    batches[m] = self.place_batch(micro_batches[m])
                    run.first_runs += shape not in self._have_run
                    self._have_run.add(shape)
                batch = batches[m][stage]
                fixed = (self.params[stage], adapters[stage], tasks[stage])
                if action.phase == BACKWARD:
                    dy = cotangents.pop((stage, m))
                    run.gradients[stage], dx, done = program.backward(
                        run.gradients[stage], *fixed, batch, residuals.pop((stage, m)), dy
                    )
                    self._send_back(cotangents, stage, m, shape, dx)
                else:
                    x = batch.tokens if stage == 0 else inputs.pop((stage, m))
                    if action.phase == FORWARD:
                        y, residuals[stage, m], done = program.forward(*fixed, x, batch)
                        following = self.layouts[stage + 1].hidden(*shape).sharding
                        inputs[stage + 1, m] = jax.device_put(y, following)
                    else:
                        run.gradients[stage], dx, done = program.fused(run.gradients[stage], *fixed, x, batch)
                        run.losses.append(done)
                        self._send_back(cotangents, stage, m, shape, dx)
                run.note(Issued(action=action, shape=shape, handed_at=handed_at, done=done))
                if stage == 0 and action.phase != FORWARD:
                    del batches[m]

    def _send_back(self, cotangents: dict, stage: int, micro_batch: int, shape: Shape, dx: Array | None) -> None:
        if stage > 0:
            target = self.layouts[stage - 1].hidden(*shape).sharding
            cotangents[stage - 1, micro_batch] = jax.device_put(dx, target)

    def evaluate(self, arrays: MicroBatchArrays, adapters: Sequence[Adapters], tasks: Sequence[TaskInputs]) -> Array:
        """Losses [T] of one micro-batch, forward only, without dropout."""
        shape: Shape = arrays.tokens.shape
        batches = self.place_batch(arrays)
        x = batches[0].tokens
        for stage, program in enumerate(self._evaluation[shape]):
            if stage > 0:
                x = jax.device_put(x, self.layouts[stage].hidden(*shape).sharding)
            x = program(self.params[stage], adapters[stage], tasks[stage], x, batches[stage])
        return x


def _zeros(layout: StageLayout) -> Adapters:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout.adapters)


@functools.cache
def _quantiser(kind: str, dim: int, shardings: tuple[NamedSharding, NamedSharding]) -> Callable[[Array], Any]:
    return jax.jit(functools.partial(quantized, kind=kind, dim=dim), out_shardings=shardings)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _norms(weight_IO: Array, scale: Array | None, quantization: str, dim: int, dtype: Any) -> Array:
    if scale is not None:
        weight_IO = dequantized(weight_IO, scale, quantization, dim, dtype)
    return jnp.sqrt(jnp.sum(jnp.square(weight_IO.astype(jnp.float32)), axis=0))
