"""Stacked adapters against the plain formula, and the random streams they depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.lora import (
    LoraSpec,
    RowInputs,
    drop,
    init_adapters,
    low_rank_deltas,
    row_inputs,
    task_adapter,
    task_inputs,
)
from lobra_jax.models.config import TARGETS


def rows_of(task_ids, specs, dropout_ids=None, dropout=False):
    tasks = jax.tree.map(jnp.asarray, task_inputs(specs))
    ids = jnp.asarray(task_ids, jnp.int32)
    marks = jnp.arange(len(task_ids), dtype=jnp.uint32) if dropout_ids is None else jnp.asarray(dropout_ids, jnp.uint32)
    return row_inputs(tasks, ids, marks, dropout=dropout)


def test_each_row_gets_its_own_tasks_delta(world):
    specs = [
        LoraSpec(rank=3, alpha=6),
        LoraSpec(rank=5, alpha=5, rslora=True, targets=("q", "v")),
        LoraSpec(rank=1, alpha=2),
    ]
    adapters = init_adapters(world.model, specs, [1, 2, 3])["0"]
    rng = np.random.default_rng(0)
    for pair in adapters.values():
        pair["b"][:] = rng.normal(size=pair["b"].shape)
    for index, spec in enumerate(specs):
        for target, pair in adapters.items():
            rank = spec.rank if target in spec.targets else 0
            pair["b"][index, rank:] = 0
    x = rng.normal(size=(4, 6, world.model.hidden_size)).astype(np.float32)
    task_ids = [2, 0, 1, 0]
    deltas = low_rank_deltas(jnp.asarray(x), adapters, ("q", "k", "v"), rows_of(task_ids, specs).rank_slots)
    for target, delta in zip(("q", "k", "v"), deltas, strict=True):
        for row, task in enumerate(task_ids):
            a, b = adapters[target]["a"][task], adapters[target]["b"][task]
            np.testing.assert_allclose(delta[row], specs[task].scale * (x[row] @ a.T @ b), rtol=2e-5, atol=1e-5)
    assert not np.asarray(deltas[1][2]).any()  # task 1 does not adapt k


def test_scaling_rules():
    assert LoraSpec(rank=16, alpha=32).scale == 2
    assert LoraSpec(rank=16, alpha=32, rslora=True).scale == 8


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"targets": ("q", "w")}, "targets"),
        ({"targets": ()}, "targets"),
    ],
)
def test_bad_specs_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        LoraSpec(**{"rank": 4, "alpha": 8, **fields})


def test_a_tasks_first_adapter_does_not_depend_on_its_co_tenants(world):
    spec = LoraSpec(rank=4, alpha=8, targets=("o", "up"))
    alone = task_adapter(init_adapters(world.model, [spec], [9]), 0, spec)
    among = init_adapters(world.model, [LoraSpec(rank=16, alpha=1), spec], [1, 9])
    for layer, targets in task_adapter(among, 1, spec).items():
        assert set(targets) == {"o", "up"}
        for target, pair in targets.items():
            np.testing.assert_array_equal(pair["a"], alone[layer][target]["a"])
            assert pair["a"].shape == (world.model.target_shapes[target][0], 4)
            assert not pair["b"].any()


def test_the_first_adapter_has_pefts_spread(world):
    spec = LoraSpec(rank=64, alpha=8)
    adapters = init_adapters(world.model, [spec], [0])
    for target in TARGETS:
        a = adapters["0"][target]["a"]
        bound = 1 / np.sqrt(world.model.target_shapes[target][0])
        assert bound * 0.97 < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.08)


def test_dropout_ignores_padding_row_order_and_other_rows():
    specs = [LoraSpec(rank=2, alpha=2, dropout=0.5), LoraSpec(rank=2, alpha=2)]
    x = jnp.ones((3, 8, 16), jnp.float32)
    long = drop(x, rows_of([0, 0, 1], specs, [5, 6, 7], dropout=True), 3, 1)
    short = drop(x[:1, :5], rows_of([0], specs, [6], dropout=True), 3, 1)
    np.testing.assert_array_equal(short[0], long[1, :5])
    assert not np.array_equal(long[0], long[1])
    np.testing.assert_array_equal(long[2], x[2])  # that task has none
    assert not np.array_equal(long[0], drop(x, rows_of([0, 0, 1], specs, [5, 6, 7], dropout=True), 2, 1)[0])


def test_dropout_keeps_the_expected_share_and_mean():
    spec = LoraSpec(rank=2, alpha=2, dropout=0.3)
    out = drop(jnp.ones((64, 32, 32), jnp.float32), rows_of([0] * 64, [spec], dropout=True), 0, 0)
    assert float((out == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)


def test_dropout_is_the_same_on_a_sharded_activation():
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    rows = rows_of([0, 0], [LoraSpec(rank=2, alpha=2, dropout=0.4)], dropout=True)
    x = jnp.ones((2, 8, 16), jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",), axis_types=(AxisType.Auto,))
    rows_there = jax.device_put(rows, NamedSharding(mesh, PartitionSpec()))
    for spec in (PartitionSpec(None, "tensor"), PartitionSpec(None, None, "tensor")):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        out = jax.jit(lambda x, rows: drop(x, rows, 0, 0))(sharded, rows_there)
        np.testing.assert_array_equal(out, drop(x, rows, 0, 0))


def test_without_dropout_no_random_numbers_are_drawn():
    rows = rows_of([0], [LoraSpec(rank=2, alpha=2)])
    assert isinstance(rows, RowInputs) and rows.dropout_keys is None
