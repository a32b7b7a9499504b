"""Logits of checkpoints made by `transformers` (golden/make.py), without torch: each family, every stored dtype."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lobra_jax.models.hf import HFWeights, save_hf
from lobra_jax.models.hf_config import load_llama_config
from lobra_jax.models.llama import abstract_stage
from lobra_jax.models.weights import weight_shapes, whole
from lobra_jax.sharding import UNSHARDED

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if (path / "logits.json").is_file())
LOGIT_TOLERANCE = 1e-4
ROUNDED = {"float16": 2e-2, "bfloat16": 2e-1}
"""What storing weights in fewer bits does to these logits."""


def last_logits(config, source):
    """[row, 4, vocabulary] at the last four positions of the golden tokens, in fp32 on one device."""
    tokens = json.loads((GOLDEN / FAMILIES[0] / "logits.json").read_text(encoding="utf-8"))["tokens"]
    stage = abstract_stage(config, range(config.num_layers), jnp.float32)
    params = {
        name: jnp.asarray(np.asarray(source.read(name, whole(shape))).astype(np.float32))
        for name, shape in weight_shapes(config).items()
    }

    @jax.jit
    def run(params):
        model = stage.merge(params)
        hidden = model(jnp.asarray(tokens, jnp.int32), {}, None, remat="none", shard=UNSHARDED)
        return jnp.einsum("bld,dv->blv", hidden[:, -4:], model.unembedding)

    return np.asarray(run(params))


def test_every_family_has_a_golden_checkpoint():
    assert FAMILIES == ["llama2", "llama3.1", "llama3.2", "mistral", "qwen2"]
    assert load_llama_config(GOLDEN / "llama3.2").tie_embeddings
    assert load_llama_config(GOLDEN / "qwen2").qkv_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    config = load_llama_config(GOLDEN / family)
    expected = json.loads((GOLDEN / family / "logits.json").read_text(encoding="utf-8"))["last_four"]
    found = last_logits(config, HFWeights(GOLDEN / family, config))
    np.testing.assert_allclose(found, expected, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE)
    assert np.ptp(expected) > 1


@pytest.mark.parametrize("dtype", ROUNDED)
def test_weights_stored_in_sixteen_bits_in_shards_are_read(tmp_path, dtype):
    config = load_llama_config(GOLDEN / "llama2")
    original = HFWeights(GOLDEN / "llama2", config)
    save_hf(tmp_path / "half", config, original, dtype=dtype, max_shard_bytes=600)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3
    half = HFWeights(tmp_path / "half", config)
    assert half.read("embed", (slice(0, 1), slice(0, 1))).dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    difference = np.abs(last_logits(config, half) - last_logits(config, original)).max()
    assert 0 < difference < ROUNDED[dtype]
