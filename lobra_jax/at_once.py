"""Work for several replicas at once, a thread each.

Issuing a program to a GPU lasts until the GPU's queue has room for it: nearly as long as it runs where it has thousands
of kernels (profiling/results/h200_step.json). One thread that did it for all replicas would be what they wait for; XLA
does it without Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from typing import TypeVar

Result = TypeVar("Result")


def at_once(executor: Executor, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The calls' results, in order, when all have ended; if any failed, what the first of those raised."""
    if len(calls) < 2:
        return [call() for call in calls]
    futures = [executor.submit(call) for call in calls]
    wait(futures)
    results = []
    try:
        for future in futures:
            results.append(future.result())
    finally:
        # A failure's traceback holds this frame: were the frame to hold the failure, arrays of the failed calls would
        # stay on devices until Python looks for cycles.
        del future, futures
    return results
