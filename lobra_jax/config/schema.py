"""The schema of a run config: every key, its type, its default, its meaning. Imports no JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from lobra_jax.config.fields import (
    Buckets,
    ByteSize,
    ClosedFraction,
    Count,
    FilePath,
    FilePaths,
    Fraction,
    Identifier,
    NonNegative,
    NonNegativeInt,
    Positive,
    Preset,
    RowOptions,
    Seed,
    Targets,
    TaskName,
    Template,
    wrong,
)
from lobra_jax.models.config import TARGETS
from lobra_jax.peft_folder import read_peft_spec
from planner.defaults import (
    DEFAULT_COMPILE_S,
    DEFAULT_DISPATCH_TIME_LIMIT_S,
    DEFAULT_MAX_BUCKETS,
    DEFAULT_SAMPLES,
)
from planner.lattice import DEFAULT_ROW_OPTIONS
from planner.plan import REMATS


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The base model: shapes by preset name with random weights, or a Hugging Face folder with everything.

    With `cache_dir` the folder's weights are converted there once and read from there by later runs.
    """

    preset: Preset | None = None
    """Shapes by name with random weights. This or `path`."""
    path: FilePath | None = None
    """A Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    cache_dir: FilePath | None = None
    """Convert the folder's weights once into TensorStore arrays here; later runs read those."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the base and the arithmetic; adapters are float32."""
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """How the layers' linears are stored: int8 or nf4, read back for each matmul, or fp8, whose matmuls are float8 too.
    The whole run's: it changes the numbers a little."""
    init_seed: Seed = 0
    """Seed of a preset's weights."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.path is None):
            problem = "neither preset nor path" if self.preset is None else "both preset and path"
            wrong(problem, expected="exactly one of them")
        if self.cache_dir is not None and self.path is None:
            wrong("cache_dir beside a preset", expected="cache_dir beside path: random weights are not kept")
        return self


class DataConfig(Section):
    """Where tokens come from.

    `source: synthetic` draws lengths from the histogram file `lengths` (a task there for each task here, by name) and
    fills them with random tokens: `num_examples` a task; the tasks' own files are then not read.
    """

    source: Literal["files", "synthetic"] = "files"
    """The tasks' files, or synthetic: random tokens in lengths drawn from `data.lengths`."""
    cache_dir: FilePath = Field(default=".lobra_cache", validate_default=True)
    """Tokenised files, compiled programs."""
    tokenizer: FilePath | None = None
    """A tokenizer.json, or a SentencePiece tokenizer.model (`pip install "lobra-jax[sentencepiece]"`); a preset
    brings none."""
    bos_token: str | None = None
    """The token that texts begin with, `""` for none; by default what transformers begins them with (`add_bos_token` of
    tokenizer_config.json, else the post-processor of tokenizer.json), or a usual name where neither is there."""
    eos_token: str | None = None
    """The token that ends completions and turns; by default that of tokenizer_config.json or special_tokens_map.json,
    or a usual name."""
    chat_template: FilePath | None = None
    """A Jinja file for `template: chat_template`; found as chat_template.jinja or in tokenizer_config.json."""
    lengths: FilePath | None = None
    """With synthetic: a histogram with a task for each here, by name."""
    num_examples: Count = 4096
    """With synthetic: examples a task."""

    @model_validator(mode="after")
    def _synthetic_needs_lengths(self) -> DataConfig:
        if self.source == "synthetic" and self.lengths is None:
            wrong("source: synthetic without lengths", expected="lengths: the path of a histogram (hist.json)")
        return self


class ScheduleConfig(Section):
    """Learning rate over a task's own steps: linear warm-up, then constant or a fall to `final_fraction` x lr.

    "wsd" (warm-up, stable, decay) falls over the last `decay_fraction` of the steps only.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Constant, linear, cosine or wsd (warm-up, stable, decay)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    final_fraction: ClosedFraction = 0.0
    """Share of `lr` at the end of the fall."""
    decay_fraction: ClosedFraction = 0.1
    """Share of the steps, the last, in which wsd falls."""


class DatasetConfig(Section):
    """A data set of the `datasets` library (extra `datasets`): by its hub `name`, or a folder on disk at `path`.

    `config` is the hub's configuration name, `revision` a branch, tag or commit; `eval_split` is held out whole.
    """

    name: str | None = None
    """Hub name, owner/name. This or `path`."""
    path: FilePath | None = None
    """Folder of `save_to_disk`, or one with data files."""
    config: str | None = None
    """The hub's configuration name."""
    split: str = "train"
    """Training split."""
    eval_split: str | None = None
    """Held-out split."""
    revision: str | None = None
    """Branch, tag or commit."""

    @model_validator(mode="after")
    def _one_place(self) -> DatasetConfig:
        if (self.name is None) == (self.path is None):
            problem = "neither name nor path" if self.name is None else "both name and path"
            wrong(problem, expected="a hub name or a folder's path")
        return self


