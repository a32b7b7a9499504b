"""When a replica's stages end what they were given, noted while more is given to them.

Issuing a large program lasts until its devices have room in their queues, which is nearly as long as it runs: what is
looked at only when all of a step was issued seems to end with the step.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future
from queue import SimpleQueue

from jax import Array


class Watch:
    """One step of one replica; `ends[stage]` is the `perf_counter` seconds at which each of its actions ended.

    A stage has a thread of `executor`, which waits for its actions in the order in which they were added.
    """

    def __init__(self, num_stages: int, executor: Executor) -> None:
        self._queues: list[SimpleQueue[Array | None]] = [SimpleQueue() for _ in range(num_stages)]
        try:
            self.ends: tuple[Future[list[float]], ...] = tuple(executor.submit(_ends, queue) for queue in self._queues)
        except BaseException:
            self.close()  # or those that did start would wait for ever, and the process for them
            raise

    def add(self, stage: int, done: Array) -> None:
        """`done` is ready when the action is."""
        self._queues[stage].put(done)

    def close(self) -> None:
        """Nothing more will be added."""
        for queue in self._queues:
            queue.put(None)


def _ends(queue: SimpleQueue[Array | None]) -> list[float]:
    ends = []
    while (done := queue.get()) is not None:
        done.block_until_ready()
        ends.append(time.perf_counter())
    return ends
