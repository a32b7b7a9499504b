"""Cutting devices and layers; arithmetic, no arrays."""

import dataclasses
import itertools

import jax
import pytest

from lobra_jax.mesh import check_model_fits, cut, layer_weight, split_layers
from lobra_jax.models.config import PRESETS
from planner.errors import UserError
from planner.plan import ParallelConfig


def test_replicas_get_disjoint_devices_and_the_widest_are_aligned(world):
    plan = world.plan((1, 1, "none"), (1, 2, "full"), (4, 1, "none"))
    submeshes = cut(plan)
    used = [device.id for submesh in submeshes for device in submesh.devices]
    assert len(set(used)) == len(used) == 7
    assert [d.id for d in submeshes[2].devices] == [0, 1, 2, 3]
    assert [stage.mesh.size for stage in submeshes[1].stages] == [1, 1]


def test_a_plan_larger_than_the_mesh_is_refused(world):
    plan = world.plan((4, 1, "none"), (4, 2, "none"), num_devices=16)
    with pytest.raises(UserError, match=r"more devices than there are.*12.*at most 8"):
        cut(plan, jax.devices())


@pytest.mark.parametrize("num_layers", [1, 2, 5, 7])
@pytest.mark.parametrize("vocab_size", [64, 100_000])
def test_the_layer_split_is_the_best_there_is(world, num_layers, vocab_size):
    model = dataclasses.replace(world.model, num_layers=num_layers, vocab_size=vocab_size)
    layer, head = layer_weight(model)

    def heaviest(sizes):
        return max(size * layer + (head if stage == len(sizes) - 1 else 0) for stage, size in enumerate(sizes))

    for num_stages in range(1, num_layers + 1):
        ranges = split_layers(model, num_stages)
        assert [i for r in ranges for i in r] == list(range(num_layers))
        sizes = [len(r) for r in ranges]
        assert min(sizes) >= 1
        every = itertools.product(range(1, num_layers + 1), repeat=num_stages)
        assert heaviest(sizes) == min(heaviest(s) for s in every if sum(s) == num_layers)


def test_a_heavy_head_takes_layers_off_the_last_stage():
    sizes = [len(r) for r in split_layers(PRESETS["llama3.1-8b"], 4)]
    assert sizes[-1] < 8 < max(sizes)


def test_among_equal_splits_the_last_stage_gets_the_most_layers():
    assert [len(r) for r in split_layers(PRESETS["llama2-7b"], 5)] == [6, 6, 7, 7, 6]


def test_tp_that_does_not_divide_the_heads_names_them():
    with pytest.raises(UserError, match=r"tp.*heads 28, key/value heads 4.*got 8"):
        check_model_fits(PRESETS["qwen2.5-7b"], ParallelConfig(tp=8, pp=1, remat="none"))


def test_more_stages_than_layers_are_refused(world):
    with pytest.raises(UserError, match="1 to 2"):
        check_model_fits(world.model, ParallelConfig(tp=1, pp=3, remat="none"))
