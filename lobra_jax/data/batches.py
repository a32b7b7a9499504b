"""Which examples make up a step, and the arrays of a micro-batch.

A task's batch at its step k is a function of (training seed, task seed, task name, k) alone: no state is kept, so it is
the same under any plan, among any other tasks, in any order of asking and after a resume.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lobra_jax.data.dataset import TokenDataset
from planner.errors import UserError
from planner.packing import max_segments, max_tasks

if TYPE_CHECKING:
    from lobra_jax.data.cache import SourceSummary
    from planner.dispatch import MicroBatch


def task_key(*, seed: int, task_seed: int, name: str, purpose: str) -> int:
    """128 bits that identify a stream of random numbers of one task; `purpose` keeps its streams apart."""
    text = f"{seed}/{task_seed}/{purpose}/{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


class TaskSampler:
    """Picks the rows of each step of one task: every epoch is a fresh shuffle, steps cut them in order.

    Args:
      dataset: the task's training examples, at least one.
      key: 128 bits, see `task_key`.
      batch_size: rows a step; may exceed the data set, a step then spans several epochs.
      weights: how often an epoch shows each row, float [n]; once by default. Of rows of weight 0.3 an epoch shows three
        tenths, drawn anew each time; of weight 2.3 each twice and three tenths of them once more.

    Raises:
      UserError: weights so small that an epoch shows nothing.
    """

    def __init__(self, dataset: TokenDataset, key: int, batch_size: int, weights: np.ndarray | None = None) -> None:
        if len(dataset) < 1 or batch_size < 1:
            raise ValueError(f"TaskSampler: {len(dataset)} examples, batch_size = {batch_size}: expected both >= 1")
        self.dataset = dataset
        self.key = key
        self.batch_size = batch_size
        self.epoch_size = len(dataset) if weights is None else len(weighted_rows(key, weights, 0))
        if self.epoch_size == 0:
            expected = "weights that leave an epoch one example or more"
            raise UserError("an epoch without examples", key=f"tasks.{dataset.task}.weights", expected=expected)

        def epoch(number: int) -> np.ndarray:
            order = epoch_order(key, self.epoch_size, number)
            return order if weights is None else weighted_rows(key, weights, number)[order]

        # A memo of a pure function: consecutive steps fall into the same one or two epochs.
        self.epoch = functools.lru_cache(maxsize=2)(epoch)
        """The rows of one epoch in the order in which steps cut them."""

    def indices(self, step: int) -> np.ndarray:
        """Rows of `dataset` at task step `step` (from 0): int64 [batch_size]."""
        if step < 0:
            raise ValueError(f"TaskSampler.indices: step = {step}, expected >= 0")
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.epoch_size)
        parts = [self.epoch(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def dropout_ids(self, step: int) -> np.ndarray:
        """Seeds of each sequence's dropout: uint32 [batch_size], a hash of (key, step, place in the batch)."""
        base = mix(np.uint64(self.key & 0xFFFF_FFFF_FFFF_FFFF) ^ mix(np.uint64(step)))
        return (mix(base ^ mix(np.arange(self.batch_size, dtype=np.uint64))) >> np.uint64(32)).astype(np.uint32)


