"""Whether a bench's arithmetic is right: a small step of its kind against one in float32 on one device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lobra_jax.compilation import compile_threads
from lobra_jax.lora import Adapters, task_inputs
from lobra_jax.replica import Replica, ReplicaRun
from planner.plan import ParallelConfig
from profiling.made_up import random_adapters, random_params
from profiling.measure import made_up_batch

if TYPE_CHECKING:
    from profiling.bench.step_case import Case

CHECK_LAYERS = 2
CHECK_SHAPE = (6, 256)
LOSS_TOLERANCE = 0.01
GRADIENT_TOLERANCE = 0.05
"""Of bfloat16 against float32, relative."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A small step in the bench's arithmetic against float32: relative errors of the loss and of all gradients."""

    loss_error: float
    gradient_error: float

    @property
    def passed(self) -> bool:
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE

    def __str__(self) -> str:
        return f"on a small shape loss off float32 by {self.loss_error:.1e}, gradients by {self.gradient_error:.1e}"


def check(cases: Sequence[Case], devices: Sequence[Any]) -> list[Check]:
    """A small step of each case's kind on its devices, against one in float32 on the first of them.

    The cases are of one model, rank and dtype; the model's layers are as few as the most stages allow.
    """
    first = cases[0]
    num_layers = max(CHECK_LAYERS, *(case.config.pp for case in cases))
    model = dataclasses.replace(first.model, num_layers=num_layers)
    rows, length = CHECK_SHAPE
    small = [
        dataclasses.replace(c, model=model, rows=rows, length=length, dropout=0.0, replicas=1, micro_batches=1)
        for c in cases
    ]
    exact = dataclasses.replace(small[0], dtype="float32", config=ParallelConfig(tp=1, pp=1, remat="none"))
    with ThreadPoolExecutor(compile_threads(), thread_name_prefix="check") as executor:
        compiled = list(executor.map(lambda case: _compiled(case, devices), (exact, *small)))
    losses, reference = _one_step(exact, compiled[0])
    return [
        _compared(losses, reference, *_one_step(case, replica))
        for case, replica in zip(small, compiled[1:], strict=True)
    ]


def _compared(expected_losses: np.ndarray, expected: Adapters, losses: np.ndarray, gradients: Adapters) -> Check:
    reference, found = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (expected, gradients))
    return Check(
        loss_error=float(np.abs(losses - expected_losses).sum() / np.abs(expected_losses).sum()),
        gradient_error=float(np.linalg.norm(found - reference) / np.linalg.norm(reference)),
    )


def _compiled(case: Case, devices: Sequence[Any]) -> Replica:
    exact = case.dtype == "float32"
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        replica = case.engine(devices[: case.num_devices]).replicas[0]
        for compile_one in replica.compilations([(case.rows, case.length)]):
            compile_one()
    return replica


def _one_step(case: Case, replica: Replica) -> tuple[np.ndarray, Adapters]:
    """(losses [T], gradients as NumPy) of one micro-batch."""
    batch = made_up_batch(case.setup(()), (case.rows, case.length))
    replica.params = [_rounded(stage, jnp.bfloat16) for stage in random_params(replica)]
    adapters = random_adapters(replica, case.specs)
    placed = [
        {layer: jax.device_put(adapters[layer], pairs) for layer, pairs in _shardings(layout.adapters).items()}
        for layout in replica.layouts
    ]
    run = ReplicaRun(gradients=replica.zero_gradients())
    replica.issue(run, [batch], placed, replica.place_tasks(task_inputs(case.specs)))
    gradients = {layer: pairs for stage in run.gradients for layer, pairs in stage.items()}
    found = np.asarray(run.losses[0]), jax.tree.map(np.asarray, gradients)
    replica.params = []
    return found


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _rounded(params: Any, dtype: Any) -> Any:
    """As if stored in `dtype`."""
    return {name: x.astype(dtype).astype(x.dtype) for name, x in params.items()}
