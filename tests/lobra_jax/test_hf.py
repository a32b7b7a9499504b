import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lobra_jax.models.config import LlamaConfig, RopeScaling
from lobra_jax.models.hf import INDEX_FILE, HFWeights, hf_name, save_hf
from lobra_jax.models.hf_config import load_llama_config
from lobra_jax.models.weights import ArrayWeights, RandomWeights, weight_shapes, whole
from planner.errors import UserError

CONFIG = LlamaConfig(
    name="model",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,  # not hidden_size / num_heads
)
LLAMA31 = dataclasses.replace(
    CONFIG,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64),
)
QWEN = dataclasses.replace(CONFIG, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qkv_bias=True, tie_embeddings=True)
VARIANTS = {"llama": CONFIG, "llama3.1": LLAMA31, "qwen2, tied": QWEN}

LLAMA2_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 48,
}
LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def write_config(folder: Path, **changes: Any) -> Path:
    settings = {**LLAMA2_JSON, **changes}
    settings = {key: value for key, value in settings.items() if value is not ...}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def tensors_of(source: Any, config: LlamaConfig) -> dict[str, np.ndarray]:
    return {name: source.read(name, whole(shape)) for name, shape in weight_shapes(config).items()}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 4000], ids=["one file", "shards"])
def test_a_saved_model_reads_back_with_identical_tensors(
    tmp_path: Path, config: LlamaConfig, max_shard_bytes: int
) -> None:
    source = RandomWeights(config, seed=1)
    folder = tmp_path / "model"
    save_hf(folder, config, source, max_shard_bytes=max_shard_bytes)
    assert load_llama_config(folder) == config
    assert (folder / INDEX_FILE).exists() == (max_shard_bytes == 4000)
    stored = HFWeights(folder, config)
    for name, array in tensors_of(source, config).items():
        np.testing.assert_array_equal(stored.read(name, whole(array.shape)), array, err_msg=name)


def test_shards_stay_within_their_limit_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1), max_shard_bytes=4000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == {hf_name(name) for name in weight_shapes(CONFIG)}
    total_bytes = 0
    for file in sorted(set(index["weight_map"].values())):
        sizes = [array.nbytes for array in load_file(tmp_path / file).values()]
        assert sum(sizes) <= 4000 or len(sizes) == 1
        total_bytes += sum(sizes)
    assert index["metadata"]["total_size"] == total_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path, dtype: str) -> None:
    source = RandomWeights(CONFIG, seed=1)
    save_hf(tmp_path, CONFIG, source, dtype=dtype)
    array = HFWeights(tmp_path, CONFIG).read("layers.1.down", whole(weight_shapes(CONFIG)["layers.1.down"]))
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(array, tensors_of(source, CONFIG)["layers.1.down"].astype(array.dtype))


def test_any_slice_equals_the_slice_of_the_whole(tmp_path: Path) -> None:
    source = RandomWeights(QWEN, seed=1)
    save_hf(tmp_path, QWEN, source)
    stored = HFWeights(tmp_path, QWEN)
    for name, array in tensors_of(source, QWEN).items():
        index = tuple(slice(size // 2, None) if dim else slice(None, size // 2) for dim, size in enumerate(array.shape))
        piece = stored.read(name, index)
        np.testing.assert_array_equal(piece, array[index], err_msg=name)
        assert piece.flags.c_contiguous


def test_linears_are_stored_transposed_and_the_embedding_is_not(tmp_path: Path) -> None:
    arrays = tensors_of(RandomWeights(CONFIG, seed=1), CONFIG)
    save_hf(tmp_path, CONFIG, ArrayWeights(arrays))
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["model.layers.1.mlp.gate_proj.weight"], arrays["layers.1.gate"].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], arrays["head"].T)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], arrays["embed"])
    np.testing.assert_array_equal(stored["model.layers.0.input_layernorm.weight"], arrays["layers.0.attn_norm"])


def test_further_config_keys_win_over_ours(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1), extra={"eos_token_id": 7, "rms_norm_eps": 1e-6})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    assert load_llama_config(tmp_path).rms_norm_eps == 1e-6


