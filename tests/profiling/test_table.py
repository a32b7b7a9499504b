"""Saving after each config, and going on from there."""

import pytest

from planner.config_cost import ConfigCost, CostPoint
from planner.errors import UserError
from planner.plan import ParallelConfig
from profiling.table import Header, Progress, load_partial, measure_all, partial_path, save_partial

CONFIGS = tuple(ParallelConfig(tp=tp, pp=1, remat="none") for tp in (1, 2, 4))
HEADER = Header(
    model="m",
    model_fingerprint="f",
    hardware={"platform": "cpu", "num_devices": 4},
    provenance={"rank": 8, "l": [1, 2]},
)
NOTHING = Progress(measured={}, dropped={})


class Interrupted(Exception):
    pass


class Measure:
    """Counts what it measures; config tp 1 does not fit; stops before its `stop_before`-th config."""

    def __init__(self, stop_before=99):
        self.seen, self.stop_before = [], stop_before

    def __call__(self, configs, keep):
        for config in configs:
            keep(config, self.outcome(config))

    def outcome(self, config):
        if len(self.seen) == self.stop_before:
            raise Interrupted
        self.seen.append(config)
        if config.tp == 1:
            return "too small"
        point = CostPoint(rows=1, length=16, seconds=0.5 * config.tp, peak_bytes=7)
        return ConfigCost(config=config, capacity_tokens=64, coefficients=(0, 0, 1, 0, 0, 0), points=(point,))


def run(path, measure, header=HEADER, told=None):
    progress, differing = load_partial(path, header)
    told = [] if told is None else told
    done = measure_all(
        [[config] for config in CONFIGS if config not in progress],
        measure,
        partial=path,
        header=header,
        progress=progress,
        on_config=lambda config, outcome: told.append((config, outcome)),
    )
    return done, differing


def test_interrupted_profile_goes_on_where_it_stopped(tmp_path):
    path = partial_path(tmp_path / "costs.json")
    first, second = Measure(stop_before=2), Measure()
    with pytest.raises(Interrupted):
        run(path, first)
    done, differing = run(path, second)

    assert first.seen == list(CONFIGS[:2]) and second.seen == [CONFIGS[2]]
    assert differing == []
    straight, _ = run(tmp_path / "other", Measure())
    assert done == straight
    assert done.dropped == {CONFIGS[0]: "too small"}


def test_a_finished_partial_file_measures_nothing_again(tmp_path):
    path = tmp_path / "p"
    done, _ = run(path, Measure())
    again = Measure()
    assert run(path, again)[0] == done and again.seen == []


def test_outcomes_are_told_as_they_come(tmp_path):
    told = []
    run(tmp_path / "p", Measure(), told=told)
    assert [config for config, _ in told] == list(CONFIGS)
    assert told[0][1] == "too small" and told[1][1].capacity_tokens == 64


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_fingerprint": "other"}, "model_fingerprint"),
        ({"provenance": {"rank": 16, "l": [1, 2]}}, "provenance.rank"),
        ({"hardware": {"platform": "gpu", "num_devices": 4}}, "hardware.platform"),
    ],
)
def test_measurements_of_another_set_up_count_for_nothing(tmp_path, change, key):
    path = tmp_path / "p"
    run(path, Measure())
    again = Measure()
    fields = {"model": "m", "model_fingerprint": "f", "hardware": HEADER.hardware, "provenance": HEADER.provenance}
    _, differing = run(path, again, header=Header(**(fields | change)))
    assert differing == [key]
    assert again.seen == list(CONFIGS)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"header": {}}'])
def test_a_file_that_is_no_partial_profile_is_an_error(tmp_path, text):
    path = tmp_path / "p"
    path.write_text(text)
    if text == '{"header": {}}':  # readable, but of another set-up
        assert load_partial(path, HEADER)[1]
        return
    with pytest.raises(UserError, match="cannot go on from this file"):
        load_partial(path, HEADER)


def test_progress_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/p: cannot write: .*file is no folder"):
        save_partial(tmp_path / "file" / "p", HEADER, NOTHING)


def test_no_partial_file_means_nothing_is_known(tmp_path):
    assert load_partial(tmp_path / "none", HEADER) == (NOTHING, [])
