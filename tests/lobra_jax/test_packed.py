"""Packed rows train what padded rows train, and what lies in one row never meets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.data.batches import fill_micro_batch, global_batch
from lobra_jax.lora import TaskInputs, drop, row_inputs, task_adapter
from lobra_jax.models import attention
from lobra_jax.models.weights import RandomWeights
from lobra_jax.optim import step_inputs
from lobra_jax.packed import SegmentInputs, drop_packed, packed_rows
from planner.dispatch import MicroBatch
from planner.packing import max_segments, max_tasks

TOLERANCE = 1e-5
NUM_STEPS = 10
PACKED_LENGTH = 60
"""Room for several sequences of the tests' tasks (at most 24 tokens), and not a multiple of anything."""

PLAN = [(2, 2, "full"), (1, 1, "dots")]


def tasks_of(world):
    """Unlike in all that the contract names, one with DoRA."""
    tasks = dict(world.tasks)
    tasks["b"] = dataclasses.replace(tasks["b"], spec=dataclasses.replace(tasks["b"].spec, dora=True))
    return tasks


def any_packing(batch, num_replicas, rows, seed):
    """[replica][micro-batch]: sequences in random order, each into the next row as long as that has room."""
    rng = np.random.default_rng(seed)
    filled, room, own = [[]], PACKED_LENGTH, set()
    for index in rng.permutation(len(batch)).tolist():
        task, length = int(batch.task_ids[index]), int(batch.lengths[index])
        tasks = own | {task}
        full = len(filled[-1]) >= max_segments(PACKED_LENGTH) - 1
        if length > room or full or len(tasks) > max_tasks(len(batch.datasets)):
            filled.append([])
            room, tasks = PACKED_LENGTH, {task}
        filled[-1].append(index)
        room, own = room - length, tasks
    out = [[] for _ in range(num_replicas)]
    for start in range(0, len(filled), rows):
        chunk = filled[start : start + rows]
        micro_batch = MicroBatch(
            rows=rows,
            length=PACKED_LENGTH,
            sequences=tuple(index for row in chunk for index in row),
            places=tuple(place for place, row in enumerate(chunk) for _ in row),
        )
        out[int(rng.integers(num_replicas))].append(fill_micro_batch(batch, micro_batch))
    return out


def packed_engine(world, configs, tasks, rows=2):
    from lobra_jax.engine import Engine

    plan = world.plan(*configs)
    engine = Engine(plan, world.model, [task.spec for task in tasks], dtype=jnp.float32, packed=True)
    engine.load(RandomWeights(world.model, seed=0))
    engine.init_adapters([task.seed for task in tasks])
    shapes = [[(rows, PACKED_LENGTH)]] * plan.num_replicas
    for _ in engine.compile(shapes, [()] * plan.num_replicas, num_threads=2):
        pass
    return engine


def train_packed(engine, tasks, num_steps, *, seed, rows=2):
    losses = []
    for step in range(num_steps):
        steps = {task.data.name: step if step < task.steps else None for task in tasks}
        batch = global_batch([task.data for task in tasks], steps)
        arrays = any_packing(batch, len(engine.replicas), rows, seed + step)
        hyper = step_inputs([task.optimizer for task in tasks], list(steps.values()))
        losses.append(engine.finish(engine.issue(arrays, hyper)).losses)
    adapters = jax.tree.map(np.asarray, engine.state.adapters)
    return {task.data.name: task_adapter(adapters, i, task.spec) for i, task in enumerate(tasks)}, np.array(losses)


