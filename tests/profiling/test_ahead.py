"""Searches that go ahead of timing: several together, each outcome its own."""

import threading

import pytest

from planner.plan import ParallelConfig
from profiling.ahead import Searches
from profiling.memory import DoesNotFitError

CONFIGS = tuple(ParallelConfig(tp=tp, pp=1, remat=remat) for tp in (1, 2) for remat in ("none", "full"))


def test_as_many_are_searched_together_as_may_be_and_each_once():
    meet = threading.Barrier(2, timeout=30)
    seen = []

    def search(config):
        meet.wait()  # breaks unless two searches run at once
        seen.append(config)
        return str(config)

    searches = Searches(search, CONFIGS, at_once=2)
    assert searches.take(CONFIGS[0]) == str(CONFIGS[0]) and set(seen) == set(CONFIGS[:2])
    assert searches.take(CONFIGS[1]) == str(CONFIGS[1]) and len(seen) == 2
    assert searches.take(CONFIGS[2]) == str(CONFIGS[2]) and set(seen) == set(CONFIGS) and len(seen) == 4


def test_a_config_that_does_not_fit_spoils_no_other():
    def search(config):
        if config.remat == "none":
            raise DoesNotFitError("too small")
        return config

    searches = Searches(search, CONFIGS, at_once=1)
    with pytest.raises(DoesNotFitError, match="too small"):
        searches.take(CONFIGS[0])
    assert searches.take(CONFIGS[1]) == CONFIGS[1]
