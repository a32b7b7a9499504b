"""The cases of `lobra bench step`: engines over shared random weights, compiled together, run one by one."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lobra_jax.compilation import compile_threads
from lobra_jax.devices import peak_bytes
from lobra_jax.engine import Engine, ReplicaBatches
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.loss import weighted_row_losses
from lobra_jax.memory import memory_bytes
from lobra_jax.models.config import LlamaConfig
from lobra_jax.optim import HyperInputs, TaskOptimizer, step_inputs
from lobra_jax.out_of_memory import NoRoomForUpdateError, OutOfMemoryError
from lobra_jax.replica import Replica
from lobra_jax.stage import BatchInputs
from lobra_jax.step_times import StepResult
from lobra_jax.tracing import traced
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from profiling.bench.ceiling import floor_flops, matmul_rate
from profiling.bench.step_check import check
from profiling.made_up import random_adapters, random_params
from profiling.measure import Setup, kept_bytes, made_up_batch, reserve_bytes
from profiling.trace.summary import summarise

NUM_WARM_UPS = 2
TRACED_STEPS, TOP_KERNELS = 3, 12
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step to time.

    Attributes:
      replicas: of `config`, each with `micro_batches` of `rows` x `length` a step.
      ranks: of the adapters, one each task.
    """

    model: LlamaConfig
    dtype: str
    config: ParallelConfig
    replicas: int
    rows: int
    length: int
    micro_batches: int
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    dropout: float

    def __str__(self) -> str:
        ranks = f"rank {self.ranks[0]}" if len(set(self.ranks)) == 1 else f"ranks {min(self.ranks)}-{max(self.ranks)}"
        slots = f"{self.micro_batches}x " if self.micro_batches > 1 else ""
        return f"{self.replicas}x{self.config} {slots}{self.rows}x{self.length}, {len(self.ranks)} tasks of {ranks}"

    @property
    def base(self) -> tuple[ParallelConfig, int, int]:
        """What cases of the same frozen base have in common."""
        return self.config, self.rows, self.length

    @property
    def num_devices(self) -> int:
        return self.replicas * self.config.num_devices

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.replicas * self.micro_batches * self.rows * self.length

    @property
    def described(self) -> dict[str, Any]:
        """What a row of results says of it."""
        return {
            "case": str(self),
            "model": self.model.name,
            "num_layers": self.model.num_layers,
            "dtype": self.dtype,
            "tp": self.config.tp,
            "pp": self.config.pp,
            "remat": self.config.remat,
            "replicas": self.replicas,
            "rows": self.rows,
            "length": self.length,
            "micro_batches": self.micro_batches,
            "ranks": list(self.ranks),
            "targets": list(self.targets),
            "dropout": self.dropout,
        }

    @property
    def plan(self) -> Plan:
        group = ReplicaGroup(count=self.replicas, config=self.config, capacity_tokens=self.rows * self.length)
        return Plan(model=self.model.name, num_devices=self.num_devices, replicas=(group,), buckets=(self.length,))

    @property
    def specs(self) -> list[LoraSpec]:
        return [LoraSpec(rank=r, alpha=r, targets=self.targets, dropout=self.dropout) for r in self.ranks]

    def setup(self, devices: Sequence[Any]) -> Setup:
        """As `lobra profile` would measure it."""
        return Setup(
            model=self.model,
            dtype=jnp.dtype(self.dtype),
            num_tasks=len(self.ranks),
            rank=max(self.ranks),
            targets=self.targets,
            dropout=self.dropout > 0,
            dora=False,
            optimizers=("adamw",),
            averages=False,
            devices=devices,
            limit_bytes=0,
            lengths=(self.length,),
            max_tokens=self.rows * self.length,
            repeats=1,
            cores=None,
            num_threads=1,
        )

    def engine(self, devices: Sequence[Any]) -> Engine:
        return Engine(self.plan, self.model, self.specs, dtype=jnp.dtype(self.dtype), devices=devices)