def test_a_missing_tensor_is_named_with_its_folder(tmp_path: Path) -> None:
    save_hf(tmp_path, QWEN, RandomWeights(QWEN, seed=1))
    with pytest.raises(UserError, match=rf"{tmp_path}: tensor 'lm_head.weight' is missing"):
        HFWeights(tmp_path, dataclasses.replace(QWEN, tie_embeddings=False))


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1))
    wider = dataclasses.replace(CONFIG, intermediate_size=32)
    with pytest.raises(UserError, match=r"model.safetensors: tensor '.*gate_proj.weight' .*\(24, 16\).*\(32, 16\)"):
        HFWeights(tmp_path, wider)


def test_a_tensor_of_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": np.ones(16, np.int8)}, path)
    with pytest.raises(UserError, match=r"'model.norm.weight' has an unsupported dtype \(got 'I8'\)"):
        HFWeights(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "score.weight",
    ],
)
def test_a_tensor_that_would_change_the_numbers_is_not_left_out(tmp_path: Path, name: str) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}, path)
    HFWeights(tmp_path, CONFIG)
    save_file({**tensors, name: np.ones(16, np.float32)}, path)
    with pytest.raises(UserError, match=f"model.safetensors: tensor '{name}' is none of the model"):
        HFWeights(tmp_path, CONFIG)


def test_a_tied_head_may_stand_beside_or_for_the_embedding_but_not_differ(tmp_path: Path) -> None:
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    save_hf(tmp_path, tied, RandomWeights(tied, seed=1))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors[hf_name("embed")]
    for both in (True, False):
        rest = tensors if both else {key: array for key, array in tensors.items() if key != hf_name("embed")}
        save_file({**rest, hf_name("head"): embedding.copy()}, path)
        np.testing.assert_array_equal(HFWeights(tmp_path, tied).read("embed", whole(embedding.shape)), embedding)
    save_file({**tensors, hf_name("head"): embedding + 1}, path)
    with pytest.raises(UserError, match=r"'lm_head.weight' is not the embedding; expected tie_word_embeddings false"):
        HFWeights(tmp_path, tied)


def test_a_shard_that_the_index_names_but_is_not_there_is_named(tmp_path: Path) -> None:
    save_hf(tmp_path, CONFIG, RandomWeights(CONFIG, seed=1), max_shard_bytes=4000)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        HFWeights(tmp_path, CONFIG)


def test_a_folder_without_weights_or_with_a_damaged_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights found; expected model.safetensors"):
        HFWeights(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="model.safetensors: not readable as safetensors"):
        HFWeights(tmp_path, CONFIG)
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(UserError, match="index.json: weight_map: bad index"):
        HFWeights(tmp_path, CONFIG)


def test_llama2_config_is_read(tmp_path: Path) -> None:
    config = load_llama_config(write_config(tmp_path / "llama2"))
    assert config == dataclasses.replace(CONFIG, name="llama2", head_dim=4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA31_SCALING},
        {"rope_scaling": ..., "rope_parameters": {**LLAMA31_SCALING, "rope_theta": 500_000.0}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_llama31_rotary_scaling_is_read_in_both_spellings(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = load_llama_config(write_config(tmp_path / "llama31", **rope))
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )


def test_qwen2_has_qkv_bias_and_its_switched_off_window_is_ignored(tmp_path: Path) -> None:
    config = load_llama_config(
        write_config(
            tmp_path / "qwen",
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            sliding_window=131072,
            use_sliding_window=False,
            tie_word_embeddings=True,
        )
    )
    assert config.qkv_bias and config.tie_embeddings


def test_mistral_without_a_window_is_read(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert not load_llama_config(write_config(tmp_path / "mistral", **mistral, sliding_window=None)).qkv_bias


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "model_type: unsupported model (got 'gemma')"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: unsupported architecture"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "sliding_window"),
        (
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 4096,
                "use_sliding_window": True,
            },
            "sliding_window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: unsupported rotary scaling (got 'dynamic')"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling: bad value (got 'llama3')"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": LLAMA31_SCALING, "rope_parameters": {"rope_type": "default"}}, "rope_scaling: contradicts"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}, "rope_parameters": {"rope_theta": 6.0}},
            "rope_scaling: contradicts",
        ),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    folder = write_config(tmp_path / "model", **changes)
    with pytest.raises(UserError) as caught:
        load_llama_config(folder)
    assert fragment in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_a_missing_or_malformed_config_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: cannot read the model's config"):
        load_llama_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        load_llama_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json: not a mapping"):
        load_llama_config(tmp_path)
