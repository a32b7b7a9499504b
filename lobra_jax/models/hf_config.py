"""`config.json` of Hugging Face models <-> LlamaConfig; what we cannot compute exactly is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobra_jax.models.config import LlamaConfig, RopeScaling
from planner.errors import UserError

MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
"""Supported `model_type` -> its architecture."""

_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_RMS_NORM_EPS = 1e-6
_MISTRAL_DEFAULT_WINDOW = 4096
_ROPE_TYPES = ("default", "llama3")
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
"""May stand beside `rope_parameters` or in it, which goes first."""


def load_llama_config(folder: str | Path) -> LlamaConfig:
    """Reads `config.json` of a Llama 2/3/3.1/3.2, Qwen2/2.5 or Mistral (without sliding window) model folder.

    The config is named after the folder. Raises UserError naming the key for anything else: another architecture,
    a sliding window, an unknown kind of rotary scaling, biases elsewhere than on q, k and v, quantised weights.
    """
    file = Path(folder) / "config.json"
    raw = _load_json(file)
    model_type = _supported_type(raw, file)
    _refuse_what_we_lack(raw, file, model_type)
    hidden_size = _integer(raw, "hidden_size", file)
    num_heads = _integer(raw, "num_attention_heads", file)
    default_kv_heads = num_heads if model_type == "llama" else None
    rope = _rope_settings(raw, file)
    try:
        return LlamaConfig(
            name=Path(folder).resolve().name,
            vocab_size=_integer(raw, "vocab_size", file),
            hidden_size=hidden_size,
            intermediate_size=_integer(raw, "intermediate_size", file),
            num_layers=_integer(raw, "num_hidden_layers", file),
            num_heads=num_heads,
            num_kv_heads=_integer(raw, "num_key_value_heads", file, default=default_kv_heads),
            head_dim=_integer(raw, "head_dim", file, default=hidden_size // num_heads),
            rope_theta=_number(rope, "rope_theta", file, default=_DEFAULT_ROPE_THETA),
            rope_scaling=_rope_scaling(rope, file),
            rms_norm_eps=_number(raw, "rms_norm_eps", file, default=_DEFAULT_RMS_NORM_EPS),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
        )
    except ValueError as error:
        raise UserError(str(error), file=file) from error


def config_json(config: LlamaConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` that makes `transformers` (4 and 5) build this model: Qwen2 with qkv bias, Llama without."""
    model_type = "qwen2" if config.qkv_bias else "llama"
    settings: dict[str, Any] = {
        "architectures": [MODEL_TYPES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
        settings["max_position_embeddings"] = int(
            config.rope_scaling.factor * config.rope_scaling.original_max_positions
        )
    return settings


def _load_json(file: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the model's config: {error.strerror}", file=file, expected="a Hugging Face config.json"
        ) from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", file=file, expected="a Hugging Face config.json") from error
    if not isinstance(raw, Mapping):
        raise UserError("not a mapping", file=file, expected="a Hugging Face config.json")
    return raw


def _supported_type(raw: Mapping[str, Any], file: Path) -> str:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            "unsupported model", file=file, key="model_type", value=model_type, expected=_one_of(MODEL_TYPES)
        )
    architectures = raw.get("architectures") or [MODEL_TYPES[model_type]]
    if architectures != [MODEL_TYPES[model_type]]:
        raise UserError(
            "unsupported architecture",
            file=file,
            key="architectures",
            value=architectures,
            expected=f"[{MODEL_TYPES[model_type]!r}]",
        )
    return model_type


def _refuse_what_we_lack(raw: Mapping[str, Any], file: Path, model_type: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError("unsupported activation", file=file, key="hidden_act", value=raw["hidden_act"], expected="silu")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError("unsupported bias", file=file, key=key, value=raw[key], expected="false")
    if raw.get("quantization_config"):
        raise UserError("quantised weights are unsupported", file=file, key="quantization_config", expected="none")
    _refuse_sliding_window(raw, file, model_type)
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        value = sorted(set(raw["layer_types"]))
        raise UserError("unsupported attention", file=file, key="layer_types", value=value, expected="full_attention")


def _refuse_sliding_window(raw: Mapping[str, Any], file: Path, model_type: str) -> None:
    # A Mistral file without the key means a window; a Qwen2 file's window is off unless `use_sliding_window`.
    window = raw.get("sliding_window", _MISTRAL_DEFAULT_WINDOW if model_type == "mistral" else None)
    if window is not None and (model_type != "qwen2" or raw.get("use_sliding_window")):
        raise UserError(
            "a sliding window is unsupported", file=file, key="sliding_window", value=window, expected="null"
        )


def _rope_settings(raw: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` beside `rope_scaling` as before; both where they agree."""
    beside = {key: raw[key] for key in _ROPE_KEYS if raw.get(key) is not None}
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise UserError("bad value", file=file, key=key, value=raw[key], expected="a mapping or null")
        nested = [name for name, value in (raw.get(key) or {}).items() if isinstance(value, Mapping)]
        if nested:
            expected = "one rotary embedding for all layers"
            raise UserError("unsupported", file=file, key=f"{key}.{nested[0]}", expected=expected)
        if raw.get(key):
            found.append({**beside, **raw[key]})
    settings = found[-1] if found else beside
    meanings = {(other.get("rope_theta"), _rope_scaling(other, file)) for other in found}
    if len(meanings) > 1:
        value = dict(raw["rope_scaling"])
        expected = "the same as in rope_parameters, or one of them"
        raise UserError("contradicts rope_parameters", file=file, key="rope_scaling", value=value, expected=expected)
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        value = settings["partial_rotary_factor"]
        raise UserError("unsupported", file=file, key="partial_rotary_factor", value=value, expected="1.0")
    return settings


def _rope_scaling(rope: Mapping[str, Any], file: Path) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise UserError(
            "unsupported rotary scaling", file=file, key="rope_type", value=rope_type, expected=_one_of(_ROPE_TYPES)
        )
    return RopeScaling(
        factor=_number(rope, "factor", file),
        low_freq_factor=_number(rope, "low_freq_factor", file),
        high_freq_factor=_number(rope, "high_freq_factor", file),
        original_max_positions=_integer(rope, "original_max_position_embeddings", file),
    )


def _integer(raw: Mapping[str, Any], key: str, file: Path, *, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError("bad or missing value", file=file, key=key, value=value, expected="an integer >= 1")
    return value


def _number(raw: Mapping[str, Any], key: str, file: Path, *, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError("bad or missing value", file=file, key=key, value=value, expected="a number > 0")
    return float(value)


def _one_of(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    return "one of " + ", ".join(names)
