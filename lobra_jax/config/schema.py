"""The schema of a run config: every key, its type, its default, its meaning. Imports no JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lobra_jax.config.fields import (
    Buckets,
    ByteSize,
    ClosedFraction,
    Count,
    FilePath,
    FilePaths,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    Targets,
    TaskName,
    Template,
    did_you_mean,
    one_of,
    wrong,
)
from lobra_jax.models.config import PRESETS, TARGETS
from planner.plan import REMATS


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The base model: shapes by preset name with random weights, or a Hugging Face folder with everything."""

    preset: str | None = None
    path: FilePath | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    init_seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.path is None):
            problem = "neither preset nor path" if self.preset is None else "both preset and path"
            wrong(problem, expected="exactly one of them")
        if self.preset is not None and self.preset not in PRESETS:
            wrong(f"unknown preset {self.preset!r}{did_you_mean(self.preset, PRESETS)}", expected=one_of(PRESETS))
        return self


class DataConfig(Section):
    """Where tokens come from.

    `source: synthetic` draws lengths from the histogram file `lengths` (a task there for each task here, by name) and
    fills them with random tokens: `num_examples` a task; the tasks' own files are then not read.
    """

    source: Literal["files", "synthetic"] = "files"
    cache_dir: FilePath = Field(default=".lobra_cache", validate_default=True)
    tokenizer: FilePath | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    lengths: FilePath | None = None
    num_examples: Count = 4096

    @model_validator(mode="after")
    def _synthetic_needs_lengths(self) -> DataConfig:
        if self.source == "synthetic" and self.lengths is None:
            wrong("source: synthetic without lengths", expected="lengths: the path of a histogram (hist.json)")
        return self


class ScheduleConfig(Section):
    """Learning rate over a task's own steps: linear warm-up, then constant or a fall to `final_fraction` x lr."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_fraction: ClosedFraction = 0.0


class TaskConfig(Section):
    """One fine-tuning job: data, batches, adapter, optimiser.

    `context_length` is the most tokens of an example that are fed to the model. `eval_interval` counts the task's own
    steps; null evaluates before the first and after the last.
    """

    name: TaskName
    files: FilePaths = ()
    template: Template = "auto"
    context_length: Count = 2048
    batch_size: Count
    steps: Count
    eval_files: FilePaths = ()
    eval_fraction: Fraction = 0.0
    eval_interval: Count | None = None
    seed: Seed = 0

    rank: Count = 16
    alpha: Positive = 16.0
    rslora: bool = False
    targets: Targets = TARGETS
    dropout: Fraction = 0.0

    lr: Positive = 2e-4
    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = 1.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8

    @property
    def has_evaluation(self) -> bool:
        return bool(self.eval_files) or self.eval_fraction > 0

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        if self.eval_files and self.eval_fraction > 0:
            wrong("both eval_files and eval_fraction", expected="at most one of them")
        if self.eval_interval is not None and not self.has_evaluation:
            wrong("eval_interval without evaluation data", expected="eval_files or eval_fraction > 0 beside it")
        if self.schedule.warmup_steps > self.steps:
            wrong(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} exceeds steps = {self.steps}",
                expected="warmup_steps <= steps",
            )
        return self


class DevicesConfig(Section):
    """What to run on: `num_devices` null takes all; `simulated` makes that many CPU devices; memory is per device."""

    num_devices: Count | None = None
    simulated: Count | None = None
    memory_bytes: ByteSize | None = None

    @model_validator(mode="after")
    def _enough_simulated(self) -> DevicesConfig:
        if self.simulated is not None and self.num_devices is not None and self.num_devices > self.simulated:
            wrong(
                f"num_devices = {self.num_devices} exceeds simulated = {self.simulated}",
                expected="num_devices <= simulated",
            )
        return self


class PlannerConfig(Section):
    """How replicas are chosen and sequences dispatched; `costs` is the cost table that `lobra profile` wrote."""

    planner: Literal["exact", "minlp", "prune", "group"] = "exact"
    costs: FilePath | None = None
    buckets: Buckets = "dynamic"
    num_buckets: Count = 16
    max_tp: Count | None = None
    max_pp: Count | None = None
    tps: tuple[Count, ...] | None = None
    pps: tuple[Count, ...] | None = None
    remats: tuple[Literal["none", "dots", "full"], ...] = Field(default=REMATS, min_length=1)
    devices_per_host: Count | None = None
    pinned: tuple[str, ...] = ()
    max_configs: Count | None = None
    proposal: bool = True
    solve_time_limit_s: Positive = 60.0
    dispatch: Literal["balance", "group", "uniform"] = "balance"
    max_dispatch_buckets: Count = 16
    dispatch_time_limit_s: Positive = 30.0


class TrainingConfig(Section):
    """The run as a whole: one seed for all, checkpoints every so many steps, evaluation chunk in sequences.

    Off a terminal, where there is no progress bar, a line is printed every `log_interval` steps.
    """

    seed: Seed = 0
    checkpoint_interval: Count = 100
    keep_checkpoints: Count = 3
    log_interval: Count = 1
    eval_batch_size: Count = 256


class RunConfig(Section):
    """Everything a run needs."""

    model: ModelConfig
    data: DataConfig = Field(default_factory=dict, validate_default=True)
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    devices: DevicesConfig = DevicesConfig()
    planner: PlannerConfig = PlannerConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        seen: dict[str, str] = {}
        for task in self.tasks:
            folded = task.name.casefold()
            if folded in seen:
                wrong(
                    f"duplicate task name {task.name!r} (beside {seen[folded]!r})",
                    expected="names that differ by more than upper and lower case",
                )
            seen[folded] = task.name
        return self

    def task(self, name: str) -> TaskConfig:
        """The task called `name`; `KeyError` if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(name)
