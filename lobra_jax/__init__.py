"""Runs: joint fine-tuning of many LoRA adapters over one frozen Llama-family model on replicas of unlike shape."""

__version__ = "0.1.0"
