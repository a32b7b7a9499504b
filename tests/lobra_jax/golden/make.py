"""Makes the golden checkpoints beside this file with `transformers`: `python tests/lobra_jax/golden/make.py`.

Each folder is a small model as `transformers` saves it, with the logits that it computes for `TOKENS`, so that the
check of our logits runs where torch is not installed. Needs the extra `parity`.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TOKENS = np.random.RandomState(0).randint(0, 32, (2, 24))
SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2": ("Llama", {"rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 4}),
}


def make(name: str) -> None:
    import torch
    import transformers

    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants and would hide a mix-up
            parameter.add_(0.3 * torch.randn_like(parameter))
        logits = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    values = {"transformers": transformers.__version__, "torch": torch.__version__, "tokens": TOKENS.tolist()}
    rounded = np.round(logits[:, -4:].astype(np.float64), 6).tolist()
    (HERE / name / "logits.json").write_text(json.dumps({**values, "last_four": rounded}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for family in FAMILIES:
        make(family)
