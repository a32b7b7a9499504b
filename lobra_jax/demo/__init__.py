"""What `lobra demo` needs beside the ordinary commands: real text, a tokenizer, a small base, a run config."""

DEFAULT_STEPS = 40
"""Joint steps of a demo, unless --steps says otherwise."""
