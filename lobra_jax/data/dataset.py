"""Tokenised examples of one task: flat arrays, usually memory-mapped, and views of some of their rows.

The one definition of a sequence's length: an example of n tokens gives n - 1 (input, target) pairs,
inputs being tokens[:-1] and targets tokens[1:], so its length is n - 1.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import IO

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

    @classmethod
    def load(cls, folder: Path) -> TokenStore:
        """Memory-maps what `TokenStoreWriter` wrote; as plain arrays, whose slices are cheaper than np.memmap's."""
        return cls(
            **{f.name: np.asarray(np.load(folder / f"{f.name}.npy", mmap_mode="r")) for f in dataclasses.fields(cls)}
        )


class TokenStoreWriter:
    """Writes what `TokenStore.load` reads, example by example, holding none of it. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._arrays = {
            "tokens": _GrowingArray(folder / "tokens.npy", np.int32),
            "trainable": _GrowingArray(folder / "trainable.npy", np.bool_),
            "offsets": _GrowingArray(folder / "offsets.npy", np.int64),
            "sources": _GrowingArray(folder / "sources.npy", np.int64),
        }
        self._arrays["offsets"].append(np.zeros(1, np.int64))

    def append(self, examples: Sequence[tuple[np.ndarray, np.ndarray]], sources: Sequence[int]) -> None:
        """Adds some examples, (tokens, trainable) each, and which records they were."""
        if not examples:
            return
        ends = self._arrays["tokens"].count + np.cumsum([len(tokens) for tokens, _ in examples])
        self._arrays["tokens"].append(np.concatenate([tokens for tokens, _ in examples]))
        self._arrays["trainable"].append(np.concatenate([trainable for _, trainable in examples]))
        self._arrays["offsets"].append(ends)
        self._arrays["sources"].append(np.asarray(sources))

    def __len__(self) -> int:
        return self._arrays["sources"].count

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for array in self._arrays.values():
            array.close()


class _GrowingArray:
    """A one-dimensional .npy file that grows; its header, which NumPy pads for this, is written again at the end."""

    def __init__(self, path: Path, dtype: type) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = np.dtype(dtype)
        self.count = 0
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self.count += len(values)

    def close(self) -> None:
        size = self._file.tell()
        self._file.seek(0)
        self._write_header()
        assert size - self._file.tell() == self.count * self._dtype.itemsize
        self._file.close()


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
        # Not a running sum: that would take eight bytes of memory a token.
        return np.add.reduceat(self.store.trainable, self.store.offsets[:-1], dtype=np.int64)[self.rows]

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [length + 1], trainable bool [length + 1]) of one row."""
        part = slice(self.starts[row], self.starts[row] + self.lengths[row] + 1)
        return self.store.tokens[part], self.store.trainable[part]


def whole(task: str, store: TokenStore) -> TokenDataset:
    """Every example of the store."""
    return TokenDataset(task=task, store=store, rows=np.arange(len(store.sources)))
