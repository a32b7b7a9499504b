"""The outside world agrees: transformers and peft load what we write, compute what we compute, and the reverse."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.export import export_merged
from lobra_jax.lora import LoraSpec, init_adapters, row_inputs, task_adapter, task_inputs
from lobra_jax.models.config import LlamaConfig, RopeScaling
from lobra_jax.models.hf import HFWeights, hf_name, is_transposed, save_hf
from lobra_jax.models.hf_config import load_llama_config
from lobra_jax.models.llama import abstract_stage
from lobra_jax.models.weights import ArrayWeights, RandomWeights, WeightSource, weight_shapes, whole
from lobra_jax.peft_folder import read_peft_adapter, write_peft_adapter
from lobra_jax.sharding import UNSHARDED
from planner.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

LLAMA = LlamaConfig(
    name="base",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
VARIANTS = {
    "llama": LLAMA,
    "llama, wide heads, tied": dataclasses.replace(LLAMA, head_dim=8, tie_embeddings=True),
    "llama3.1": dataclasses.replace(
        LLAMA,
        rope_theta=500.0,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16),
    ),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rms_norm_eps=1e-6, rope_theta=1e6),
}
SPECS = (
    LoraSpec(rank=2, alpha=6.0, targets=("q", "v", "down")),
    LoraSpec(rank=4, alpha=3.0, rslora=True, targets=("k", "o", "gate", "up")),
    LoraSpec(rank=3, alpha=5.0, targets=("q", "o", "down"), dora=True),
)
TOKENS = np.random.default_rng(0).integers(0, 48, (len(SPECS), 40), dtype=np.int32)
LOGIT_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def trained_adapters(config: LlamaConfig) -> Any:
    """Stacked adapters whose b is not zero, each row of `TOKENS` being for the task of its number."""
    stacked = init_adapters(config, SPECS, seeds=range(len(SPECS)))
    rng = np.random.default_rng(1)
    for targets in stacked.values():
        for pair in targets.values():
            pair["b"] = rng.standard_normal(pair["b"].shape, np.float32) * pair["a"].any(axis=2)[:, :, None]
            pair["m"] = rng.uniform(1, 2, pair["m"].shape).astype(np.float32)
    return stacked


def our_logits(config: LlamaConfig, source: WeightSource, adapters: Any = None) -> np.ndarray:
    """[row, position, vocabulary] of the model on one device; row i with task i's adapter."""
    stage = abstract_stage(config, range(config.num_layers), jnp.float32)
    params = {name: jnp.asarray(source.read(name, whole(shape))) for name, shape in weight_shapes(config).items()}
    rows = None
    if adapters is not None:
        tasks = jax.tree.map(jnp.asarray, task_inputs(SPECS))
        task_ids = jnp.arange(len(SPECS), dtype=jnp.int32)
        rows = row_inputs(tasks, task_ids, task_ids.astype(jnp.uint32), dropout=False)

    @jax.jit
    def run(params: Any, adapters: Any) -> jax.Array:
        model = stage.merge(params)
        hidden = model(jnp.asarray(TOKENS), adapters, rows, remat="none", shard=UNSHARDED)
        return jnp.einsum("bld,dv->blv", hidden, model.unembedding)

    return np.asarray(run(params, adapters if adapters is not None else {}))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


