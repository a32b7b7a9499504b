"""What an adapter is, beside its numbers. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math

from lobra_jax.models.config import TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """One task's adapter: rank, alpha, scaling rule, adapted linears, dropout on the adapter's input.

    `dora` (Liu et al., 2024) gives each output feature of an adapted linear a magnitude that is trained as well.
    """

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoraSpec.rank = {self.rank}: expected >= 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraSpec.dropout = {self.dropout}: expected 0 <= dropout < 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"LoraSpec.targets = {self.targets}: expected some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
