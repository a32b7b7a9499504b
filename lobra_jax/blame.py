"""Which replicas of an issued step asked for more than a device had."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from lobra_jax.out_of_memory import Failure, OutOfMemoryError, is_out_of_memory
from lobra_jax.replica import ReplicaRun


def failures(runs: Sequence[ReplicaRun]) -> list[Failure]:
    """Each replica's first action that had no room; what it issued afterwards failed for want of that one's results."""
    found = []
    for index, run in enumerate(runs):
        for item in run.issued:
            try:
                item.done.block_until_ready()
            except jax.errors.JaxRuntimeError:
                found.append(Failure(replica=index, shape=item.shape))
                break
    return found


def await_gradients(runs: Sequence[ReplicaRun]) -> None:
    """Raises OutOfMemoryError if a device had no room for a micro-batch."""
    try:
        jax.block_until_ready([run.gradients for run in runs])
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(failures(runs)) from error