def load_model(folder: Path, dtype: str = "float32") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("max_shard_bytes", [2**30, 4000], ids=["one file", "shards"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_a_saved_model_and_computes_the_same_logits(
    tmp_path: Path, config: LlamaConfig, max_shard_bytes: int
) -> None:
    source = RandomWeights(config, seed=1)
    save_hf(tmp_path, config, source, max_shard_bytes=max_shard_bytes)
    model = load_model(tmp_path)
    loaded = model.state_dict()
    for name, shape in weight_shapes(config).items():
        array = source.read(name, whole(shape))
        np.testing.assert_array_equal(loaded[hf_name(name)].numpy(), array.T if is_transposed(name) else array)
    np.testing.assert_allclose(our_logits(config, source), torch_logits(model), **LOGIT_TOLERANCE)


def test_transformers_loads_bfloat16_as_it_was_written(tmp_path: Path) -> None:
    source = RandomWeights(LLAMA, seed=1)
    save_hf(tmp_path, LLAMA, source, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    down = HFWeights(tmp_path, LLAMA).read("layers.1.down", whole(weight_shapes(LLAMA)["layers.1.down"]))
    stored = model.state_dict()["model.layers.1.mlp.down_proj.weight"].float().numpy()
    np.testing.assert_array_equal(stored, down.astype(np.float32).T)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        (
            "Llama",
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None}),
    ],
    ids=["llama, tied", "llama3.1", "qwen2", "mistral"],
)
def test_a_model_saved_by_transformers_is_read_and_computes_the_same_logits(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants and would hide a mix-up
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    config = load_llama_config(tmp_path)
    logits = our_logits(config, HFWeights(tmp_path, config))
    np.testing.assert_allclose(logits, torch_logits(model), **LOGIT_TOLERANCE)


@pytest.mark.parametrize("config", [LLAMA, VARIANTS["qwen2"]], ids=["llama", "qwen2"])
@pytest.mark.parametrize("task", range(len(SPECS)))
def test_peft_loads_an_adapter_and_computes_what_joint_training_computes(
    tmp_path: Path, config: LlamaConfig, task: int
) -> None:
    source, stacked, spec = RandomWeights(config, seed=1), trained_adapters(config), SPECS[task]
    adapter = task_adapter(stacked, task, spec)
    save_hf(tmp_path / "base", config, source)
    write_peft_adapter(tmp_path / "adapter", spec, adapter, str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    scale = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
    num_adapted = 0
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer, linear = name.split(".")[4], name.split(".")[-1]
            pair = adapter[layer][linear.removesuffix("_proj")]
            delta = module.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(delta, scale * (pair["a"] @ pair["b"]).T, rtol=1e-5, atol=1e-6)
            if spec.dora:
                magnitude = module.lora_magnitude_vector["default"].weight.detach().numpy()
                np.testing.assert_array_equal(magnitude, pair["m"])
            num_adapted += 1
    assert num_adapted == config.num_layers * len(spec.targets)
    ours = our_logits(config, source, stacked)[task]
    assert not np.allclose(ours, our_logits(config, source)[task], atol=1e-2)
    np.testing.assert_allclose(ours, torch_logits(model)[task], **LOGIT_TOLERANCE)


@pytest.mark.parametrize("task", range(len(SPECS)))
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_transformers_loads_a_merged_export_and_computes_the_same_logits(
    tmp_path: Path, config: LlamaConfig, task: int
) -> None:
    source, stacked, spec = RandomWeights(config, seed=1), trained_adapters(config), SPECS[task]
    save_hf(tmp_path / "base", config, source)
    write_peft_adapter(tmp_path / "adapter", spec, task_adapter(stacked, task, spec), "base")
    out = tmp_path / "merged"
    base = {"path": tmp_path / "base", "init_seed": 0, "tokenizer": None}
    export_merged(tmp_path / "adapter", out, config, dtype="float32", **base)
    ours, theirs = our_logits(config, source, stacked)[task], torch_logits(load_model(out))[task]
    np.testing.assert_allclose(ours, theirs, **LOGIT_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_shards_saved_by_transformers_are_read(tmp_path: Path, dtype: str) -> None:
    save_hf(tmp_path / "whole", LLAMA, RandomWeights(LLAMA, seed=1))
    load_model(tmp_path / "whole", dtype).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    config = load_llama_config(tmp_path / "shards")
    theirs = torch_logits(load_model(tmp_path / "shards", "float32"))
    np.testing.assert_allclose(our_logits(config, _as_float32(tmp_path / "shards")), theirs, **LOGIT_TOLERANCE)


def _as_float32(folder: Path) -> ArrayWeights:
    config = load_llama_config(folder)
    stored = HFWeights(folder, config)
    shapes = weight_shapes(config)
    return ArrayWeights({name: stored.read(name, whole(shape)).astype(np.float32) for name, shape in shapes.items()})


def test_merging_over_a_base_saved_by_transformers_keeps_its_settings(tmp_path: Path) -> None:
    settings = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=7,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    transformers.LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = load_llama_config(tmp_path / "base")
    adapter = task_adapter(trained_adapters(config), 0, SPECS[0])
    write_peft_adapter(tmp_path / "adapter", SPECS[0], adapter, "base")
    base = {"path": tmp_path / "base", "init_seed": 0, "tokenizer": None}
    export_merged(tmp_path / "adapter", tmp_path / "merged", config, dtype="float32", **base)
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert (merged.eos_token_id, merged.dtype) == (7, torch.float32)
    assert merged.rope_parameters["rope_theta"] == 500.0
    assert load_llama_config(tmp_path / "merged") == dataclasses.replace(config, name="merged")


@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_an_adapter_saved_by_peft_is_read(tmp_path: Path, rslora: bool, dora: bool) -> None:
    save_hf(tmp_path / "base", LLAMA, RandomWeights(LLAMA, seed=1))
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(load_model(tmp_path / "base"), settings)
    model.save_pretrained(tmp_path / "adapter")
    spec, adapter = read_peft_adapter(tmp_path / "adapter")
    assert spec == LoraSpec(rank=3, alpha=5, rslora=rslora, targets=("q", "up"), dora=dora)
    module = model.base_model.model.model.layers[1].self_attn.q_proj
    delta = module.get_delta_weight("default").detach().numpy()
    pair = adapter["1"]["q"]
    np.testing.assert_allclose(spec.scale * (pair["a"] @ pair["b"]).T, delta, rtol=1e-5, atol=1e-6)
    if dora:
        np.testing.assert_array_equal(pair["m"], module.lora_magnitude_vector["default"].weight.detach().numpy())


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"target_modules": r".*\.(q_proj|o_proj)"}, ("q", "o")),
        ({"target_modules": ["self_attn.q_proj", *(f"model.layers.{i}.mlp.up_proj" for i in range(2))]}, ("q", "up")),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj"}, ("q",)),
    ],
    ids=["pattern", "ends and whole names", "excluded"],
)
def test_linears_named_as_peft_allows_are_found(tmp_path: Path, settings: dict, targets: tuple[str, ...]) -> None:
    save_hf(tmp_path / "base", LLAMA, RandomWeights(LLAMA, seed=1))
    model = peft.get_peft_model(load_model(tmp_path / "base"), peft.LoraConfig(r=2, lora_alpha=4, **settings))
    model.save_pretrained(tmp_path / "adapter")
    spec, adapter = read_peft_adapter(tmp_path / "adapter")
    assert spec.targets == targets
    assert list(adapter) == ["0", "1"]
    assert all(set(pairs) == set(targets) for pairs in adapter.values())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_a_base_that_peft_changed_is_refused(tmp_path: Path, start: str) -> None:
    save_hf(tmp_path / "base", LLAMA, RandomWeights(LLAMA, seed=1))
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(load_model(tmp_path / "base"), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="init_lora_weights: unsupported"):
        read_peft_adapter(tmp_path / "adapter")
