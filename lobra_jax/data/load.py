"""From a run config to each task's data: cached text or synthetic tokens, split, with its sampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lobra_jax.config.fields import did_you_mean, one_of
from lobra_jax.config.load import model_config
from lobra_jax.config.schema import RunConfig, TaskConfig
from lobra_jax.data.batches import TaskData, TaskSampler, mix, task_key
from lobra_jax.data.cache import SourceSummary, cached_tokens
from lobra_jax.data.dataset import TokenDataset, TokenStore, whole
from lobra_jax.data.tokenizer import TextTokenizer, load_tokenizer
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
    tokenizer = load_tokenizer(tokenizer_path(config), bos_token=config.data.bos_token, eos_token=config.data.eos_token)
    return tuple(_text_task(config, task, tokenizer, vocab_size) for task in config.tasks)


def task_lengths(config: RunConfig) -> Workload:
    """The distribution of lengths over each task's training examples; its longest held-out length has share 0."""
    return workload_of(load_tasks(config))


def workload_of(tasks: tuple[TaskData, ...]) -> Workload:
    """As `task_lengths`, of data that is loaded already."""
    trained = Workload.from_samples({task.name: (task.sampler.batch_size, task.train.lengths) for task in tasks})
    return Workload(
        tasks=tuple(_with_held_out(lengths, task) for lengths, task in zip(trained.tasks, tasks, strict=True))
    )


def _with_held_out(lengths: TaskLengths, task: TaskData) -> TaskLengths:
    if task.evaluation is None:
        return lengths
    longest = int(task.evaluation.lengths.max())
    return dataclasses.replace(lengths, lengths={longest: 0.0, **lengths.lengths})


def tokenizer_path(config: RunConfig) -> Path:
    """`data.tokenizer`, else the model folder's tokenizer.json."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    if config.model.path is None:
        expected = "the path of a tokenizer.json, as model.preset brings none"
        raise UserError("missing", key="data.tokenizer", expected=expected)
    return config.model.path / "tokenizer.json"


def _text_task(config: RunConfig, task: TaskConfig, tokenizer: TextTokenizer, vocab_size: int) -> TaskData:
    def read(files: tuple[Path, ...], split: str) -> tuple[TokenDataset, SourceSummary]:
        store, summary = cached_tokens(
            files,
            cache_dir=config.data.cache_dir,
            task=task.name,
            split=split,
            template=task.template,
            context_length=task.context_length,
            tokenizer=tokenizer,
        )
        if summary.max_token >= vocab_size:
            problem = f"the tokenizer gives token {summary.max_token} in task {task.name!r}"
            raise UserError(problem, file=tokenizer_path(config), expected=f"ids below the model's {vocab_size}")
        return whole(task.name, store), summary

    if not task.files:
        raise UserError("no data", key=f"tasks.{task.name}.files", expected="one or more JSONL files")
    if task.eval_files:
        train, train_summary = read(task.files, "train")
        evaluation, eval_summary = read(task.eval_files, "eval")
        return _task_data(config, task, train, evaluation, (train_summary, eval_summary))
    # The cache knows nothing of the split: another fraction or seed finds the same tokens.
    every, summary = read(task.files, "train" if task.eval_fraction == 0 else "train+eval")
    return _split_task(config, task, every, summary)


def _split_task(config: RunConfig, task: TaskConfig, every: TokenDataset, summary: SourceSummary) -> TaskData:
    if task.eval_fraction == 0:
        return _task_data(config, task, every, None, (summary,))
    train, evaluation = split(every, task.eval_fraction, _key(config, task, "split"))
    return _task_data(config, task, train, evaluation, (summary,))


def _task_data(
    config: RunConfig,
    task: TaskConfig,
    train: TokenDataset,
    evaluation: TokenDataset | None,
    summaries: tuple[SourceSummary, ...],
) -> TaskData:
    sampler = TaskSampler(train, _key(config, task, "batches"), task.batch_size)
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
