"""Converted base weights: what the checkpoint holds, slice by slice; made once, remade when the checkpoint changes."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import HFWeights, save_hf
from lobra_jax.models.weight_cache import converted
from lobra_jax.models.weights import RandomWeights, weight_shapes, whole
from planner.errors import UserError

CONFIG = LlamaConfig(
    name="base", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, qkv_bias=True,
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_hf(tmp_path / "base", CONFIG, RandomWeights(CONFIG, seed=1))
    return tmp_path / "base"


def convert(checkpoint, dtype="bfloat16"):
    made = []
    source = HFWeights(checkpoint, CONFIG)
    cache = checkpoint.parent / "cache"
    weights = converted(
        source, CONFIG, checkpoint=checkpoint, dtype=dtype, cache_dir=cache, on_tensor=lambda: made.append(1)
    )
    return weights, len(made)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_slice_is_the_checkpoints_in_the_wanted_dtype(checkpoint, dtype, monkeypatch):
    monkeypatch.setattr("lobra_jax.models.weight_cache.CHUNK_BYTES", 100)
    weights, made = convert(checkpoint, dtype)
    assert made == len(weight_shapes(CONFIG))
    source = HFWeights(checkpoint, CONFIG)
    for name, shape in weight_shapes(CONFIG).items():
        middle = tuple(slice(size // 4, size // 2 + 1) for size in shape)
        for index in (whole(shape), middle):
            found = weights.read(name, index)
            assert found.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
            np.testing.assert_array_equal(found, source.read(name, index).astype(found.dtype), err_msg=name)


def test_it_is_made_once_and_again_for_another_checkpoint_or_dtype(checkpoint):
    assert convert(checkpoint)[1] > 0
    assert convert(checkpoint)[1] == 0
    assert convert(checkpoint, "float32")[1] > 0
    os.utime(checkpoint / "model.safetensors", (1, 1))
    assert convert(checkpoint)[1] > 0


def test_an_interrupted_conversion_leaves_nothing(checkpoint):
    def interrupt():
        raise KeyboardInterrupt

    source = HFWeights(checkpoint, CONFIG)
    cache = checkpoint.parent / "cache"
    with pytest.raises(KeyboardInterrupt):
        converted(source, CONFIG, checkpoint=checkpoint, dtype="float32", cache_dir=cache, on_tensor=interrupt)
    assert list(cache.iterdir()) == []


def test_a_damaged_cache_is_named_and_removed(checkpoint):
    convert(checkpoint)
    (folder,) = (checkpoint.parent / "cache").iterdir()
    (folder / "layers.0.q" / ".zarray").unlink()
    with pytest.raises(UserError, match=r"model\.cache_dir: the converted weights were damaged"):
        convert(checkpoint)
    assert convert(checkpoint)[1] > 0


def test_a_cache_that_cannot_be_written_is_named(checkpoint):
    (checkpoint.parent / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.cache_dir: cannot write the converted weights"):
        convert(checkpoint)
