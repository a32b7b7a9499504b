"""Which configs and shapes are measured, and what sharing a host does to a simulated device's seconds."""

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lobra_jax.models.config import PRESETS
from planner.errors import UserError
from planner.plan import ParallelConfig
from planner.workload import TaskLengths, Workload
from profiling import grid

TINY = PRESETS["tiny"]  # 8 heads, 4 layers


def sizes(**options):
    return {(c.tp, c.pp) for c in grid.parallel_configs(TINY, remats=("none",), **options)}


def test_grid_holds_every_shape_that_fits_devices_layers_and_heads():
    assert sizes(num_devices=8) == {
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (4, 1), (4, 2), (8, 1),
    }  # fmt: skip
    odd = dataclasses.replace(TINY, num_kv_heads=2)
    assert {c.tp for c in grid.parallel_configs(odd, num_devices=8, remats=("none",))} == {1, 2}


@given(st.lists(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 1)]), max_size=9), st.integers(4, 8))
def test_a_round_holds_neighbours_on_devices_of_their_own(shapes, num_devices):
    configs = [ParallelConfig(tp=tp, pp=pp, remat="none") for tp, pp in shapes]
    rounds = grid.side_by_side(configs, num_devices=num_devices)
    assert [config for placed in rounds for config, _ in placed] == configs
    for placed in rounds:
        used = [first + k for config, first in placed for k in range(config.num_devices)]
        assert used == list(range(len(used))) and len(used) <= num_devices
    for placed, following in itertools.pairwise(rounds):
        assert sum(config.num_devices for config, _ in placed) + following[0][0].num_devices > num_devices


def test_grid_keeps_within_the_users_limits_and_crosses_remats():
    assert sizes(num_devices=8, max_tp=2, max_pp=1) == {(1, 1), (2, 1)}
    both = grid.parallel_configs(TINY, num_devices=2, remats=("none", "full"))
    assert len(both) == 2 * len(sizes(num_devices=2))


def test_named_configs_are_picked_and_unknown_ones_refused():
    configs = grid.parallel_configs(TINY, num_devices=4, remats=("none", "full"))
    picked = grid.parse_configs("1x1, 2x2", configs)
    assert {(c.tp, c.pp) for c in picked} == {(1, 1), (2, 2)} and len(picked) == 4
    with pytest.raises(UserError, match="--configs.*'8x1'.*1x1"):
        grid.parse_configs("1x1,8x1", configs)


def test_default_lengths_run_from_short_sequences_to_the_longest():
    lengths = {20: 0.5, 100: 0.4, 1000: 0.1}
    workload = Workload(tasks=(TaskLengths(name="a", batch_size=8, lengths=lengths),))
    short, middle, longest = grid.default_lengths(workload)
    assert (short, longest) == (32, 1008)
    assert short < middle < longest and middle % 16 == 0
    same = Workload(tasks=(TaskLengths(name="a", batch_size=8, lengths={32: 1.0}),))
    assert grid.default_lengths(same) == (32,)


@pytest.mark.parametrize("text", ["", "a,b", "64,32", "64,64", "-16", "50", "0"])
def test_bad_lengths_are_refused(text):
    with pytest.raises(UserError, match="--lengths"):
        grid.parse_lengths(text)


def test_capacity_is_rounded_down_finer_when_small():
    assert grid.align_capacity(1100.9) == 1088
    assert grid.align_capacity(1000) == 992
    assert grid.align_capacity(7) == 0


@pytest.mark.parametrize("capacity", [16, 48, 1000, 4608])
def test_shapes_of_a_capacity_never_exceed_it(capacity):
    for lengths in ((16,), (16, 4608), (16, 48, 160, 480, 4608)):
        shapes = grid.full_shapes(lengths, capacity)
        assert all(rows >= 1 and rows * length <= capacity for rows, length in shapes)
        assert (1, capacity) in shapes and (capacity // 16, 16) in shapes


def test_fit_is_tested_between_the_extremes():
    lengths = (16, 160, 4608)
    shapes = grid.full_shapes(lengths, 1600)
    assert grid.held_out_shape(lengths, 1600, shapes) == (10, 160)
    assert grid.held_out_shape(lengths, 1600, shapes[:2]) is None  # it was not measured
    assert grid.held_out_shape((16, 4608), 1600, grid.full_shapes((16, 4608), 1600)) == (10, 160)
    assert grid.held_out_shape(lengths, 16, grid.full_shapes(lengths, 16)) is None


def test_simulated_devices_fill_the_cores_and_are_charged_for_the_rest():
    def share(devices, cores=2, num_devices=8):
        s = grid.host_share(devices, num_devices=num_devices, cores=cores)
        return s.copies, s.factor

    assert share(1) == (2, 4.0)  # two of eight at once, four rounds
    assert share(2) == (1, 4.0)
    assert share(4) == (1, 2.0)
    assert share(8) == (1, 1.0)
    assert share(3) == (1, pytest.approx(8 / 3))
    assert share(1, cores=64) == (8, 1.0)  # a core for every device: nothing is shared
    assert share(5, cores=64) == (1, 1.0)


def test_configs_are_ordered_narrow_first_so_that_a_table_of_few_is_useful():
    configs = grid.parallel_configs(TINY, num_devices=8, remats=("none",))
    assert configs[0] == ParallelConfig(tp=1, pp=1, remat="none")
    devices = [c.num_devices for c in configs]
    assert devices == sorted(devices)
