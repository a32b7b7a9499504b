"""Hugging Face model folders: `config.json` and `*.safetensors`, read by slices and written. Imports no JAX."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf_config import config_json
from lobra_jax.models.weights import RandomWeights, WeightSource, numpy_dtype, weight_shapes, whole
from planner.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 1024**3
"""Largest weight file that `save_hf` writes by default."""

DIGEST_PIECES, DIGEST_BYTES = 64, 4096
"""Pieces of a weight file that its digest is of, and bytes of each: reading all of it takes minutes."""

ROWS_TRANSPOSED_AT_ONCE = 16
"""A cache line of 2-byte values."""
ROWS_COMPARED_AT_ONCE = 4096
"""Of a head with the embedding that it repeats."""

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

_WITHOUT_EFFECT = re.compile(r"lm_head\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.\w+")
"""Tensors that a checkpoint may have beside the model's: a tied head again, rotary tables of old files."""

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Tensor types that base weights may have: safetensors' name -> NumPy's."""

_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def module_name(target: str) -> str:
    """Path of a linear or norm inside a layer as `transformers` names it: "q" -> "self_attn.q_proj"."""
    return _MODULES[target]


def hf_name(name: str) -> str:
    """The tensor's name in a checkpoint of `transformers`: "layers.0.q" -> "model.layers.0.self_attn.q_proj.weight"."""
    if name == "embed":
        return _EMBED
    if name == "final_norm":
        return "model.norm.weight"
    if name == "head":
        return _HEAD
    _, layer, leaf = name.split(".")
    kind = "bias" if leaf.endswith("_bias") else "weight"
    return f"model.layers.{layer}.{_MODULES[leaf.removesuffix('_bias')]}.{kind}"


def is_transposed(name: str) -> bool:
    """Whether the checkpoint holds the tensor as [out, in]: all linears and the head; not the embedding."""
    return name == "head" or (name.startswith("layers.") and not name.endswith(("norm", "_bias")))


def transposed(array: np.ndarray) -> np.ndarray:
    """A matrix's transpose, contiguous; a few rows at a time, which keeps to the caches: several times quicker."""
    out = np.empty(array.shape[::-1], array.dtype)
    for start in range(0, array.shape[0], ROWS_TRANSPOSED_AT_ONCE):
        rows = slice(start, start + ROWS_TRANSPOSED_AT_ONCE)
        out[:, rows] = array[rows].T
    return out


