"""Base weights converted once: a folder of TensorStore arrays in our names, layouts and dtype, read by slices.

A checkpoint holds linears transposed and maybe in other bits; converting at every start costs time that a cache saves.
A folder is named after all that its content depends on and appears by one atomic rename. Imports no JAX.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import WeightSource, numpy_dtype, weight_shapes, whole
from planner.errors import UserError
from planner.files import writing

CACHE_VERSION = 1
KEY_DIGITS = 24
CHUNK_BYTES = 16 * 2**20
"""Largest piece of an array that is read at once."""


class CachedWeights:
    """A source of base weights in a folder of `converted`."""

    def __init__(self, folder: Path, config: LlamaConfig, dtype: str) -> None:
        shapes = weight_shapes(config)
        self._arrays = {name: _open(folder, name, shape, dtype, create=False) for name, shape in shapes.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._arrays[name][index].read().result()


def converted(
    source: WeightSource,
    config: LlamaConfig,
    *,
    checkpoint: Path,
    dtype: str,
    cache_dir: Path,
    on_tensor: Callable[[], object] = lambda: None,
) -> CachedWeights:
    """The weights of `source` (read from the folder `checkpoint`) in `dtype`, from the cache or converted now.

    Raises:
      UserError: the cache cannot be written.
    """
    folder = cache_dir / f"{config.name}-{_key(config, checkpoint, dtype)}"
    if not folder.is_dir():
        with writing(folder, what="the converted weights", key="model.cache_dir"):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tmp-", ignore_cleanup_errors=True) as name:
                partial = Path(name) / folder.name
                for tensor, shape in weight_shapes(config).items():
                    array = source.read(tensor, whole(shape)).astype(numpy_dtype(dtype))
                    _open(partial, tensor, shape, dtype, create=True).write(array).result()
                    on_tensor()
                try:
                    partial.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another run has just made the same
                        raise
    try:
        return CachedWeights(folder, config, dtype)
    except ValueError as error:  # what TensorStore raises for an array that is missing or of another kind
        shutil.rmtree(folder)
        problem = "the converted weights were damaged and have been removed"
        raise UserError(
            problem, file=folder, key="model.cache_dir", expected="another start, which remakes them"
        ) from error


def _key(config: LlamaConfig, checkpoint: Path, dtype: str) -> str:
    """Changes with model, dtype and the checkpoint's files, told by size and time: hashing them takes minutes."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.glob("*.safetensors")]
    identity = [CACHE_VERSION, config.fingerprint, dtype, str(checkpoint.resolve()), sorted(files)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:KEY_DIGITS]


def _open(folder: Path, name: str, shape: tuple[int, ...], dtype: str, *, create: bool) -> Any:
    import tensorstore

    # Whole rows to a chunk: shards cut either dim, and a row is what both sides hold in one piece.
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * numpy_dtype(dtype).itemsize
    rows = max(1, min(shape[0], CHUNK_BYTES // row_bytes))
    layout = {"grid_origin": [0] * len(shape), "chunk": {"shape": [rows, *shape[1:]]}}
    return tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}},
        create=create,
        open=not create,
        dtype=dtype,
        shape=shape,
        **({"chunk_layout": tensorstore.ChunkLayout(layout)} if create else {}),
    ).result()
