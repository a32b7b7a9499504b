"""The base model: its shape, its presets, its weights in and out."""
