"""What is to be trained: each task's batch size and distribution of sequence lengths (`hist.json`)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import UserError
from planner.files import write_whole

SHARE_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskLengths:
    """One task: `batch_size` sequences a step, `lengths` maps tokens of a sequence -> share, summing to 1.

    A length of share 0 may be listed: it is not expected in a batch, but a plan has to fit it (held-out examples).
    """

    name: str
    batch_size: int
    lengths: Mapping[int, float]

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, numbers.Integral) or self.batch_size < 1:
            raise ValueError(f"task {self.name!r}: batch_size = {self.batch_size!r}, expected an integer >= 1")
        if not self.lengths:
            raise ValueError(f"task {self.name!r}: lengths is empty")
        if any(length < 1 or not 0 <= share <= 1 for length, share in self.lengths.items()):
            raise ValueError(f"task {self.name!r}: expected lengths >= 1 with shares in [0, 1]")
        total = math.fsum(self.lengths.values())
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"task {self.name!r}: shares sum to {total:.8g}, expected 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The tasks that are trained jointly; `file` is where they were read, for messages."""

    tasks: tuple[TaskLengths, ...]
    file: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("Workload.tasks is empty")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"Workload.tasks: duplicate task name in {names}")

    @property
    def global_batch_size(self) -> int:
        return sum(task.batch_size for task in self.tasks)

    @functools.cached_property
    def longest(self) -> TaskLengths:
        """The first task that lists the longest length."""
        return max(self.tasks, key=lambda task: max(task.lengths))

    @functools.cached_property
    def max_length(self) -> int:
        """The longest length that any task lists, tokens."""
        return max(self.longest.lengths)

    def expected_counts(self) -> dict[int, float]:
        """Expected number of sequences of each length in one global batch, lengths ascending."""
        return dict(self._expected_counts)

    @functools.cached_property
    def _expected_counts(self) -> dict[int, float]:
        lengths = np.concatenate([np.fromiter(task.lengths.keys(), dtype=np.int64) for task in self.tasks])
        numbers = [task.batch_size * np.fromiter(task.lengths.values(), dtype=np.float64) for task in self.tasks]
        distinct, where = np.unique(lengths, return_inverse=True)
        totals = np.bincount(where, weights=np.concatenate(numbers))
        return dict(zip(distinct.tolist(), totals.tolist(), strict=True))

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws one global batch: (task index [n], length in tokens [n])."""
        tasks, lengths = [], []
        for index, task in enumerate(self.tasks):
            values = np.fromiter(task.lengths.keys(), dtype=np.int64)
            shares = np.fromiter(task.lengths.values(), dtype=np.float64)
            lengths.append(rng.choice(values, size=task.batch_size, p=shares / shares.sum()))
            tasks.append(np.full(task.batch_size, index))
        return np.concatenate(tasks), np.concatenate(lengths)

    @classmethod
    def from_samples(cls, samples: Mapping[str, tuple[int, Sequence[int]]]) -> Workload:
        """Builds the empirical workload of {task name: (batch size, observed lengths)}."""
        tasks = []
        for name, (batch_size, observed) in samples.items():
            values, counts = np.unique(np.asarray(observed, dtype=np.int64), return_counts=True)
            shares = counts / counts.sum()
            tasks.append(
                TaskLengths(
                    name=name,
                    batch_size=batch_size,
                    lengths={int(v): float(s) for v, s in zip(values, shares, strict=True)},
                )
            )
        return cls(tasks=tuple(tasks))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tasks": [
                {
                    "name": task.name,
                    "batch_size": task.batch_size,
                    "lengths": {str(length): share for length, share in task.lengths.items()},
                }
                for task in self.tasks
            ]
        }

    def save(self, path: str | Path) -> None:
        write_whole(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Workload:
        expected = 'a histogram {"tasks": [{"name", "batch_size", "lengths": {length: share}}]}'
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(raw, Mapping):
                raise UserError("not a mapping", file=path, expected=expected)
            return cls(
                tasks=tuple(
                    TaskLengths(
                        name=task["name"],
                        batch_size=task["batch_size"],
                        lengths={int(length): float(share) for length, share in task["lengths"].items()},
                    )
                    for task in raw["tasks"]
                ),
                file=str(path),
            )
        except OSError as error:
            raise UserError(f"cannot read: {error.strerror}", file=path, expected=expected) from error
        except KeyError as error:
            raise UserError(f"missing key {error}", file=path, expected=expected) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"bad histogram: {error}", file=path, expected=expected) from error
