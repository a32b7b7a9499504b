"""Slot and fixed seconds from readings of steps, by the pipeline's own formula."""

import pytest

from profiling.timing import QUICK_RUN_S, SLOW_RUN_S, StepTimes, fixed_s, slot_s, slots, time_steps


def step(num_micro_batches, *, stages, fixed):
    """Seconds of 1F1B over equal micro-batches on stages of these slots."""
    return fixed + sum(stages) + (num_micro_batches - 1) * max(stages)


def reading(stages, fixed=0.0, many=4):
    one_s, many_s = (step(m, stages=stages, fixed=fixed) for m in (1, many))
    return StepTimes(one_s=one_s, many=many, many_s=many_s)


@pytest.mark.parametrize("stages", [(0.3,), (0.3, 0.3), (0.1, 0.3), (0.3, 0.2, 0.1)])
def test_slot_is_the_slowest_stages_whatever_the_balance(stages):
    assert slot_s(reading(stages), pp=len(stages)) == pytest.approx(0.3)


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_fixed_time_is_seen_under_the_bubble(pp):
    assert fixed_s([reading((0.01,) * pp, fixed=0.05)], pp=pp) == pytest.approx(0.05)


def test_fixed_time_comes_from_the_quickest_shape_and_is_never_negative():
    quick, slow = reading((0.01,), fixed=0.02), reading((5.0,), fixed=1.0)
    assert fixed_s([slow, quick], pp=1) == pytest.approx(0.02)
    assert fixed_s([reading((0.1, 0.5))], pp=2) == 0.0
    assert fixed_s([StepTimes(one_s=1.0)], pp=1) == 0.0


def test_noise_never_makes_a_slot_negative_or_longer_than_its_step():
    assert slot_s(StepTimes(one_s=0.5, many=3, many_s=0.4), pp=2) == pytest.approx(0.1)
    assert slot_s(StepTimes(one_s=0.0, many=3, many_s=0.3), pp=1) == pytest.approx(0.1)


def test_a_single_reading_is_a_slot_less_the_fixed_time():
    times = {(1, 16): reading((0.01,), fixed=0.02), (1, 999): StepTimes(one_s=2.0)}
    seconds, fixed = slots(times, pp=1)
    assert seconds[1, 999] == pytest.approx(2.0 - fixed) and fixed == pytest.approx(0.02)


class Clock:
    """A `run` that answers as a pipeline of one slot would, the first time with what warming up costs."""

    def __init__(self, slot):
        self.slot, self.calls = slot, []

    def __call__(self, num_micro_batches):
        self.calls.append(num_micro_batches)
        return num_micro_batches * self.slot + (100.0 if len(self.calls) == 1 else 0.0)


@pytest.mark.parametrize("slot", [QUICK_RUN_S / 5, 2 * QUICK_RUN_S, 2 * SLOW_RUN_S])
@pytest.mark.parametrize("pp", [1, 2])
def test_timing_recovers_the_slot_and_ignores_the_first_run(slot, pp):
    run = Clock(slot)
    assert slot_s(time_steps(run, pp=pp, repeats=3), pp=1) == pytest.approx(slot)


def test_slow_shapes_are_run_fewer_times():
    quick, slow, slowest = Clock(QUICK_RUN_S / 5), Clock(SLOW_RUN_S), Clock(60.0)
    for run in (quick, slow, slowest):
        time_steps(run, pp=1, repeats=5)
    assert sum(quick.calls) > sum(slow.calls) > sum(slowest.calls) == 3
    once = Clock(60.0)
    time_steps(once, pp=1, repeats=1)
    assert sum(once.calls) == 2


@pytest.mark.parametrize("slot", [QUICK_RUN_S / 5, SLOW_RUN_S, 3.0])
@pytest.mark.parametrize("disturbed", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [2, 3])
def test_a_reading_during_which_the_host_looked_away_does_not_count(slot, disturbed, repeats):
    clock = Clock(slot)

    def run(num_micro_batches):
        return clock(num_micro_batches) + (0.4 + slot / 2 if len(clock.calls) == disturbed + 1 else 0.0)

    times = time_steps(run, pp=1, repeats=repeats)
    assert slot_s(times, pp=1) == pytest.approx(slot)
    assert len(clock.calls) <= 8
