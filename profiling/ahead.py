"""Capacity searches of several parallel configs at a time, done before the first of them is timed.

A search compiles a few programs, looks at their bytes and compiles the next, which leaves many of a host's cores idle.
Timing wants the host and the devices for itself, so searches and timing take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from planner.plan import ParallelConfig

Found = TypeVar("Found")


class Searches(Generic[Found]):
    """What `search` finds of each config, each taken once.

    Args:
      search: of one config; runs in threads.
      configs: all that may be taken, in the order in which they will be.
      at_once: searches at a time; at least one runs.
    """

    def __init__(
        self, search: Callable[[ParallelConfig], Found], configs: Sequence[ParallelConfig], *, at_once: int
    ) -> None:
        self._search = search
        self._configs = tuple(configs)
        self._at_once = max(at_once, 1)
        self._found: dict[ParallelConfig, Future[Found]] = {}

    def take(self, config: ParallelConfig) -> Found:
        """What was found of `config`, which is then forgotten here; raises what its search raised.

        Where it is not known yet, the configs that come after it are searched beside it.
        """
        if config not in self._found:
            first = self._configs.index(config)
            with ThreadPoolExecutor(self._at_once, thread_name_prefix="search") as executor:
                following = self._configs[first : first + self._at_once]
                self._found = {c: executor.submit(self._search, c) for c in following}
                wait(self._found.values())
        return self._found.pop(config).result()
