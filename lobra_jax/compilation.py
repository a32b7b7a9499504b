"""Making programs ready: counts XLA's compilations, so that a run can show that none happens after warm-up and how many
a cache saved, and keeps Python itself out of the way meanwhile."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from lobra_jax.host import host_cores
from lobra_jax.kept_programs import CACHE_READ, COMPILED_OR_READ, KEPT_READ

ALL_CORES, MOST_THREADS = 16, 32
"""Compilations at a time: one for each core up to the first, then for every other core up to the second. With 64 on as
many cores XLA's readings of kernels' variants on a GPU were off, and some programs it chose took twice as long."""

SWITCH_S = 5e-4
"""For how long a thread keeps the interpreter at a start while others wait for it: a tenth of Python's default."""


class CompilationCount:
    """Programs made ready in this process since the counter was made.

    Attributes:
      total: compiled, or read from JAX's cache or as they were kept.
      from_cache: those read.
    """

    def __init__(self) -> None:
        self.total = 0
        self.from_cache = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, name: str, _seconds: float, **_: Any) -> None:
        if name == COMPILED_OR_READ:
            with self._lock:
                self.total += 1

    def _on_event(self, name: str, **_: Any) -> None:
        if name in (CACHE_READ, KEPT_READ):
            with self._lock:
                self.from_cache += 1
                self.total += name == KEPT_READ  # as to the other, JAX tells how long it took too


def compile_threads() -> int:
    """Compilations at a time on this host."""
    cores = host_cores()
    return min(cores, max(ALL_CORES, cores // 2), MOST_THREADS)


@contextlib.contextmanager
def at_start() -> Iterator[None]:
    """Makes room for a start, where one thread traces programs while others draw or read weights.

    Python does not look for garbage in cycles meanwhile: tracing makes so many objects that it would again and again,
    for a sixth of the time that tracing takes. And a thread that waits for the interpreter gets it sooner: on two
    cores, beside tracing, weights were drawn a tenth quicker so, and tracing took as long.
    """
    was_enabled, interval_s = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        if was_enabled:
            gc.enable()


_is_after_start = False


@contextlib.contextmanager
def after_start() -> Iterator[None]:
    """For steps: Python no longer looks for garbage among what the start left, only among what came since.

    Tracing leaves 18,000 objects of each program of a 7B model. A look through those of 45 takes most of a second, in
    which nothing is issued, and would come at any time. Inside another one it does nothing.
    """
    global _is_after_start
    if _is_after_start:  # the count of frozen objects does not tell: Python 3.12 has some from the beginning
        yield
        return
    _is_after_start = True
    try:
        gc.collect(1)  # what is young: within `at_start` nothing grew old, other starts look through all before
        gc.freeze()
        yield
    finally:
        _is_after_start = False
        gc.unfreeze()


def in_rounds(
    rounds: Sequence[Sequence[Callable[[], object]]], *, num_threads: int, abandoned: threading.Event
) -> Iterator[tuple[int, int]]:
    """Calls what each round has, in parallel, one round after the other; yields (calls done, calls in all) after each.

    Ends when it is `abandoned`, with the calls that are being made.
    """
    total, done = sum(map(len, rounds)), 0
    with ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as executor:
        try:
            for calls in rounds:
                for future in [executor.submit(call) for call in calls]:
                    future.result()
                    if abandoned.is_set():
                        return
                    done += 1
                    yield done, total
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # nothing waits any more, or all are done
