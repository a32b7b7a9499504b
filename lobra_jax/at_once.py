"""Work for several replicas at once, a thread each.

Preparing a program's launch costs the host a tenth of a second and more for a large model on GPUs. One thread that did
it for all replicas would be what they wait for; XLA does it without Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


def at_once(executor: Executor, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The calls' results, in order, when all have ended; if any failed, what the first of those raised."""
    if len(calls) == 1:
        return [calls[0]()]
    futures = [executor.submit(call) for call in calls]
    failed = [error for future in futures if (error := future.exception()) is not None]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]