class Bench:
    """Cases of one (tp, pp), model and dtype; their engines are compiled side by side, their weights shared.

    Raises:
      UserError: fewer devices than the cases need.
    """

    def __init__(self, cases: Sequence[Case], *, steps: int, trace: Path | None) -> None:
        first = cases[0]
        present = jax.devices()
        if first.num_devices > len(present):
            raise UserError(
                "more devices than there are",
                key="--tp x --pp x --replicas",
                value=first.num_devices,
                expected=f"at most {len(present)} ({present[0].device_kind})",
            )
        self._devices = present[: first.num_devices]
        self.devices = f"{len(self._devices)} x {present[0].device_kind}"
        self._steps, self._trace = steps, trace
        (self.check,) = check([first], self._devices)
        self._engines = [(case, case.engine(self._devices)) for case in cases]
        self._bases: dict[tuple[ParallelConfig, int, int], jax.stages.Compiled] = {}
        self._compile_s = self._compile()
        self._params = [random_params(replica) for replica in self._engines[0][1].replicas]
        self._rates: dict[int, float] = {}

    def _compile(self) -> list[float]:
        """Seconds of each case; all at once, the frozen bases beside them, so that the cores are used."""

        def compile_one(entry: tuple[Case, Engine]) -> float:
            case, engine = entry
            start = time.perf_counter()
            shapes = [[(case.rows, case.length)]] * case.replicas
            for _ in engine.compile(shapes, [()] * case.replicas, num_threads=case.replicas):
                pass
            return time.perf_counter() - start

        bases = {case.base: (case, engine) for case, engine in self._engines if case.config.pp == 1}
        with ThreadPoolExecutor(compile_threads(), thread_name_prefix="case") as executor:
            seconds = executor.map(compile_one, self._engines)
            programs = executor.map(self._compile_base, *zip(*bases.values(), strict=True)) if bases else ()
            self._bases = dict(zip(bases, programs, strict=True))
            return list(seconds)

    def _compile_base(self, case: Case, engine: Engine) -> jax.stages.Compiled:
        """A micro-batch of the frozen base alone, with the gradients of all its inputs."""
        replica = engine.replicas[0]
        batch = replica.layouts[0].batch(case.rows, case.length)
        run = jax.jit(functools.partial(_base_loss_and_gradient, replica))
        options = replica.layouts[0].functions.sharding.compiler_options
        return run.lower(replica.layouts[0].params, batch).compile(options)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The cases' results, the smallest first: a peak is known where it is above those before."""
        entries = []
        for (case, engine), compile_s in zip(self._engines, self._compile_s, strict=True):
            entries.append((predicted_bytes(case, engine, self._devices), case, engine, compile_s))
        self._engines.clear()
        entries.sort(key=lambda entry: entry[0])
        while entries:
            predicted, case, engine, compile_s = entries.pop(0)
            tokens = case.rows * case.length
            if tokens not in self._rates:
                self._rates[tokens] = matmul_rate(case.model, tokens, jnp.dtype(case.dtype), tp=case.config.tp)
            base_s = self._base_s(case, engine.replicas[0]) * case.micro_batches if case.base in self._bases else None
            yield self._row(case, engine, predicted, compile_s, base_s)
            del engine

    def _row(
        self, case: Case, engine: Engine, predicted: int, compile_s: float, base_s: float | None
    ) -> dict[str, Any]:
        before = peak_bytes(self._devices)
        try:
            results, issue_s = run_case(case, engine, self._params, steps=self._steps)
            trace = None if self._trace is None else _traced(case, engine, self._trace)
        except (OutOfMemoryError, NoRoomForUpdateError) as error:
            return {**case.described, "predicted_bytes": predicted, "out_of_memory": str(error)}
        after = peak_bytes(self._devices)
        step_s = statistics.median(result.total_s for result in results)
        flops = floor_flops(case.model, case.rows, case.length) * case.micro_batches * case.replicas / case.num_devices
        rate = self._rates[case.rows * case.length]
        return {
            **case.described,
            "step_s": step_s,
            "all_step_s": [result.total_s for result in results],
            "execute_s": statistics.median(result.execute_s for result in results),
            "sum_update_s": statistics.median(result.sum_update_s for result in results),
            "base_s": base_s,
            "tokens_per_s_per_device": case.tokens / step_s / case.num_devices,
            "floor_flops_per_device": flops,
            "floor_flop_rate": flops / step_s,
            "matmul_rate": rate,
            "share_of_ceiling": flops / step_s / rate,
            "predicted_bytes": predicted,
            "peak_bytes": after if after is not None and (before is None or after > before) else None,
            "compile_s": compile_s,
            "host_late_s_per_micro_batch": late_s(results) / case.micro_batches,
            "issue_s_per_micro_batch": issue_s / (case.micro_batches * case.replicas),
            "loss": float(results[-1].losses[0]),
            **({} if trace is None else {"trace": trace}),
        }

    def _base_s(self, case: Case, replica: Replica) -> float:
        """Seconds of a micro-batch of the frozen base alone, each issued while the one before runs, as steps are."""
        batch = replica.place_batch(made_up_batch(case.setup(self._devices), (case.rows, case.length)))[0]
        run = self._bases[case.base]
        ends = []
        before = run(self._params[0][0], batch)
        for _ in range(NUM_WARM_UPS + self._steps):
            following = run(self._params[0][0], batch)
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
            before = following
        return statistics.median(np.diff(ends)[NUM_WARM_UPS - 1 :])


