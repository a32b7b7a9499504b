"""What a run reports: records in metrics.jsonl and TensorBoard, and the progress bar. Decides nothing.

A record's `step` counts whole steps done, the first being 1; a checkpoint of step n holds the state after record n.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from lobra_jax.run_folder import METRICS_FILE, TENSORBOARD_FOLDER
from planner.errors import UserError
from planner.files import write_whole

LENGTH_STEP = 16
"""Tokens that the lengths in task records are rounded up to a multiple of."""

THROUGHPUT_SMOOTHING = 0.2
"""Weight of the newest step in the progress bar's moving averages."""

CONVERT_BAR_DELAY_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSeconds:
    """Wall time of one step by phase.

    Attributes:
      wait_dispatch: the host waited for the step's dispatch and arrays, which are made ahead.
      issue: the host handed the step to the devices, which work meanwhile.
      host_wait: the devices waited for the host between the step before and this one.
      execute: from there to the end of the slowest replica's last micro-batch.
      sum_update: from there to the new adapters on every replica.
      total: the step as the devices see it, host_wait + execute + sum_update.
    """

    wait_dispatch: float
    issue: float
    host_wait: float
    execute: float
    sum_update: float
    total: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of all replicas.

    Attributes:
      tokens, padded_tokens: real tokens trained on, and tokens of the arrays that held them.
      padding_share: 1 - tokens / padded_tokens.
      idle_share: share of the used devices' time in which they waited, 0 to 1.
      gpu_seconds: devices of the plan x the step's wall time.
      predicted_s, measured_s, num_micro_batches: one value a replica, in the plan's order.
      compilations: programs compiled during this step (0 after warm-up).
      first_runs: programs of micro-batches that ran for the first time, which takes longer than predicted.
    """

    kind: ClassVar[str] = "step"
    step: int
    tokens: int
    padded_tokens: int
    padding_share: float
    idle_share: float
    gpu_seconds: float
    seconds: PhaseSeconds
    dispatch_solve_s: float
    predicted_s: tuple[float, ...]
    measured_s: tuple[float, ...]
    predicted_step_s: float
    num_micro_batches: tuple[int, ...]
    compilations: int
    first_runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One task's part in one step; `loss` is the mean over its `tokens` targets, `grad_norm` before clipping.

    `lengths`: tokens of a sequence, rounded up to a multiple of LENGTH_STEP -> sequences (for `lobra plan --check`).
    """

    kind: ClassVar[str] = "task"
    step: int
    task: str
    task_step: int
    loss: float
    tokens: int
    sequences: int
    lr: float
    grad_norm: float
    lengths: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One task's held-out loss, the mean over `tokens` targets, its exponential, and the lowest loss so far."""

    kind: ClassVar[str] = "eval"
    step: int
    task: str
    task_step: int
    loss: float
    perplexity: float
    best_loss: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartRecord:
    """How a run, or its resumption after `step` steps, got ready.

    Attributes:
      weights_s: from the start until base weights and adapters were placed.
      compile_s: from the start, beside them, until every program was compiled or read, and the sum and update had run
        once.
      programs: XLA programs made ready in that time.
      programs_from_cache: those of them that were in the compilation cache: none is a cold start.
    """

    kind: ClassVar[str] = "start"
    step: int
    weights_s: float
    compile_s: float
    programs: int
    programs_from_cache: int

    def __str__(self) -> str:
        return (
            f"weights placed in {self.weights_s:.1f} s, {self.programs} programs ready in {self.compile_s:.1f} s: "
            f"{self.programs - self.programs_from_cache} compiled, {self.programs_from_cache} from the cache"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened once: "finished", "early_stop", "nan", "checkpoint", "resumed", "out_of_memory" ..."""

    kind: ClassVar[str] = "event"
    step: int
    task: str | None = None
    event: str
    message: str = ""


Record = StartRecord | StepRecord | TaskRecord | EvalRecord | EventRecord


def length_counts(lengths: np.ndarray) -> dict[str, int]:
    """Sequences of each length, rounded up to a multiple of LENGTH_STEP; JSON's keys are strings."""
    values, counts = np.unique(-(-lengths // LENGTH_STEP) * LENGTH_STEP, return_counts=True)
    return {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl, each flushed, and their numbers to RUN/tensorboard. A context manager.

    `resume_step` keeps what is there up to that step and removes what came after it, so that no step is recorded
    twice; without it the file is begun anew.
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None) -> None:
        folder = Path(folder)
        path = folder / METRICS_FILE
        kept = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        write_whole(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        purge_step = 0 if resume_step is None else resume_step + 1
        from tensorboardX import SummaryWriter  # it loads torch where that is installed

        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Record) -> None:
        self._file.write(_line({"kind": record.kind, **dataclasses.asdict(record)}))
        self._file.flush()
        for tag, value in _scalars(record).items():
            self._board.add_scalar(tag, value, record.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order written, of one kind or all; numbers that were not finite are None.

    A last line that an interruption cut short is left out. Raises UserError naming the line for any other damage.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics: {error.strerror}", file=path, expected=METRICS_FILE) from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        where, expected = f"{path}:{number}", "a JSON object with kind and step"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"bad record: {error}", file=where, expected=expected) from error
        if not isinstance(record, dict) or "kind" not in record or not isinstance(record.get("step"), int):
            raise UserError("bad record", file=where, expected=expected)
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


@contextlib.contextmanager
def progress_bar(num_steps: int, *, done: int = 0) -> Iterator[Callable[[StepRecord], None]]:
    """A bar on stderr with steps, time left, tokens/s and idle share; call what it yields after every step.

    Shown on terminals only.
    """
    rate: float | None = None
    with tqdm(total=num_steps, initial=done, unit="step", desc="train", dynamic_ncols=True, disable=None) as bar:

        def advance(record: StepRecord) -> None:
            nonlocal rate
            newest = record.tokens / record.seconds.total
            rate = newest if rate is None else rate + THROUGHPUT_SMOOTHING * (newest - rate)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, idle {record.idle_share:.0%}", refresh=False)
            bar.update()

        yield advance


@contextlib.contextmanager
def compile_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for compiling ahead of time; call what it yields with (programs done, programs in all)."""
    with tqdm(unit="program", desc="compile", dynamic_ncols=True, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


@contextlib.contextmanager
def convert_bar(num_tensors: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr for converting base weights; call what it yields after every tensor.

    Shown once it takes a second, so not where the cache has them.
    """
    with tqdm(
        total=num_tensors, unit="tensor", desc="convert", dynamic_ncols=True, disable=None, delay=CONVERT_BAR_DELAY_S
    ) as bar:
        yield bar.update


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(record: Record) -> dict[str, float]:
    """TensorBoard tags and values of a record."""
    match record:
        case StepRecord():
            names = ("padding_share", "idle_share", "gpu_seconds", "predicted_step_s", "compilations")
            return {
                "step/tokens_per_s": record.tokens / record.seconds.total,
                **{f"step/{name}": getattr(record, name) for name in names},
                **{f"seconds/{name}": value for name, value in dataclasses.asdict(record.seconds).items()},
                **{f"replica_{index}/measured_s": value for index, value in enumerate(record.measured_s)},
                **{f"replica_{index}/predicted_s": value for index, value in enumerate(record.predicted_s)},
            }
        case TaskRecord():
            return {f"{record.task}/{name}": getattr(record, name) for name in ("loss", "lr", "grad_norm", "tokens")}
        case EvalRecord():
            return {f"{record.task}/eval_loss": record.loss, f"{record.task}/perplexity": record.perplexity}
        case StartRecord():
            return {
                f"start/{name}": getattr(record, name) for name in ("weights_s", "compile_s", "programs_from_cache")
            }
        case EventRecord():
            return {}