def weights_digest(folder: str | Path) -> str:
    """Tells one checkpoint's weights from another's, of the same model too, wherever they lie: from the size of each
    weight file and pieces of it at equal distances, the first and the last with them."""
    digest = hashlib.sha256()
    for path in sorted(set(_locate(Path(folder)).values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(DIGEST_PIECES):
                file.seek(max(0, size - DIGEST_BYTES) * piece // (DIGEST_PIECES - 1))
                digest.update(file.read(DIGEST_BYTES))
    return digest.hexdigest()[:32]


class HFWeights:
    """A source of base weights in a model folder, of one file or of shards with an index.

    All names, shapes and dtypes are checked when it is made, from the files' headers alone.
    Raises UserError naming file and tensor.
    """

    def __init__(self, folder: str | Path, config: LlamaConfig) -> None:
        self.folder = Path(folder)
        self._files = _locate(self.folder)
        self._embed = _EMBED
        if config.tie_embeddings and _HEAD in self._files:
            self._check_tied(config)
        self._check(config)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        key = self._key(name)
        stored = index[::-1] if is_transposed(name) else index
        with _opened(self._files[key]) as file:
            array = file.get_slice(key)[stored]
        return transposed(array) if is_transposed(name) else np.ascontiguousarray(array)

    def _key(self, name: str) -> str:
        return self._embed if name == "embed" else hf_name(name)

    def _check_tied(self, config: LlamaConfig) -> None:
        """Takes the head for the embedding where only it is there: of two names of one tensor a writer chooses.

        A head of its own under a config that ties it is refused: `transformers` would not tie them either.
        """
        if _EMBED not in self._files:
            self._embed = _HEAD
            return
        for key in (_EMBED, _HEAD):
            with _opened(self._files[key]) as file:
                _check_tensor(file, self._files[key], key, (config.vocab_size, config.hidden_size))
        for start in range(0, config.vocab_size, ROWS_COMPARED_AT_ONCE):
            rows = slice(start, min(start + ROWS_COMPARED_AT_ONCE, config.vocab_size))
            parts = []
            for key in (_EMBED, _HEAD):
                with _opened(self._files[key]) as file:
                    parts.append(file.get_slice(key)[rows])
            if not np.array_equal(*parts):
                raise UserError(
                    f"tensor {_HEAD!r} is not the embedding",
                    file=self._files[_HEAD],
                    expected="tie_word_embeddings false in config.json, or no such tensor",
                )

    def _check(self, config: LlamaConfig) -> None:
        wanted: dict[Path, dict[str, tuple[int, ...]]] = {}
        keys = {self._key(name) for name in weight_shapes(config)}
        surplus = sorted(key for key in self._files if key not in keys and not _WITHOUT_EFFECT.fullmatch(key))
        if surplus:
            raise UserError(
                f"tensor {surplus[0]!r} is none of the model that config.json describes",
                file=self._files[surplus[0]],
                expected="its weights alone: no other layers, norms or biases",
            )
        for name, shape in weight_shapes(config).items():
            key = self._key(name)
            if key not in self._files:
                raise UserError(
                    f"tensor {key!r} is missing", file=self.folder, expected="the weights that config.json describes"
                )
            wanted.setdefault(self._files[key], {})[key] = shape[::-1] if is_transposed(name) else shape
        for path, shapes in wanted.items():
            with _opened(path) as file:
                present = set(file.keys())
                for key, shape in shapes.items():
                    if key not in present:
                        raise UserError(f"tensor {key!r} is missing", file=path, expected=f"it, as {INDEX_FILE} says")
                    _check_tensor(file, path, key, shape)


def base_weights(config: LlamaConfig, *, path: Path | None, init_seed: int, dtype: str = "float32") -> WeightSource:
    """The base a run names: the weights in folder `path`, or random ones, in `dtype`, where it names only a preset."""
    if path is not None:
        return HFWeights(path, config)
    return RandomWeights(config, init_seed, numpy_dtype(dtype))


def _check_tensor(file: Any, path: Path, key: str, shape: tuple[int, ...]) -> None:
    header = file.get_slice(key)
    if tuple(header.get_shape()) != shape:
        raise UserError(
            f"tensor {key!r} has the wrong shape",
            file=path,
            value=tuple(header.get_shape()),
            expected=f"{shape} as config.json says",
        )
    if header.get_dtype() not in DTYPES:
        raise UserError(
            f"tensor {key!r} has an unsupported dtype",
            file=path,
            value=header.get_dtype(),
            expected="one of " + ", ".join(DTYPES),
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read the weights: {error}", file=path, expected="a safetensors file") from error
    except SafetensorError as error:
        raise UserError(f"not readable as safetensors: {error}", file=path, expected="a safetensors file") from error


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name in the checkpoint -> file that holds it."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(key): folder / str(file) for key, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"bad index: {error}", file=index, key="weight_map", expected="a mapping of tensor to file"
            ) from error
    single = folder / WEIGHTS_FILE
    if not single.is_file():
        raise UserError("no weights found", file=folder, expected=f"{WEIGHTS_FILE} or {INDEX_FILE}")
    with _opened(single) as file:
        return {key: single for key in file.keys()}  # noqa: SIM118 (a safetensors file is no mapping)


def save_hf(
    folder: str | Path,
    config: LlamaConfig,
    source: WeightSource,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
    on_tensor: Callable[[], object] = lambda: None,
) -> None:
    """Writes `config.json` and the weights as `transformers` loads them, a shard at a time in memory.

    `extra` holds further keys of config.json (token ids, say) and wins over ours; `on_tensor` is called after each
    tensor. The folder is made; files of these names in it are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = numpy_dtype(dtype)
    settings = {**config_json(config, dtype=dtype), **(extra or {})}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shards = _split(weight_shapes(config), target.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            array = source.read(name, whole(shape)).astype(target)
            tensors[hf_name(name)] = transposed(array) if is_transposed(name) else np.ascontiguousarray(array)
            on_tensor()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody but the owner read
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = target.itemsize * sum(int(np.prod(shape)) for shape in weight_shapes(config).values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, cut into shards of at most `max_shard_bytes` (a larger tensor gets one of its own)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used_bytes = 0
    for name, shape in shapes.items():
        size_bytes = itemsize * int(np.prod(shape))
        if shards[-1] and used_bytes + size_bytes > max_shard_bytes:
            shards.append({})
            used_bytes = 0
        shards[-1][name] = shape
        used_bytes += size_bytes
    return shards
