"""Shapes of Llama-family models: the config type, the presets, reading `config.json`. Imports no JAX."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from planner.errors import UserError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linears of a Llama layer, in the order they run; adapters attach to these."""

QUANTIZATIONS = ("none", "int8", "nf4", "fp8")
"""How a base's linears may be stored (`models.quantized`)."""

NF4_BLOCK = 64
"""Weights that share a scale with quantization nf4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3.1's frequency-dependent stretch of the rotary embedding."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that decides the shapes and the arithmetic of a base model."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"LlamaConfig.{field.name} = {value!r}: expected an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig.head_dim = {self.head_dim}: rotary embedding expects an even number")

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each adaptable linear."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}

    @property
    def fingerprint(self) -> str:
        """Hash of everything but the name: a cost table or checkpoint of another shape does not match."""
        shape = {k: v for k, v in dataclasses.asdict(self).items() if k != "name"}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def supports_tp(self, tp: int) -> bool:
        """Whether heads, key/value heads and feed-forward divide over `tp` devices; the vocabulary need not."""
        return all(size % tp == 0 for size in (self.num_heads, self.num_kv_heads, self.intermediate_size))


def check_quantization(config: LlamaConfig, quantization: str) -> None:
    """Refuses a quantisation that the model's shape does not have."""
    if quantization == "nf4" and config.hidden_size % NF4_BLOCK:
        raise UserError(
            f"{config.name} has hidden size {config.hidden_size}",
            key="model.quantization",
            value=quantization,
            expected=f"a hidden size that is a multiple of {NF4_BLOCK}, or int8",
        )


def _preset(name: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, **rest: Any) -> LlamaConfig:
    return LlamaConfig(
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=hidden // heads,
        **rest,
    )


_LLAMA31_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
_LLAMA31 = {"rope_theta": 500_000.0, "rope_scaling": _LLAMA31_ROPE}
_QWEN25 = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "qkv_bias": True}

PRESETS: dict[str, LlamaConfig] = {
    config.name: config
    for config in (
        _preset("tiny", 512, 64, 160, 4, 8, 8),
        _preset("llama2-7b", 32_000, 4096, 11_008, 32, 32, 32),
        _preset("llama2-13b", 32_000, 5120, 13_824, 40, 40, 40),
        _preset("llama2-70b", 32_000, 8192, 28_672, 80, 64, 8),
        _preset("llama3.1-8b", 128_256, 4096, 14_336, 32, 32, 8, **_LLAMA31),
        _preset("llama3.1-70b", 128_256, 8192, 28_672, 80, 64, 8, **_LLAMA31),
        _preset("qwen2.5-7b", 152_064, 3584, 18_944, 28, 28, 4, **_QWEN25),
        _preset("qwen2.5-32b", 152_064, 5120, 27_648, 64, 40, 8, **_QWEN25),
        _preset("lobra-32b", 32_000, 6656, 17_920, 60, 64, 64),
        _preset("lobra-70b", 32_000, 8192, 28_672, 80, 64, 64),
    )
}
"""Model shapes by name. `lobra-*` are the shapes of the LobRA paper (no grouped-query attention)."""
