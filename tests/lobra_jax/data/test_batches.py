"""Batches: functions of task and step alone; micro-batches hold every token once, with weights that sum to one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.data.batches import (
    TaskData,
    TaskSampler,
    epoch_order,
    eval_batches,
    fill_micro_batch,
    global_batch,
    task_key,
)
from lobra_jax.data.dataset import TokenDataset, TokenStore, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangle:
    """As much of a micro-batch of the dispatch as filling needs."""

    rows: int
    length: int
    sequences: tuple[int, ...]
    places: tuple[int, ...] | None = None


def make_dataset(name: str, lengths: list[int], seed: int = 0) -> TokenDataset:
    """Examples of the given lengths; the last token of each counts, of the others some."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    trainable = rng.random(offsets[-1]) < 0.5
    trainable[offsets[:-1]] = False
    trainable[offsets[1:] - 1] = True
    tokens = rng.integers(1, 1000, offsets[-1]).astype(np.int32)
    store = TokenStore(tokens=tokens, trainable=trainable, offsets=offsets, sources=np.arange(len(lengths)))
    return whole(name, store)


def make_task(name: str, lengths: list[int], batch_size: int, evaluation: TokenDataset | None = None) -> TaskData:
    train = make_dataset(name, lengths)
    key = task_key(seed=0, task_seed=0, name=name, purpose="batches")
    return TaskData(name=name, train=train, evaluation=evaluation, sampler=TaskSampler(train, key, batch_size))


def test_epoch_order_is_pinned():
    """Runs resume across releases only while this stream stays what it is."""
    assert epoch_order(1, 6, 0).tolist() == [3, 5, 2, 0, 1, 4]
    assert epoch_order(1, 6, 1).tolist() != epoch_order(1, 6, 0).tolist()


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**128 - 1))
def test_every_epoch_visits_each_example_once(size, batch_size, key):
    sampler = TaskSampler(make_dataset("a", [1] * size), key, batch_size)
    num_steps = -(-2 * size // batch_size)
    seen = np.concatenate([sampler.indices(step) for step in range(num_steps)])
    for epoch in range(2):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.permutations(range(8)))
def test_batches_are_the_same_in_any_order_of_asking(steps):
    lengths = list(range(1, 12))
    task = make_task("a", lengths, 4)
    asked = {step: global_batch([task], {"a": step}) for step in steps}
    for step in range(8):  # a fresh sampler each time, as after a resume
        again = global_batch([make_task("a", lengths, 4)], {"a": step})
        assert np.array_equal(asked[step].rows, again.rows)
        assert np.array_equal(asked[step].dropout_ids, again.dropout_ids)


def test_task_alone_gets_the_batch_it_gets_among_others():
    tasks = [make_task(name, [3, 1, 4, 1, 5, 9], 3) for name in ("a", "b", "c")]
    together = global_batch(tasks, {"a": 7, "b": 2, "c": None})
    alone = global_batch([tasks[1]], {"b": 2})
    mine = together.task_ids == 1
    assert np.array_equal(together.rows[mine], alone.rows)
    assert np.array_equal(together.dropout_ids[mine], alone.dropout_ids)
    assert np.array_equal(together.lengths[mine], alone.lengths)
    assert together.num_target_tokens[1] == alone.num_target_tokens[0]


def test_tasks_seeds_and_steps_draw_apart():
    sampler = make_task("a", [1] * 100, 20).sampler
    dataset = sampler.dataset
    keys = [
        task_key(seed=seed, task_seed=task_seed, name=name, purpose=purpose)
        for seed, task_seed, name, purpose in [
            (0, 0, "a", "x"),
            (1, 0, "a", "x"),
            (0, 1, "a", "x"),
            (0, 0, "b", "x"),
            (0, 0, "a", "y"),
        ]
    ]
    assert len({tuple(TaskSampler(dataset, key, 20).indices(0)) for key in keys}) == len(keys)
    ids = np.concatenate([TaskSampler(dataset, key, 20).dropout_ids(step) for key in keys for step in range(5)])
    assert len(np.unique(ids)) == len(ids)


def test_finished_task_is_absent():
    tasks = [make_task("a", [2, 3], 2), make_task("b", [4], 1)]
    batch = global_batch(tasks, {"a": None, "b": 0})
    assert batch.task_ids.tolist() == [1]
    assert batch.datasets[0] is None
    assert batch.num_target_tokens[0] == 0
    assert batch.num_sequences.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no task takes part"):
        global_batch(tasks, {})


def test_sequence_longer_than_the_micro_batch_is_refused():
    batch = global_batch([make_task("a", [5], 1)], {"a": 0})
    for rectangle in (Rectangle(rows=1, length=4, sequences=(0,)), Rectangle(rows=1, length=8, sequences=(0, 0))):
        with pytest.raises(ValueError, match="do not fit"):
            fill_micro_batch(batch, rectangle)


