"""What the files and folders of a run directory are called, see docs/file-formats.md."""

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.yaml"
COSTS_FILE = "costs.json"
LENGTHS_FILE = "lengths.json"

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TIMELINE_FILE = "timeline.json"

CHECKPOINTS_FOLDER = "checkpoints"
ADAPTERS_FOLDER = "adapters"
BEST_FOLDER = "best"
"""Beside the adapters as they are last: each task's at its lowest held-out loss."""

TRACE_FOLDER = "trace"
TRACED_RUN_FILE = "traced_run.json"
"""In that, beside what JAX's profiler writes."""
