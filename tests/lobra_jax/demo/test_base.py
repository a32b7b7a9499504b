"""Pre-training of the demo's base, on shapes small enough to train in a test."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lobra_jax.demo import base
from lobra_jax.demo.corpus import Corpus
from lobra_jax.demo.tokenizer import EOS, SPECIAL_TOKENS
from lobra_jax.models.hf import HFWeights
from lobra_jax.models.hf_config import load_llama_config
from lobra_jax.models.weights import weight_shapes, whole

SMALL = dataclasses.replace(
    base.BASE,
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
)
STEPS = 60


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """Tokens that follow one another by a rule, so that there is something to learn."""
    return (np.arange(4000, dtype=np.int32) * 5 // 2) % SMALL.vocab_size


@pytest.fixture(scope="module")
def trained(stream: np.ndarray) -> base.Pretrained:
    return base.pretrain(SMALL, stream, steps=STEPS)


def test_pretraining_lowers_the_loss(trained: base.Pretrained) -> None:
    assert trained.num_steps == STEPS
    assert trained.loss < 0.8 * np.log(SMALL.vocab_size)


def test_pretraining_gives_every_weight_in_fp32(trained: base.Pretrained) -> None:
    assert {name: value.shape for name, value in trained.params.items()} == weight_shapes(SMALL)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in trained.params.values())


def test_pretraining_again_gives_the_same_weights(stream: np.ndarray, trained: base.Pretrained) -> None:
    again = base.pretrain(SMALL, stream, steps=STEPS)
    assert all(np.array_equal(again.params[name], value) for name, value in trained.params.items())


def test_learning_rate_warms_up_to_its_peak_and_falls_to_zero() -> None:
    rates = [base.learning_rate(progress) for progress in np.linspace(0, 1, 200)]
    assert 0 < rates[0] < base.PEAK_LR / 5
    assert max(rates) == pytest.approx(base.PEAK_LR, rel=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_windows_grow_longer_as_the_phases_say() -> None:
    shapes = list(base.window_shapes(base.DEFAULT_STEPS))
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    for share, rows, length in base.PHASES:
        assert Counter(shapes)[rows, length] == pytest.approx(share * base.DEFAULT_STEPS, abs=1)


def test_the_base_can_be_sharded_widely() -> None:
    assert all(base.BASE.supports_tp(tp) for tp in (1, 2, 4))


def test_the_command_writes_a_model_folder(
    corpus: Corpus, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(SMALL, vocab_size=base.BASE.vocab_size)
    monkeypatch.setattr(base, "BASE", small)
    monkeypatch.setattr(base, "configure", lambda *_, **__: None)  # this process has its devices already
    arguments = ["--corpus", corpus.base_file, "--tokenizer", tokenizer_file, "--out", tmp_path / "base", "--steps", 2]
    result = CliRunner().invoke(base.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0 and "2 steps" in result.output
    config = load_llama_config(tmp_path / "base")
    assert config.fingerprint == small.fingerprint
    assert HFWeights(tmp_path / "base", config).read("embed", whole((2048, 16))).shape == (2048, 16)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["eos_token_id"] == SPECIAL_TOKENS.index(EOS)
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