def run_case(case: Case, engine: Engine, params: Sequence[Any], *, steps: int) -> tuple[list[StepResult], float]:
    """Places `params`, by replica, and random adapters; warms up and times.

    Returns:
      (timed steps, median seconds that the host took to issue one).
    """
    for replica, own in zip(engine.replicas, params, strict=True):
        replica.params = own
    engine.set_state(engine.gradient_sum.init(random_adapters(engine.replicas[0], case.specs)))
    engine.warm_up()
    batches, hyper = case_inputs(case)
    for _ in range(NUM_WARM_UPS):
        engine.finish(engine.issue(batches, hyper))
    return _steps_of(engine, batches, hyper, steps)


def late_s(results: Sequence[StepResult]) -> float:
    """Seconds of a step, the median, that the stage which waited longest for the host to hand it work did so."""
    return statistics.median(max(result.late_s) for result in results)


def case_inputs(case: Case, micro_batches: int | None = None) -> tuple[ReplicaBatches, HyperInputs]:
    """What `Engine.issue` takes for a step of the case, or of another number of its micro-batches."""
    batch = made_up_batch(case.setup(()), (case.rows, case.length))
    optimizer = TaskOptimizer(
        learning_rates=np.full(1, LEARNING_RATE, np.float32),
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
    )
    hyper = step_inputs([optimizer] * len(case.ranks), [0] * len(case.ranks))
    return [[batch] * (micro_batches or case.micro_batches)] * case.replicas, hyper


def _steps_of(
    engine: Engine, batches: ReplicaBatches, hyper: HyperInputs, count: int
) -> tuple[list[StepResult], float]:
    """As a training loop runs them: a step is issued before the one before it is waited for. As `run_case`."""
    results, issue_s = [], []
    pending = None
    for number in range(1, count + 1):
        start = time.perf_counter()
        following = engine.issue(batches, hyper, step=number)
        issue_s.append(time.perf_counter() - start - following.settle_s)
        if pending is not None:
            results.append(engine.finish(pending))
        pending = following
    assert pending is not None, "no step"
    results.append(engine.finish(pending))
    return results, statistics.median(issue_s)


def _traced(case: Case, engine: Engine, folder: Path) -> dict[str, Any]:
    """The summary of a few more steps' trace, which stays in a folder of the case's own."""
    folder = folder / str(case).replace(" ", "_").replace(",", "")
    with traced(folder, engine.replicas):
        _steps_of(engine, *case_inputs(case), TRACED_STEPS)
    summary = summarise(folder, top=TOP_KERNELS)
    return {name: summary[name] for name in ("steps", "window_s", "idle_share", "classes", "top_kernels")}


def predicted_bytes(case: Case, engine: Engine, devices: Sequence[Any]) -> int:
    """Bytes on the fullest device by the compiled programs' analysis; `devices` are those of the run.

    The state before is held as well where there is room, so that steps go ahead (`Engine.issue`).
    """
    setup, replica = case.setup(devices), engine.replicas[0]
    peak = memory_bytes(replica, (case.rows, case.length)) + reserve_bytes(setup, replica)
    ahead = peak + kept_bytes(setup, replica)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", ahead)
    return ahead if ahead <= limit else peak


def _base_loss_and_gradient(replica: Replica, params: Any, batch: BatchInputs) -> tuple[Any, Any]:
    """Loss without adapters, and its gradient in the first norm's scale, which needs those of all inputs above it."""
    f = replica.layouts[0].functions

    def loss(scale: Any) -> Any:
        stage = f.abstract.merge({**params, "layers.0.attn_norm": scale})
        hidden = stage(batch.tokens, {}, None, remat=f.remat, shard=f.sharding)
        losses = weighted_row_losses(hidden, stage.unembedding, batch.targets, batch.loss_weights, f.sharding)
        return losses.sum()

    return jax.value_and_grad(loss)(params["layers.0.attn_norm"])
