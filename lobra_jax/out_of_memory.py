"""A device that ran out of memory: who asked for too much, told from JAX's errors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax

from planner.errors import UserError

MARKS = ("resource_exhausted", "out of memory", "cuda_error_out_of_memory")
"""What JAX's errors say of it in lower case: the first where it happened, the second in what depends on that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A replica's micro-batch (rows, length) that did not fit; None where it was not about a micro-batch."""

    replica: int
    shape: tuple[int, int] | None

    def __str__(self) -> str:
        return "" if self.shape is None else f" with {self.shape[0]} x {self.shape[1]} tokens"


class OutOfMemoryError(Exception):
    """Work that a device had no room for; none of it has happened. `failures` is empty where nobody is to blame."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__("out of device memory" + "".join(f", replica {f.replica}{f}" for f in failures))
        self.failures = tuple(failures)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and any(mark in str(error).lower() for mark in MARKS)


@contextlib.contextmanager
def blaming(replica: int | None = None, shape: tuple[int, int] | None = None) -> Iterator[None]:
    """Turns JAX's error into `OutOfMemoryError` with this replica as the one that asked for too much."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError([] if replica is None else [Failure(replica=replica, shape=shape)]) from error


class NoRoomForUpdateError(UserError):
    """A device had no room for the update of adapters, and the state before it is gone."""

    def __init__(self) -> None:
        super().__init__(
            "out of device memory at the update of adapters",
            key="tasks",
            expected="fewer tasks or lower ranks at a time; --resume goes on from the last checkpoint, if there is one",
        )
