"""From a run config to each task's data: cached text or synthetic tokens, split, with its sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lobra_jax.config.fields import did_you_mean, one_of
from lobra_jax.config.load import model_config
from lobra_jax.config.schema import DatasetConfig, RunConfig, TaskConfig
from lobra_jax.data.batches import TaskData, TaskSampler, mix, task_key
from lobra_jax.data.cache import SourceSummary, cached_tokens
from lobra_jax.data.dataset import TokenDataset, TokenStore, whole
from lobra_jax.data.sources import FILE_KINDS, HubDataset, Source, expand
from lobra_jax.data.tokenizer import TOKENIZER_FILES, TextTokenizer, load_tokenizer
from planner.errors import UserError
from planner.workload import TaskLengths, Workload


def load_tasks(config: RunConfig) -> tuple[TaskData, ...]:
    """The data of every task of the config, in its order: a task's id is its position.

    Reads from the token cache what has not changed. Raises `UserError` for anything wrong in the files.
    """
    vocab_size = model_config(config).vocab_size
    if config.data.source == "synthetic":
        workload = Workload.load(config.data.lengths)
        return tuple(_synthetic_task(config, task, workload, vocab_size) for task in config.tasks)
    section = config.data
    tokenizer = load_tokenizer(
        tokenizer_path(config),
        bos_token=section.bos_token,
        eos_token=section.eos_token,
        chat_template=section.chat_template,
    )
    return tuple(_text_task(config, task, tokenizer, vocab_size) for task in config.tasks)


def task_lengths(config: RunConfig, file: Path | None = None) -> Workload:
    """The distribution of lengths over each task's first epoch; its longest held-out length has share 0.

    `file` is the config's, for messages.
    """
    return workload_of(load_tasks(config), file)


def workload_of(tasks: tuple[TaskData, ...], file: Path | None = None) -> Workload:
    """As `task_lengths`, of data that is loaded already."""
    trained = Workload.from_samples(
        {task.name: (task.sampler.batch_size, task.train.lengths[task.sampler.epoch(0)]) for task in tasks}
    )
    return Workload(
        tasks=tuple(_with_held_out(lengths, task) for lengths, task in zip(trained.tasks, tasks, strict=True)),
        file=None if file is None else str(file),
    )


def _with_held_out(lengths: TaskLengths, task: TaskData) -> TaskLengths:
    if task.evaluation is None:
        return lengths
    longest = int(task.evaluation.lengths.max())
    return dataclasses.replace(lengths, lengths={longest: 0.0, **lengths.lengths})


def tokenizer_path(config: RunConfig) -> Path:
    """`data.tokenizer`, else the model folder's tokenizer.json or tokenizer.model."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    if config.model.path is None:
        expected = "the path of a tokenizer.json, as model.preset brings none"
        raise UserError("missing", key="data.tokenizer", expected=expected)
    places = [config.model.path / name for name in TOKENIZER_FILES]
    return next((place for place in places if place.is_file()), places[0])


def _text_task(config: RunConfig, task: TaskConfig, tokenizer: TextTokenizer, vocab_size: int) -> TaskData:
    def read(sources: Sequence[Source], split: str) -> tuple[TokenDataset, SourceSummary]:
        store, summary = cached_tokens(
            sources,
            cache_dir=config.data.cache_dir,
            task=task.name,
            split=split,
            template=task.template,
            context_length=task.context_length,
            tokenizer=tokenizer,
            columns=task.columns,
        )
        if summary.max_token >= vocab_size:
            problem = f"the tokenizer gives token {summary.max_token} in task {task.name!r}"
            raise UserError(problem, file=tokenizer_path(config), expected=f"ids below the model's {vocab_size}")
        return whole(task.name, store), summary

    sources, weights = training_sources(task)
    eval_sources = evaluation_sources(task)
    if eval_sources:
        train, train_summary = read(sources, "train")
        evaluation, eval_summary = read(eval_sources, "eval")
        return _task_data(config, task, train, evaluation, (train_summary, eval_summary), weights)
    # The cache knows nothing of the split: another fraction or seed finds the same tokens.
    every, summary = read(sources, "train" if task.eval_fraction == 0 else "train+eval")
    return _split_task(config, task, every, summary, weights)


def training_sources(task: TaskConfig) -> tuple[Sequence[Source], Sequence[float]]:
    """(sources, weight of each): the task's files with globs expanded, or its data set."""
    if task.dataset is not None:
        return [_hub_dataset(task.dataset, task.dataset.split)], [1.0]
    sources, weights = [], []
    for entry, weight in zip(task.files, task.weights or [1.0] * len(task.files), strict=True):
        found = _files(task, "files", entry)
        sources += found
        weights += [weight] * len(found)
    if not sources:
        raise UserError("no data", key=f"tasks.{task.name}.files", expected=f"files ({FILE_KINDS}) or dataset")
    return sources, weights


def evaluation_sources(task: TaskConfig) -> Sequence[Source]:
    """The task's held-out files or split; none where it has neither."""
    if task.dataset is not None and task.dataset.eval_split is not None:
        return [_hub_dataset(task.dataset, task.dataset.eval_split)]
    return [file for entry in task.eval_files for file in _files(task, "eval_files", entry)]