class TaskConfig(Section):
    """One fine-tuning job: data, batches, adapter, optimiser.

    `files` and `eval_files` may hold globs; `weights` has one number for each entry of `files`: how often an epoch
    shows each of its examples. `adapter`, a PEFT folder, is trained on: rank, alpha, rslora, targets and dora are then
    its own. `columns` maps our keys to the records' own. `context_length` is the most tokens of an example that are
    fed to the model. `eval_interval` counts the task's own steps; null evaluates before the first and
    after the last. `patience` is the number of evaluations in a row without a lower loss that ends the task.
    """

    name: TaskName
    """Also the adapter's folder."""
    files: FilePaths = ()
    """A file or a list, globs too; not read when synthetic. This or `dataset`."""
    weights: tuple[Positive, ...] = ()
    """A number for each entry of `files`: how often an epoch shows each of its examples."""
    dataset: DatasetConfig | None = None
    """A data set of the Hugging Face library. This or `files`."""
    columns: dict[Identifier, str] = Field(default_factory=dict)
    """Our key: the record's own, such as {prompt: question, completion: answer.text}."""
    template: Template = "auto"
    """How a record becomes text: auto, plain, alpaca, summarise, question_answer, chat, chat_template or your own."""
    context_length: Count = 2048
    """Most tokens of an example; longer ones are cut."""
    batch_size: Count
    """Sequences a step."""
    steps: Count
    """Steps of this task; it is then done, others go on."""
    eval_files: FilePaths = ()
    """Held-out files. This, `dataset.eval_split` or `eval_fraction`."""
    eval_fraction: Fraction = 0.0
    """Share of the examples to hold out, in [0, 1)."""
    eval_interval: Count | None = None
    """Evaluate every so many steps, besides before the first and after the last."""
    patience: Count | None = None
    """End the task after so many evaluations in a row without a lower held-out loss; the others go on with its share
    of the step."""
    seed: Seed = 0
    """Of the task's batches, held-out split, dropout and adapter, with `training.seed` and the name."""

    adapter: FilePath | None = None
    """A PEFT folder to go on training from: rank, alpha, rslora, targets and dora are then its own, and may be left
    out."""
    rank: Count = 16
    """Of the adapter's factors."""
    alpha: Positive = 16.0
    """The adapter is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    targets: Targets = TARGETS
    """The linears that are adapted; PEFT's `q_proj` is `q`."""
    dropout: Fraction = 0.0
    """Of the adapter's input."""
    dora: bool = False
    """DoRA: train a magnitude of each output feature beside the pair."""

    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """Each task its own, all in one compiled step. adafactor scales its steps by the size of the parameter."""
    lr: Positive = 2e-4
    """The peak of the schedule."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: learning rate of B over that of A."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Of the learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled, times the rate; sgd adds it to the gradient, as torch does."""
    clip_norm: Positive | None = 1.0
    """Largest gradient norm of this task; null for no clipping."""
    beta1: Fraction = 0.9
    """Of adamw and lion."""
    beta2: Fraction = 0.999
    """Of adamw and lion, whose authors take 0.99."""
    epsilon: Positive = 1e-8
    """Of adamw."""
    momentum: Fraction = 0.0
    """Of sgd."""
    ema_decay: Fraction | None = None
    """Evaluate and export the mean of the adapter over its steps, a step's weight falling by this each step; null for
    the adapter of the last step."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_adapter_is(cls, raw: Any, info: ValidationInfo) -> Any:
        """Takes rank, alpha, rslora, targets and dora from `adapter`; what is stated beside it must agree."""
        if not isinstance(raw, dict) or not isinstance(raw.get("adapter"), str | Path):
            return raw
        context = info.context or {}
        folder = context.get("folder", Path.cwd()) / Path(raw["adapter"]).expanduser()
        if not context.get("check_files", True) and not folder.is_dir():
            return raw
        spec = read_peft_spec(folder)
        found = {"rank": spec.rank, "alpha": float(spec.alpha), "rslora": spec.rslora, "dora": spec.dora}
        found["targets"] = list(spec.targets)
        return {**found, **raw}

    @model_validator(mode="after")
    def _agrees_with_the_adapter(self, info: ValidationInfo) -> TaskConfig:
        if self.adapter is None or (not (info.context or {}).get("check_files", True) and not self.adapter.is_dir()):
            return self
        spec = read_peft_spec(self.adapter)
        for key in ("rank", "alpha", "rslora", "targets", "dora"):
            stated, found = getattr(self, key), getattr(spec, key)
            if stated != found:
                wrong(f"{key} = {stated!r} beside an adapter of another", expected=f"{found!r} as in {self.adapter}")
        return self

    @property
    def has_evaluation(self) -> bool:
        has_split = self.dataset is not None and self.dataset.eval_split is not None
        return bool(self.eval_files) or has_split or self.eval_fraction > 0

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        has_split = self.dataset is not None and self.dataset.eval_split is not None
        if (bool(self.eval_files) + has_split + (self.eval_fraction > 0)) > 1:
            wrong("more than one of eval_files, dataset.eval_split and eval_fraction", expected="at most one of them")
        if self.files and self.dataset is not None:
            wrong("both files and dataset", expected="one of them")
        if self.weights and len(self.weights) != len(self.files):
            wrong(
                f"{len(self.weights)} weights for {len(self.files)} entries of files",
                expected="one weight for each entry of files, or none",
            )
        if self.eval_interval is not None and not self.has_evaluation:
            wrong("eval_interval without evaluation data", expected="eval_files or eval_fraction > 0 beside it")
        if self.patience is not None and self.eval_interval is None:
            wrong("patience without eval_interval", expected="eval_interval beside it: patience counts evaluations")
        if self.momentum > 0 and self.optimizer != "sgd":
            wrong(f"momentum with optimizer {self.optimizer}", expected="momentum with optimizer: sgd alone")
        if self.schedule.warmup_steps > self.steps:
            wrong(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} exceeds steps = {self.steps}",
                expected="warmup_steps <= steps",
            )
        return self


class DevicesConfig(Section):
    """What to run on: `num_devices` null takes all; `simulated` makes that many CPU devices; memory is per device."""

    num_devices: Count | None = None
    """Devices to use and to plan for; null for all: a plan is then for `simulated`, else for as many as the cost
    table was measured on."""
    simulated: Count | None = None
    """Run on that many simulated CPU devices."""
    memory_bytes: ByteSize | None = None
    """Limit per device: a number or 512MiB, 40GiB, ...; needed on CPUs."""

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
    """Exact, or LobRA's minlp, prune, group."""
    costs: FilePath | None = None
    """A costs.json of `lobra profile`."""
    buckets: Buckets = "dynamic"
    """Padded lengths: dynamic, static7, static16 or an ascending list."""
    num_buckets: Count | None = None
    """Most padded lengths with dynamic; null for the number of least step time and compile time together."""
    compile_s: NonNegative = DEFAULT_COMPILE_S
    """Seconds to compile one program, for that choice; spread over the run's steps."""
    row_options: RowOptions = DEFAULT_ROW_OPTIONS
    """Row counts compiled for each padded length on a replica: full, half, quarter, eighth; fewer compile sooner and
    pad more."""
    max_tp: Count | None = None
    """Most devices that share a layer; null for no limit."""
    max_pp: Count | None = None
    """Most pipeline stages; null for no limit."""
    tps: tuple[Count, ...] | None = None
    """Tensor-parallel sizes allowed; null for all."""
    pps: tuple[Count, ...] | None = None
    """Numbers of pipeline stages allowed; null for all."""
    remats: tuple[Literal["none", "dots", "attention", "full"], ...] = Field(default=REMATS, min_length=1)
    """Rematerialisation policies to measure and plan with."""
    mix_remats: bool = False
    """Also plan replicas of several policies: each padded length runs with the first that holds it. Padded rows
    only."""
    devices_per_host: Count | None = None
    """A layer's devices stay within a host of so many; null for no limit."""
    pinned: tuple[str, ...] = ()
    """Replicas that the plan must have, such as 1x(tp4,pp1,none)."""
    max_configs: Count | None = None
    """Most unlike replicas in a plan; null for no limit."""
    proposal: bool = True
    """Minlp and prune draw replica shapes by LobRA's configuration proposal."""
    solve_time_limit_s: Positive = 60.0
    """For a plan."""
    robust: str = Field(default="off", pattern=r"^(off|mean|p[1-9][0-9]?)$")
    """mean, or a percentile from p1 to p99: choose the plan by that of the step time over sampled batches."""
    samples: Count = DEFAULT_SAMPLES
    """Batches sampled for that."""
    dispatch: Literal["balance", "group", "uniform"] = "balance"
    """Sequences to replicas: balance, group (the smallest replica that fits) or uniform."""
    max_dispatch_buckets: Count = DEFAULT_MAX_BUCKETS
    """Most padded lengths in one step."""
    dispatch_time_limit_s: Positive = DEFAULT_DISPATCH_TIME_LIMIT_S
    """SCIP, which is asked where few replicas and padded lengths leave a gap, stops so many seconds after the dispatch
    began. A safety net: nothing else in a dispatch is timed."""


class TrainingConfig(Section):
    """The run as a whole: one seed for all, checkpoints every so many steps, evaluation chunk in sequences.

    Off a terminal, where there is no progress bar, a line is printed every `log_interval` steps.
    """

    seed: Seed = 0
    """One seed for the run."""
    checkpoint_interval: Count = 100
    """Joint steps between checkpoints; the last step has one too."""
    keep_checkpoints: Count = 3
    """Newest checkpoints kept."""
    log_interval: Count = 1
    """Joint steps between printed lines where there is no terminal for a progress bar."""
    batching: Literal["padded", "packed", "auto"] = "padded"
    """A sequence a row; several, of several tasks, a row; or the sooner of the two by the cost table."""
    eval_batch_size: Count = 256
    """Sequences evaluated at a time."""
    eval_replicas: Literal["all", "one"] = "all"
    """Which replicas evaluate: all, or one of each group of like ones, for which fewer programs are compiled."""


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
        if self.training.batching != "padded" and self.planner.dispatch != "balance":
            wrong(
                f"training.batching: {self.training.batching} with planner.dispatch: {self.planner.dispatch}",
                expected="planner.dispatch: balance, which is what packed rows are dealt out by",
            )
        return self
