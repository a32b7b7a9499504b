"""Text in, token batches out. NumPy only."""
