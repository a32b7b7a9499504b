"""Solving lets other threads run, is ended by its limits, and turns Ctrl-C into KeyboardInterrupt."""

import functools
import itertools
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from pyscipopt import quicksum

from planner import scip


def market_split(num_columns=40, num_rows=5):
    """Splits each row's sum in half by one choice of columns: no proof within thousands of nodes."""
    rng = np.random.default_rng(0)
    model = scip.new_model("market split")
    chosen = [model.addVar(vtype="B") for _ in range(num_columns)]
    misses = []
    for row in rng.integers(0, 99, (num_rows, num_columns)).tolist():
        over, under = model.addVar(lb=0), model.addVar(lb=0)
        split = quicksum(weight * x for weight, x in zip(row, chosen, strict=True))
        model.addCons(split + over - under == sum(row) // 2)
        misses += [over, under]
    model.setObjective(quicksum(misses))
    return model


class Watched:
    """A model that notes a count where its optimisation begins and ends."""

    def __init__(self, model, count):
        self.model, self.count, self.seen = model, count, []

    def __getattr__(self, name):
        return functools.partial(self.watch, name) if name.startswith("optimize") else getattr(self.model, name)

    def watch(self, name):
        self.seen.append(self.count())
        getattr(self.model, name)()
        self.seen.append(self.count())


def test_another_thread_makes_progress_during_a_solve():
    counter = itertools.count()
    latest = next(counter)
    stop = threading.Event()

    def count_up():
        nonlocal latest
        while not stop.is_set():
            latest = next(counter)
            time.sleep(1e-5)

    thread = threading.Thread(target=count_up)
    model = Watched(market_split(), lambda: latest)
    usual_s = sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1000.0)  # no thread is made to give the GIL up, so the count moves only while it is released
    try:
        outcome = scip.solve(model, time_limit_s=60.0, node_limit=100)
    finally:
        sys.setswitchinterval(usual_s)
        stop.set()
        thread.join()
    before, after = model.seen
    assert outcome.num_nodes == 100
    assert after > before


def test_node_limit_ends_a_solve_and_leaves_a_bound():
    outcome = scip.solve(market_split(), time_limit_s=60.0, node_limit=20)
    assert outcome.status == "totalnodelimit" and outcome.num_nodes == 20
    assert outcome.has_solution and 0 <= outcome.bound < np.inf


def test_time_limit_ends_a_solve():
    outcome = scip.solve(market_split(), time_limit_s=0.05)
    assert outcome.status == "timelimit"


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where the tests were started in the background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_soon():
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_solve_in_the_main_thread():
    timer = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        scip.solve(market_split(), time_limit_s=60.0)
    timer.join()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_another_threads_solve_reaches_the_main_thread_and_not_the_solve():
    ended, done = [], threading.Event()

    def solve():
        ended.append(scip.solve(market_split(), time_limit_s=2.0).status)
        done.set()

    worker = threading.Thread(target=solve)
    worker.start()
    timer = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        done.wait()
    assert not done.is_set()
    assert done.wait(60)
    timer.join()
    worker.join()
    assert ended == ["timelimit"]