def test_micro_batch_is_exact_on_a_small_example():
    store = TokenStore(
        tokens=np.array([7, 8, 9, 5, 6], np.int32),
        trainable=np.array([False, True, True, False, True]),
        offsets=np.array([0, 3, 5]),
        sources=np.arange(2),
    )
    dataset = whole("a", store)
    task = TaskData(name="a", train=dataset, evaluation=dataset, sampler=TaskSampler(dataset, 0, 2))
    (batch,) = eval_batches([task], {"a"}, 10)
    arrays = fill_micro_batch(batch, Rectangle(rows=3, length=4, sequences=(1, 0)))
    third = np.float32(1) / np.float32(3)
    assert arrays.tokens.tolist() == [[5, 0, 0, 0], [7, 8, 0, 0], [0] * 4]
    assert arrays.targets.tolist() == [[6, 0, 0, 0], [8, 9, 0, 0], [0] * 4]
    assert arrays.loss_weights.tolist() == [[third, 0, 0, 0], [third, third, 0, 0], [0] * 4]
    dtypes = [
        getattr(arrays, field.name).dtype.name for field in dataclasses.fields(arrays) if field.name != "segments"
    ]
    assert dtypes == ["int32", "int32", "float32", "int32", "uint32"]


@st.composite
def filled_batches(draw):
    """A global batch of up to three tasks and an arbitrary cut of it into micro-batches."""
    tasks = [
        make_task(f"t{index}", draw(st.lists(st.integers(1, 12), min_size=1, max_size=8)), draw(st.integers(1, 9)))
        for index in range(draw(st.integers(1, 3)))
    ]
    batch = global_batch(tasks, {task.name: draw(st.integers(0, 5)) for task in tasks})
    order = draw(st.permutations(range(len(batch))))
    rectangles = []
    while order:
        count = draw(st.integers(1, len(order)))
        part, order = order[:count], order[count:]
        longest = int(batch.lengths[list(part)].max())
        rows, length = count + draw(st.integers(0, 2)), longest + draw(st.integers(0, 3))
        rectangles.append(Rectangle(rows=rows, length=length, sequences=tuple(part)))
    return batch, rectangles


@given(filled_batches())
def test_every_token_lands_once_and_weights_sum_to_one_per_task(case):
    batch, rectangles = case
    weights = np.zeros(len(batch.datasets))
    for rectangle in rectangles:
        arrays = fill_micro_batch(batch, rectangle)
        assert arrays.tokens.shape == (rectangle.rows, rectangle.length)
        for row, index in enumerate(rectangle.sequences):
            tokens, trainable = batch.sequence(index)
            count = batch.lengths[index]
            assert arrays.tokens[row, :count].tolist() == tokens[:-1].tolist()
            assert arrays.targets[row, :count].tolist() == tokens[1:].tolist()
            assert (arrays.loss_weights[row, :count] > 0).tolist() == trainable[1:].tolist()
            assert not arrays.tokens[row, count:].any()
            assert not arrays.loss_weights[row, count:].any()
            assert arrays.task_ids[row] == batch.task_ids[index]
            assert arrays.dropout_ids[row] == batch.dropout_ids[index]
        assert not arrays.loss_weights[len(rectangle.sequences) :].any()
        np.add.at(weights, arrays.task_ids, arrays.loss_weights.sum(axis=1, dtype=np.float64))
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@given(st.integers(1, 9))
def test_evaluation_takes_every_example_once_in_bounded_chunks(max_sequences):
    tasks = [
        make_task("a", [2], 1, evaluation=make_dataset("a", [3, 1, 2])),
        make_task("b", [2], 1),
        make_task("c", [2], 1, evaluation=make_dataset("c", [5] * 5)),
        make_task("d", [2], 1, evaluation=make_dataset("d", [1])),
    ]
    chunks = list(eval_batches(tasks, {"a", "b", "c"}, max_sequences))
    assert all(len(chunk) <= max_sequences for chunk in chunks)
    seen = [(int(t), int(r)) for chunk in chunks for t, r in zip(chunk.task_ids, chunk.rows, strict=True)]
    assert seen == [(0, row) for row in range(3)] + [(2, row) for row in range(5)]
    totals = sum(chunk.num_target_tokens for chunk in chunks)
    assert totals.tolist() == [tasks[0].evaluation.num_targets.sum(), 0, tasks[2].evaluation.num_targets.sum(), 0]


def test_nothing_to_evaluate_gives_no_chunk():
    assert list(eval_batches([make_task("a", [2], 1)], {"a"}, 4)) == []
