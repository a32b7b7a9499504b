import dataclasses
import math
import os
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from lobra_jax.models import weights
from lobra_jax.models.config import PRESETS
from lobra_jax.models.weights import ArrayWeights, RandomWeights, numpy_dtype, weight_shapes, whole

TINY = PRESETS["tiny"]


def read_all(source: RandomWeights, name: str) -> np.ndarray:
    return source.read(name, whole(weight_shapes(source.config)[name]))


def test_weight_shapes_count_the_published_parameters() -> None:
    published = {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3.1-8b": 8_030_261_248,
        "qwen2.5-7b": 7_615_616_512,
    }
    for name, num_parameters in published.items():
        assert sum(int(np.prod(shape)) for shape in weight_shapes(PRESETS[name]).values()) == num_parameters


def test_tied_embeddings_have_no_head_and_biases_appear_with_qkv_bias() -> None:
    tied = weight_shapes(dataclasses.replace(TINY, tie_embeddings=True, qkv_bias=True))
    assert "head" not in tied
    assert tied["layers.3.k_bias"] == (TINY.num_kv_heads * TINY.head_dim,)
    assert "layers.0.o_bias" not in tied
    assert "layers.0.q_bias" not in weight_shapes(TINY)


def test_a_random_tensor_does_not_depend_on_how_it_is_sliced_or_what_was_read_before() -> None:
    shape = weight_shapes(TINY)["layers.1.up"]
    expected = read_all(RandomWeights(TINY, seed=3), "layers.1.up")
    source = RandomWeights(TINY, seed=3)
    half = shape[1] // 2
    right = source.read("layers.1.up", (slice(None), slice(half, None)))
    source.read("embed", (slice(0, 1), slice(0, 1)))
    left = source.read("layers.1.up", (slice(0, shape[0], None), slice(0, half)))
    np.testing.assert_array_equal(np.concatenate([left, right], axis=1), expected)


def test_random_tensors_differ_by_seed_and_by_name() -> None:
    first, second = RandomWeights(TINY, seed=0), RandomWeights(TINY, seed=1)
    assert not np.array_equal(read_all(first, "layers.0.q"), read_all(second, "layers.0.q"))
    assert not np.array_equal(read_all(first, "layers.0.q"), read_all(first, "layers.1.q"))


def test_large_random_tensors_come_from_streams_of_their_own(monkeypatch) -> None:
    """Whatever the number of threads, and no stream twice."""
    monkeypatch.setattr(weights, "BLOCK_SIZE", 1000)
    whole_tensor = read_all(RandomWeights(TINY, seed=0), "layers.0.q").reshape(-1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    np.testing.assert_array_equal(read_all(RandomWeights(TINY, seed=0), "layers.0.q").reshape(-1), whole_tensor)
    blocks = [tuple(whole_tensor[start : start + 1000]) for start in range(0, len(whole_tensor), 1000)]
    assert len(set(blocks)) == len(blocks) > 3


def test_random_weights_are_rounded_to_the_dtype_they_are_kept_in() -> None:
    exact = read_all(RandomWeights(TINY, seed=0), "layers.0.q")
    kept = read_all(RandomWeights(TINY, 0, numpy_dtype("bfloat16")), "layers.0.q")
    assert kept.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kept, exact.astype(ml_dtypes.bfloat16))


def test_random_weights_have_the_stated_spread() -> None:
    source = RandomWeights(TINY, seed=0)
    np.testing.assert_array_equal(read_all(source, "layers.2.mlp_norm"), np.ones(TINY.hidden_size, np.float32))
    assert read_all(source, "embed").std() == pytest.approx(0.02, rel=0.05)
    assert read_all(source, "layers.0.gate").std() == pytest.approx(TINY.hidden_size**-0.5, rel=0.05)
    residual = (TINY.intermediate_size * 2 * TINY.num_layers) ** -0.5
    assert read_all(source, "layers.0.down").std() == pytest.approx(residual, rel=0.05)
    assert {read_all(source, name).dtype for name in ("embed", "final_norm", "layers.0.o")} == {np.dtype(np.float32)}


def test_random_weights_are_normal() -> None:
    values = np.sort(read_all(RandomWeights(TINY, seed=0), "head").reshape(-1) / 0.02)
    expected = np.array([NormalDist().cdf(float(value)) for value in values])
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(expected - ranks).max() < 1.63 / math.sqrt(len(values))  # Kolmogorov and Smirnov's test, at 1 %
    assert np.mean(values**4) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("source", [RandomWeights(TINY, seed=0), ArrayWeights({"embed": np.zeros((2, 2))})])
def test_a_name_the_model_lacks_is_a_key_error(source: RandomWeights | ArrayWeights) -> None:
    with pytest.raises(KeyError, match="layers.99.q"):
        source.read("layers.99.q", (slice(None), slice(None)))


def test_array_weights_hand_out_slices() -> None:
    embed = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(
        ArrayWeights({"embed": embed}).read("embed", (slice(1, 3), slice(0, 2))), [[4, 5], [8, 9]]
    )
