"""What holds where no flag and no config says otherwise. Imports nothing: a config is read without the planner."""

DEFAULT_COMPILE_S = 3.0
"""Seconds that compiling one program adds to the start of a run: a Llama-2-7B micro-batch step of one stage with its
layers in a scan, on one H200 with JAX 0.11.2 (the probe of the design; 12 s with the layers unrolled)."""

DEFAULT_STEPS = 1000
"""Steps that compile time is spread over where no run says how many it has."""

DEFAULT_SAMPLES = 64
"""Batches that a plan is chosen over with `robust`."""

DEFAULT_MAX_BUCKETS = 16
"""Most padded lengths in use in one step."""

DEFAULT_DISPATCH_TIME_LIMIT_S = 30.0
"""A safety net, see `planner.dispatch.dispatch`."""
