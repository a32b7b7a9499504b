"""One task's adapter out of a run: as a PEFT folder of its own, or merged into the base.

An export goes into a folder that is new or empty, and is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lobra_jax.data.tokenizer import SENTENCEPIECE_SUFFIX
from lobra_jax.data.tokenizer import TOKENIZER_FILES as TOKENIZERS
from lobra_jax.lora import LoraSpec
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import base_weights, save_hf
from lobra_jax.models.weights import WeightSource
from lobra_jax.peft_folder import TaskAdapter, read_peft_adapter, write_peft_adapter
from lobra_jax.run_folder import ADAPTERS_FOLDER, BEST_FOLDER
from planner.errors import UserError
from planner.files import writing

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""Patterns of the files beside a tokenizer that a merged model needs as well."""
GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedWeights:
    """A source of base weights with one adapter merged in, computed in float32.

    W + scale a b, slice by slice; with DoRA its columns are brought to the length m, for which they are read whole.
    """

    base: WeightSource
    spec: LoraSpec
    adapter: TaskAdapter

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        weight = self.base.read(name, index)
        prefix, _, target = name.rpartition(".")
        pair = self.adapter.get(prefix.removeprefix("layers."), {}).get(target)
        if pair is None:
            return weight
        rows, columns = index
        if "m" in pair:
            rows, weight = slice(None), self.base.read(name, (slice(None), columns))
        delta = (pair["a"][rows] * np.float32(self.spec.scale)) @ pair["b"][:, columns]
        merged = weight.astype(np.float32) + delta
        if "m" in pair:
            merged = (merged * (pair["m"][columns] / np.linalg.norm(merged, axis=0)))[index[0]]
        return merged


def base_model_name(preset: str | None, path: Path | None) -> str:
    """What an adapter's config names as its base: the model's folder, or the preset."""
    name = preset if path is None else str(Path(path).resolve())
    assert name is not None
    return name


def task_folder(run: Path, task: str, *, best: bool = False) -> Path:
    """RUN/adapters/TASK, or RUN/best/TASK; UserError naming the tasks there are if it does not exist."""
    parent = run / (BEST_FOLDER if best else ADAPTERS_FOLDER)
    folder = parent / task
    if not folder.is_dir():
        names = sorted(path.name for path in parent.glob("*") if path.is_dir())
        kind = "tasks with held-out data" if best else "adapters"
        expected = "one of " + ", ".join(names) if names else f"a run folder of `lobra train` with {kind}"
        raise UserError("no adapter of this task", file=run, key="--task", value=task, expected=expected)
    return folder


def export_adapter(folder: Path, out: Path, base_name: str) -> None:
    """Writes the adapter of a run's task `folder` to `out`."""
    spec, adapter = read_peft_adapter(folder)
    with new_folder(out) as partial:
        write_peft_adapter(partial, spec, adapter, base_name)


def export_merged(
    folder: Path,
    out: Path,
    config: LlamaConfig,
    *,
    path: Path | None,
    init_seed: int,
    dtype: str,
    tokenizer: Path | None,
    on_tensor: Callable[[], object] = lambda: None,
) -> None:
    """Writes the base (folder `path`, or random from `init_seed`) with the adapter merged in, tokenizer beside it.

    Raises UserError, for a tokenizer that is gone before anything is merged.
    """
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
    spec, adapter = read_peft_adapter(folder)
    merged = MergedWeights(base=base_weights(config, path=path, init_seed=init_seed), spec=spec, adapter=adapter)
    settings = {}
    if path is not None:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in ("torch_dtype", "dtype")}
    with new_folder(out) as partial:
        save_hf(partial, config, merged, dtype=dtype, extra=settings, on_tensor=on_tensor)
        if path is not None and (path / GENERATION_FILE).is_file():
            shutil.copy(path / GENERATION_FILE, partial)
        _copy_tokenizer(tokenizer, path, partial)


def _check_tokenizer(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        problem, expected = f"cannot read the tokenizer: {error.strerror}", "what config.yaml of the run names"
        raise UserError(problem, file=file, key="data.tokenizer", expected=expected) from error


def _copy_tokenizer(tokenizer: Path | None, base: Path | None, out: Path) -> None:
    """The run's tokenizer with what lies beside it: the base's, or the file `tokenizer` alone of its kinds."""
    place = base if tokenizer is None else tokenizer.parent
    for file in [] if place is None else (file for pattern in TOKENIZER_FILES for file in place.glob(pattern)):
        if file.is_file() and (tokenizer is None or file.name not in TOKENIZERS):
            shutil.copy(file, out / file.name)
    if tokenizer is not None:
        shutil.copy(tokenizer, out / TOKENIZERS[tokenizer.suffix == SENTENCEPIECE_SUFFIX])


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if all goes well; UserError if `out` is there and not empty, or
    cannot be written."""
    with writing(out, key="--out"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError("already exists", file=out, key="--out", expected="a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            partial = Path(scratch) / out.name
            partial.mkdir()
            yield partial
            os.replace(partial, out)