def test_packed_rows_train_the_adapters_that_padded_rows_train(world):
    """Over tasks of mixed ranks, targets and dropout, on replicas with tensor and pipeline parallelism; and alone."""
    tasks = list(tasks_of(world).values())
    expected, expected_losses = world.train(world.engine(world.plan((1, 1, "none")), tasks), tasks, NUM_STEPS)
    engine = packed_engine(world, PLAN, tasks)
    engine.warm_up([replica.training_shapes for replica in engine.replicas])  # must change nothing
    found, losses = train_packed(engine, tasks, NUM_STEPS, seed=3)
    for task in world.tasks:
        assert world.difference(found[task], expected[task]) < TOLERANCE
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    alone = world.tasks["a"]
    found, _ = train_packed(packed_engine(world, [(1, 1, "none")], [alone], rows=1), [alone], NUM_STEPS, seed=5, rows=1)
    assert world.difference(found["a"], expected["a"]) < TOLERANCE


def random_adapters(engine):
    adapters = jax.tree.map(np.array, engine.state.adapters)
    rng = np.random.default_rng(0)
    for pairs in adapters.values():
        for pair in pairs.values():
            # As in training: what a task does not adapt or does not fill is zero in both factors.
            pair["b"][:] = rng.normal(0, 0.05, pair["b"].shape) * pair["a"].any(axis=2)[:, :, None]
    return adapters


def losses_and_gradients(engine, adapters, arrays):
    from lobra_jax.replica import ReplicaRun

    engine.set_state(engine.gradient_sum.init(adapters))
    spread = engine.gradient_sum.spread(engine.state.adapters)
    (replica,) = engine.replicas
    run = ReplicaRun(gradients=replica.zero_gradients())
    replica.issue(run, [arrays], spread[0], engine.tasks[0])
    return np.asarray(run.losses[0]), jax.tree.map(np.asarray, run.gradients[0])


@pytest.fixture(scope="module")
def one_micro_batch(world):
    """(engine, adapters, a packed micro-batch in whose first row tasks a, b and c are)."""
    tasks = list(tasks_of(world).values())
    engine = packed_engine(world, [(1, 1, "none")], tasks, rows=1)
    batch = global_batch([task.data for task in tasks], dict.fromkeys(world.tasks, 0))
    shortest = [min(np.flatnonzero(batch.task_ids == t), key=lambda i: batch.lengths[i]) for t in range(3)]
    micro_batch = MicroBatch(rows=1, length=PACKED_LENGTH, sequences=tuple(int(i) for i in shortest), places=(0, 0, 0))
    return engine, random_adapters(engine), fill_micro_batch(batch, micro_batch)


def task_gradients(gradients, task):
    return [pair[name][task] for pairs in gradients.values() for pair in pairs.values() for name in pair]


@pytest.mark.parametrize("changed", [0, 1, 2, 3], ids=["task a", "task b", "task c", "what is left of the row"])
def test_tokens_of_one_segment_do_not_reach_the_others(one_micro_batch, changed):
    engine, adapters, arrays = one_micro_batch
    losses, gradients = losses_and_gradients(engine, adapters, arrays)
    there = arrays.segments.segment_ids == changed
    assert there.any()
    tokens = np.where(there, (arrays.tokens + 1) % 64, arrays.tokens).astype(np.int32)
    found, found_gradients = losses_and_gradients(engine, adapters, dataclasses.replace(arrays, tokens=tokens))
    for task in range(3):
        if task == changed:
            assert abs(found[task] - losses[task]) > 1e-4 * losses[task]
            continue
        np.testing.assert_allclose(found[task], losses[task], rtol=1e-6)
        for x, y in zip(task_gradients(found_gradients, task), task_gradients(gradients, task), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [1e36, 1e12], ids=["overflow", "huge"])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_task_that_diverges_stops_alone(one_micro_batch, size, factor):
    """Its co-tenants' values of the same row are finite and unchanged."""
    engine, adapters, arrays = one_micro_batch
    losses, gradients = losses_and_gradients(engine, adapters, arrays)
    broken = jax.tree.map(np.copy, adapters)
    for pairs in broken.values():
        for pair in pairs.values():
            pair[factor][1] *= size
    found, found_gradients = losses_and_gradients(engine, broken, arrays)
    assert size == 1e12 or not all(np.isfinite(x).all() for x in task_gradients(found_gradients, 1))
    for task in (0, 2):
        np.testing.assert_allclose(found[task], losses[task], rtol=1e-6)
        for x, y in zip(task_gradients(found_gradients, task), task_gradients(gradients, task), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)


