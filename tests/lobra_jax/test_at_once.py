"""Work for several replicas at once."""

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from lobra_jax.at_once import at_once

PATIENCE_S = 60
"""Calls that wait for each other fail after this where they do not run at once."""


def test_calls_run_at_once_and_results_keep_their_order():
    barrier = threading.Barrier(3, timeout=PATIENCE_S)
    calls = [lambda number=number: (barrier.wait(), number)[1] for number in range(3)]
    with ThreadPoolExecutor(3) as executor:
        assert at_once(executor, calls) == [0, 1, 2]
        assert at_once(executor, [threading.get_ident]) == [threading.get_ident()]


def test_the_first_failure_is_raised_when_all_have_ended():
    late = threading.Event()
    ended = []

    def fail(message: str) -> None:
        raise ValueError(message)

    def work() -> None:
        assert late.wait(PATIENCE_S)
        ended.append(True)

    with ThreadPoolExecutor(3) as executor:
        threading.Timer(0.05, late.set).start()
        with pytest.raises(ValueError, match="second"):
            at_once(executor, [work, lambda: fail("second"), lambda: fail("third")])
        assert ended == [True]


def test_nothing_of_a_failed_call_is_kept():
    """Not even until Python looks for cycles."""

    class Arrays:
        pass

    kept: list[weakref.ref] = []

    def fail() -> None:
        arrays = Arrays()
        kept.append(weakref.ref(arrays))
        raise ValueError("no room")

    gc.disable()
    try:
        with ThreadPoolExecutor(2) as executor:
            with contextlib.suppress(ValueError):
                at_once(executor, [fail, fail])
            deadline = time.monotonic() + PATIENCE_S
            while any(ref() is not None for ref in kept) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