def _files(task: TaskConfig, key: str, entry: Path) -> Sequence[Path]:
    found = expand(entry)
    if not found:
        raise UserError("no file matches", key=f"tasks.{task.name}.{key}", value=str(entry), expected=FILE_KINDS)
    return found


def _hub_dataset(dataset: DatasetConfig, split: str) -> HubDataset:
    return HubDataset(
        name=dataset.name, path=dataset.path, config=dataset.config, split=split, revision=dataset.revision
    )


def row_weights(dataset: TokenDataset, summary: SourceSummary, weights: Sequence[float]) -> np.ndarray | None:
    """How often an epoch shows each row: float64 [n], or None where each is shown once."""
    if all(weight == 1 for weight in weights):
        return None
    ends = np.cumsum(summary.records_by_source)
    records = np.asarray(dataset.store.sources)[dataset.rows]
    return np.asarray(weights, np.float64)[np.searchsorted(ends, records, side="right")]


def _split_task(
    config: RunConfig,
    task: TaskConfig,
    every: TokenDataset,
    summary: SourceSummary,
    weights: Sequence[float] = (),
) -> TaskData:
    if task.eval_fraction == 0:
        return _task_data(config, task, every, None, (summary,), weights)
    train, evaluation = split(every, task.eval_fraction, _key(config, task, "split"))
    return _task_data(config, task, train, evaluation, (summary,), weights)


def _task_data(
    config: RunConfig,
    task: TaskConfig,
    train: TokenDataset,
    evaluation: TokenDataset | None,
    summaries: tuple[SourceSummary, ...],
    weights: Sequence[float],
) -> TaskData:
    by_row = row_weights(train, summaries[0], weights)
    sampler = TaskSampler(train, _key(config, task, "batches"), task.batch_size, by_row)
    return TaskData(name=task.name, train=train, evaluation=evaluation, sampler=sampler, sources=summaries)


def _key(config: RunConfig, task: TaskConfig, purpose: str) -> int:
    return task_key(seed=config.training.seed, task_seed=task.seed, name=task.name, purpose=purpose)


def split(dataset: TokenDataset, eval_fraction: float, key: int) -> tuple[TokenDataset, TokenDataset]:
    """(train, evaluation): the examples whose hash of (key, record number) ranks lowest are held out.

    Both have at least one example, evaluation round(fraction x n) where that allows it. Raises `UserError` for fewer
    than two examples.
    """
    if len(dataset) < 2:
        problem = f"task {dataset.task!r} has one example to split"
        raise UserError(problem, key=f"tasks.{dataset.task}.eval_fraction", expected="at least two, or eval_files")
    count = min(max(round(eval_fraction * len(dataset)), 1), len(dataset) - 1)
    records = dataset.store.sources[dataset.rows].astype(np.uint64)
    hashes = mix(mix(np.uint64(key & 0xFFFF_FFFF_FFFF_FFFF)) ^ mix(records))
    held_out = np.zeros(len(dataset), bool)
    held_out[np.argsort(hashes, kind="stable")[:count]] = True
    parts = [TokenDataset(task=dataset.task, store=dataset.store, rows=dataset.rows[m]) for m in (~held_out, held_out)]
    return parts[0], parts[1]


def _synthetic_task(config: RunConfig, task: TaskConfig, workload: Workload, vocab_size: int) -> TaskData:
    by_name = {lengths.name: lengths for lengths in workload.tasks}
    if task.name not in by_name:
        problem = f"no task {task.name!r}{did_you_mean(task.name, by_name)}"
        raise UserError(problem, file=config.data.lengths, expected=one_of(by_name))
    store, num_truncated = synthetic_store(
        by_name[task.name],
        num_examples=config.data.num_examples,
        context_length=task.context_length,
        vocab_size=vocab_size,
        key=_key(config, task, "synthetic"),
    )
    summary = SourceSummary(
        split="train" if task.eval_fraction == 0 else "train+eval",
        origin="synthetic",
        num_records=config.data.num_examples,
        num_truncated=num_truncated,
        num_dropped=0,
        max_token=vocab_size - 1,
    )
    return _split_task(config, task, whole(task.name, store), summary)


def synthetic_store(
    lengths: TaskLengths, *, num_examples: int, context_length: int, vocab_size: int, key: int
) -> tuple[TokenStore, int]:
    """Random tokens in examples whose lengths follow the histogram as closely as `num_examples` allow.

    Lengths are the histogram's quantiles at evenly spaced places with one random offset, so even a rare long length
    gets its share to within one example. Returns the store and how many examples were cut at `context_length`.
    """
    rng = np.random.Generator(np.random.Philox(key=key))
    values = np.array(sorted(lengths.lengths), np.int64)
    ends = np.cumsum([lengths.lengths[int(value)] for value in values])
    places = (np.arange(num_examples) + rng.random()) / num_examples * ends[-1]
    drawn = values[np.minimum(np.searchsorted(ends, places, side="right"), len(values) - 1)]
    kept = rng.permutation(np.minimum(drawn, context_length))
    offsets = np.concatenate([[0], np.cumsum(kept + 1)])
    trainable = np.ones(offsets[-1], bool)
    trainable[offsets[:-1]] = False
    store = TokenStore(
        tokens=rng.integers(0, vocab_size, offsets[-1], dtype=np.int32),
        trainable=trainable,
        offsets=offsets,
        sources=np.arange(num_examples),
    )
    return store, int(np.sum(drawn > context_length))