def epoch_order(key: int, size: int, epoch: int) -> np.ndarray:
    """The shuffle of one epoch: a permutation int64 [size], read-only.

    Sorts raw Philox words, whose stream NumPy guarantees never to change (that of `Generator.permutation` may).
    """
    words = np.random.Philox(key=key, counter=[0, 0, 0, epoch]).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def weighted_rows(key: int, weights: np.ndarray, epoch: int) -> np.ndarray:
    """The rows of one epoch, not shuffled: each floor(weight) times, and of the fraction's rows a fresh draw.

    The number of rows is the same in every epoch.
    """
    parts = []
    for group, weight in enumerate(np.unique(weights)):
        rows = np.flatnonzero(weights == weight)
        count = round(len(rows) * float(weight % 1))
        drawn = epoch_order(key ^ mix(np.uint64(group + 1)).item(), len(rows), epoch)[:count]
        parts += [rows] * int(weight) + [rows[drawn]]
    return np.concatenate(parts)


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser, element by element (Steele, Lea, Flood, OOPSLA 2014): uint64 -> uint64."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E37_79B9_7F4A_7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
        return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskData:
    """One task's data, ready to train on.

    Attributes:
      name: the task's name.
      train: its training examples, those that `sampler` picks from.
      evaluation: its held-out examples, None without an evaluation split.
      sampler: picks the batch of each step.
      sources: what the examples were made from.
    """

    name: str
    train: TokenDataset
    evaluation: TokenDataset | None
    sampler: TaskSampler
    sources: tuple[SourceSummary, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GlobalBatch:
    """The n sequences of one step over all tasks (or of one chunk of evaluation).

    Attributes:
      datasets: by task id, [num_tasks]; None where a task takes no part.
      task_ids: int32 [n], position of the task in the run's list of tasks; sequences of one task are adjacent.
      lengths: int64 [n], tokens fed to the model.
      rows: int64 [n], row of the task's data set.
      dropout_ids: uint32 [n], identity that seeds a sequence's dropout; a function of task, task step and place in the
        task's batch alone (zero in evaluation).
      num_target_tokens: int64 [num_tasks], targets that count in each task's loss this step; 0 for an absent task.
    """

    datasets: tuple[TokenDataset | None, ...]
    task_ids: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    dropout_ids: np.ndarray
    num_target_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.task_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model, padding not counted."""
        return int(self.lengths.sum())

    @property
    def num_sequences(self) -> np.ndarray:
        """Sequences of each task: int64 [num_tasks]."""
        return np.bincount(self.task_ids, minlength=len(self.datasets))

    def dataset(self, index: int) -> TokenDataset:
        """The data set that sequence `index` comes from."""
        dataset = self.datasets[self.task_ids[index]]
        assert dataset is not None, "a sequence of a task that takes no part"
        return dataset

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [length + 1], trainable bool [length + 1]) of one sequence; targets are tokens[1:]."""
        return self.dataset(index).sequence(self.rows[index])


def global_batch(tasks: Sequence[TaskData], task_steps: Mapping[str, int | None]) -> GlobalBatch:
    """The sequences of one step.

    Args:
      tasks: all tasks of the run; a task's id is its position here.
      task_steps: task name -> the task's own step, from 0; None (or no entry) for a task that has finished.

    Raises:
      ValueError: every task has finished.
    """
    chosen: list[tuple[TokenDataset, np.ndarray, np.ndarray] | None] = []
    for task in tasks:
        step = task_steps.get(task.name)
        part = None if step is None else (task.train, task.sampler.indices(step), task.sampler.dropout_ids(step))
        chosen.append(part)
    return _assemble(chosen)


def eval_batches(tasks: Sequence[TaskData], names: Collection[str], max_sequences: int) -> Iterator[GlobalBatch]:
    """Every evaluation example of the named tasks once, in a fixed order, in chunks of at most `max_sequences`.

    `num_target_tokens` and so the loss weights are a chunk's own: a task's evaluation loss is
    sum over chunks of (chunk loss x chunk num_target_tokens) / sum of num_target_tokens.
    """
    if max_sequences < 1:
        raise ValueError(f"eval_batches: max_sequences = {max_sequences}, expected >= 1")
    sizes = [len(t.evaluation) if t.evaluation is not None and t.name in names else 0 for t in tasks]
    task_ids = np.repeat(np.arange(len(tasks)), sizes)
    rows = np.concatenate([np.arange(size) for size in sizes])
    for start in range(0, len(rows), max_sequences):
        part = slice(start, start + max_sequences)
        chosen: list[tuple[TokenDataset, np.ndarray, np.ndarray] | None] = []
        for index, task in enumerate(tasks):
            mine = rows[part][task_ids[part] == index]
            present = task.evaluation is not None and len(mine) > 0
            chosen.append((task.evaluation, mine, np.zeros(len(mine), np.uint32)) if present else None)
        yield _assemble(chosen)


def _assemble(chosen: Sequence[tuple[TokenDataset, np.ndarray, np.ndarray] | None]) -> GlobalBatch:
    """Builds the batch of (data set, rows, dropout ids) by task id."""
    parts = [(index, *part) for index, part in enumerate(chosen) if part is not None]
    if not parts:
        raise ValueError("no task takes part in this step")
    num_target_tokens = np.zeros(len(chosen), np.int64)
    for index, dataset, rows, _ in parts:
        num_target_tokens[index] = dataset.num_targets[rows].sum()
    return GlobalBatch(
        datasets=tuple(None if part is None else part[0] for part in chosen),
        task_ids=np.concatenate([np.full(len(rows), index, np.int32) for index, _, rows, _ in parts]),
        lengths=np.concatenate([dataset.lengths[rows] for _, dataset, rows, _ in parts]),
        rows=np.concatenate([rows for _, _, rows, _ in parts]),
        dropout_ids=np.concatenate([ids for _, _, _, ids in parts]),
        num_target_tokens=num_target_tokens,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Where sequences lie in packed rows. What is left of a row is one more segment, of token 0 and weight 0.

    Attributes:
      segment_ids: int32 [rows, length], from 0 in each row.
      positions: int32 [rows, length], from 0 in each segment.
      slots: int32 [rows, segments], which of its row's tasks a segment belongs to.
    """

    segment_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatchArrays:
    """One micro-batch as the model takes it; padded on the right with token 0, weight 0, task 0.

    Attributes:
      tokens, targets: int32 [rows, length].
      loss_weights: float32 [rows, length]: 1 / (targets of the row's task in this step) where a target counts, else 0,
        so that the weighted token losses of all micro-batches of a step sum to each task's mean loss.
      task_ids: int32 [rows]; packed: int32 [rows, slots], the tasks of each row.
      dropout_ids: uint32 [rows]; packed: uint32 [rows, segments].
      segments: where sequences lie in packed rows, None where a row is a sequence.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    task_ids: np.ndarray
    dropout_ids: np.ndarray
    segments: Segments | None = None


def fill_micro_batch(batch: GlobalBatch, micro_batch: MicroBatch) -> MicroBatchArrays:
    """Lays the micro-batch's sequences into rows, in its order.

    Raises:
      ValueError: more sequences than rows, or a sequence longer than the micro-batch.
    """
    if micro_batch.places is not None:
        return _fill_packed(batch, micro_batch, micro_batch.places)
    chosen = np.asarray(micro_batch.sequences, dtype=np.int64)
    rows, length = micro_batch.rows, micro_batch.length
    if len(chosen) > rows or (len(chosen) and batch.lengths[chosen].max() > length):
        longest = batch.lengths[chosen].max()
        raise ValueError(f"{len(chosen)} sequences of up to {longest} tokens do not fit into [{rows}, {length}]")
    tokens = np.zeros((rows, length), np.int32)
    targets = np.zeros((rows, length), np.int32)
    loss_weights = np.zeros((rows, length), np.float32)
    task_ids = np.zeros(rows, np.int32)
    dropout_ids = np.zeros(rows, np.uint32)
    # Rows are contiguous in the store: copying slices beats building an index for every token.
    for row, index in enumerate(chosen):
        count = batch.lengths[index]
        sequence, trainable = batch.sequence(index)
        tokens[row, :count] = sequence[:-1]
        targets[row, :count] = sequence[1:]
        loss_weights[row, :count] = trainable[1:]
    task_ids[: len(chosen)] = batch.task_ids[chosen]
    dropout_ids[: len(chosen)] = batch.dropout_ids[chosen]
    # Padding rows carry task 0, which may have no targets in this step: their weights stay 0, not 0 / 0.
    loss_weights /= np.maximum(batch.num_target_tokens[task_ids], 1).astype(np.float32)[:, None]
    return MicroBatchArrays(
        tokens=tokens, targets=targets, loss_weights=loss_weights, task_ids=task_ids, dropout_ids=dropout_ids
    )


def _fill_packed(batch: GlobalBatch, micro_batch: MicroBatch, places: Sequence[int]) -> MicroBatchArrays:
    """Lays sequence i of the micro-batch into row places[i], after those of the row before it."""
    rows, length, num_tasks = micro_batch.rows, micro_batch.length, len(batch.datasets)
    tokens = np.zeros((rows, length), np.int32)
    targets = np.zeros((rows, length), np.int32)
    loss_weights = np.zeros((rows, length), np.float32)
    task_ids = np.zeros((rows, max_tasks(num_tasks)), np.int32)
    dropout_ids = np.zeros((rows, max_segments(length)), np.uint32)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    slots = np.zeros((rows, max_segments(length)), np.int32)
    used, segments = [0] * rows, [0] * rows
    tasks: list[list[int]] = [[] for _ in range(rows)]
    for index, row in zip(micro_batch.sequences, places, strict=True):
        task, count, start, segment = int(batch.task_ids[index]), int(batch.lengths[index]), used[row], segments[row]
        if task not in tasks[row]:
            tasks[row].append(task)
        if start + count > length or len(tasks[row]) > task_ids.shape[1] or segment >= slots.shape[1] - 1:
            raise ValueError(f"row {row} of {length} tokens has no room for sequence {index} of {count} tokens")
        part = slice(start, start + count)
        sequence, trainable = batch.sequence(index)
        tokens[row, part], targets[row, part] = sequence[:-1], sequence[1:]
        loss_weights[row, part] = trainable[1:] / np.float32(max(batch.num_target_tokens[task], 1))
        segment_ids[row, part], positions[row, part] = segment, np.arange(count)
        slots[row, segment], dropout_ids[row, segment] = tasks[row].index(task), batch.dropout_ids[index]
        used[row], segments[row] = start + count, segment + 1
    for row in range(rows):
        task_ids[row, : len(tasks[row])] = tasks[row]
        segment_ids[row, used[row] :] = segments[row]
        positions[row, used[row] :] = np.arange(length - used[row])
    return MicroBatchArrays(
        tokens=tokens,
        targets=targets,
        loss_weights=loss_weights,
        task_ids=task_ids,
        dropout_ids=dropout_ids,
        segments=Segments(segment_ids=segment_ids, positions=positions, slots=slots),
    )