def rows_of(cuts, length):
    """SegmentInputs of rows cut at these places."""
    ids = np.array([np.searchsorted(cut, np.arange(length), side="right") for cut in cuts], np.int32)
    starts = [np.array([0, *cut])[row] for cut, row in zip(cuts, ids, strict=True)]
    positions = (np.arange(length) - np.array(starts)).astype(np.int32)
    slots = np.zeros((len(cuts), max_segments(length)), np.int32)
    return SegmentInputs(segment_ids=jnp.asarray(ids), positions=jnp.asarray(positions), slots=jnp.asarray(slots))


@pytest.mark.parametrize("chunk", [8, 512], ids=["in chunks of queries", "at once"])
def test_attention_of_packed_rows_is_that_of_each_sequence_alone(monkeypatch, chunk):
    length, cuts = 40, [[16, 32], [8]]
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    rng = np.random.default_rng(0)
    q, weights = rng.normal(size=(2, 2, length, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 2, 8)).astype(np.float32)
    segments = rows_of(cuts, length)

    def packed(q, k, v):
        out = attention.packed_attention(q, k, v, segments)
        return jnp.sum(out * weights), out

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def alone(q, k, v, w):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        return jnp.sum(out * w), out

    gradients, out = jax.jit(jax.grad(packed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    for row, cut in enumerate(cuts):
        for start, stop in zip([0, *cut], [*cut, length], strict=True):
            part = np.s_[row : row + 1, start:stop]
            own, own_out = alone(q[part], k[part], v[part], weights[part])
            np.testing.assert_allclose(out[part], own_out, rtol=1e-4, atol=1e-5)
            for found, expected in zip(gradients, own, strict=True):
                np.testing.assert_allclose(found[part], expected, rtol=1e-4, atol=1e-5)


def test_the_flash_kernel_is_told_where_segments_are():
    segments = rows_of([[3, 7], []], 12)
    lengths, starts = attention.segment_layout(segments.segment_ids, 4)
    assert lengths.tolist() == [[3, 4, 5, -1], [12, -1, -1, -1]]
    assert starts.tolist() == [[0, 3, 7, -1, -1], [0, -1, -1, -1, -1]]


def test_dropout_of_a_packed_sequence_is_that_of_its_padded_row():
    """Values of features x positions beyond one threefry block, sequences of two tasks, one without dropout."""
    tasks = TaskInputs(scales=jnp.ones(2), dropout_rates=jnp.array([0.3, 0.0], jnp.float32))
    marks = np.array([[7, 2**32 - 1, 11, *[0] * (max_segments(40) - 3)]], np.uint32)
    segments = rows_of([[9, 22]], 40)
    slots = np.zeros_like(segments.slots)
    slots[0, 1] = 1
    segments = dataclasses.replace(segments, slots=jnp.asarray(slots))
    rows = packed_rows(tasks, jnp.array([[0, 1]], jnp.int32), jnp.asarray(marks), segments, dropout=True)
    x = jnp.ones((1, 40, 33), jnp.float32)
    found = drop_packed(x, rows, layer=3, site=2)
    for segment, (start, stop) in enumerate([(0, 9), (9, 22), (22, 40)]):
        task = jnp.asarray(slots[0, segment : segment + 1])
        padded = row_inputs(tasks, task, jnp.asarray(marks[0, segment : segment + 1]), dropout=True)
        expected = drop(jnp.ones((1, 24, 33), jnp.float32), padded, 3, 2)
        np.testing.assert_array_equal(found[:, start:stop], expected[:, : stop - start])
