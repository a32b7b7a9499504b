"""Tokenised examples of one task: flat arrays, usually memory-mapped, and views of some of their rows.

The one definition of a sequence's length: an example of n tokens gives n - 1 (input, target) pairs,
inputs being tokens[:-1] and targets tokens[1:], so its length is n - 1.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenStore:
    """Examples one after another: example e is tokens[offsets[e]:offsets[e + 1]].

    Attributes:
      tokens: int32 [total].
      trainable: bool [total]; whether a token counts in the loss as a target. The first token of an example is
        never a target, so it is False there.
      offsets: int64 [num_examples + 1].
      sources: int64 [num_examples]; which record of the task's files an example was (dropped records leave gaps).
    """

    tokens: np.ndarray
    trainable: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sources) + 1:
            raise ValueError(f"TokenStore: {len(self.offsets)} offsets for {len(self.sources)} examples")
        if len(self.tokens) != len(self.trainable) or (len(self.offsets) and self.offsets[-1] != len(self.tokens)):
            raise ValueError("TokenStore: tokens, trainable and offsets do not belong together")

    def save(self, folder: Path) -> None:
        for field in dataclasses.fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> TokenStore:
        """Memory-maps the arrays that `save` wrote; as plain arrays, whose slices are cheaper than np.memmap's."""
        return cls(
            **{f.name: np.asarray(np.load(folder / f"{f.name}.npy", mmap_mode="r")) for f in dataclasses.fields(cls)}
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenDataset:
    """The rows of a store that belong to one split of a task.

    Attributes:
      task: name of the task.
      store: the arrays.
      rows: int64 [n]; which examples of the store are ours.
    """

    task: str
    store: TokenStore
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each row begins in the store's flat arrays: int64 [n]."""
        return np.asarray(self.store.offsets)[self.rows]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of (input, target) pairs of each row: int64 [n]."""
        return np.diff(self.store.offsets)[self.rows] - 1

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """Number of targets of each row that count in the loss: int64 [n]."""
        sums = np.concatenate([[0], np.cumsum(self.store.trainable, dtype=np.int64)])
        return (sums[self.store.offsets[1:]] - sums[self.store.offsets[:-1]])[self.rows]

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [length + 1], trainable bool [length + 1]) of one row."""
        part = slice(self.starts[row], self.starts[row] + self.lengths[row] + 1)
        return self.store.tokens[part], self.store.trainable[part]


def whole(task: str, store: TokenStore) -> TokenDataset:
    """Every example of the store."""
    return TokenDataset(task=task, store=store, rows=np.arange(len(store.sources)))
