"""What tests of the commands that measure share."""

import json

import pytest


@pytest.fixture(scope="session")
def tiny_config_json():
    """The text of a model folder's config.json: two layers of a few hundred weights."""
    return json.dumps(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        }
    )


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Tests change functions that are traced, which programs kept by an earlier test would not know of."""
    monkeypatch.setattr("lobra_jax.kept_programs.programs_folder", lambda: None)
