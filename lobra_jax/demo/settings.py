"""The demo's run config: six tasks that differ in nearly everything a task may differ in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lobra_jax.config import RunConfig
from lobra_jax.demo.corpus import Corpus

NUM_DEVICES = 8

SHORT, MEDIUM, LONG = 256, 2048, 5120
"""Context lengths; none cuts an example of the demo's corpus."""

TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "signatures": {
        "context_length": SHORT,
        "batch_size": 48,
        "rank": 8,
        "targets": ["v", "down"],
        "share_of_steps": 0.7,
        "lr": 1e-2,
    },
    "names": {
        "context_length": SHORT,
        "batch_size": 48,
        "rank": 8,
        "share_of_steps": 0.7,
        "lr": 1e-2,
        "schedule": {"kind": "linear", "warmup_steps": 2, "final_fraction": 0.1},
    },
    "errors": {"context_length": SHORT, "batch_size": 32, "rank": 8, "share_of_steps": 0.7, "lr": 5e-3},
    "bodies": {"context_length": MEDIUM, "batch_size": 12, "rank": 16, "lr": 1e-2},
    "classes": {"context_length": LONG, "batch_size": 10, "rank": 16, "lr": 1.5e-2, "rslora": True, "alpha": 8.0},
    "modules": {"context_length": LONG, "batch_size": 2, "rank": 16, "lr": 1e-2, "weight_decay": 0.01},
}
"""What each task sets apart from `COMMON`; `share_of_steps` of the run's steps, after which the task is done. None uses
LoRA dropout, to keep the programs small."""

COMMON: dict[str, Any] = {
    "targets": ["v", "o", "up", "down"],
    "share_of_steps": 1.0,
    "schedule": {"kind": "cosine", "warmup_steps": 3, "final_fraction": 0.1},
}
PLANNER_SETTINGS: dict[str, Any] = {
    "remats": ["none"],  # XLA on CPU merges recomputed values with the first ones: remat saves no memory there
    "max_tp": 4,
    "max_pp": 2,
    "row_options": 1,
}
"""Few programs: most of the demo's time would go into compiling."""

ALPHA_OVER_RANK = 2.0


def run_config(
    corpus: Corpus,
    base: str | Path,
    *,
    steps: int,
    memory_bytes: int | None,
    cache_dir: str | Path,
    num_devices: int = NUM_DEVICES,
) -> RunConfig:
    """The run over `corpus` with the model folder `base`, fp32, on simulated devices that hold `memory_bytes` each.

    Every task is evaluated before its first and after its last step. All paths become absolute.
    """
    raw = {
        "model": {"path": str(Path(base).resolve()), "dtype": "float32"},
        "data": {"cache_dir": str(Path(cache_dir).resolve())},
        "tasks": [
            {
                "name": files.name,
                "files": [str(files.train_file.resolve())],
                "eval_files": [str(files.eval_file.resolve())],
                **_task_settings(files.name, steps),
            }
            for files in corpus.tasks
        ],
        "devices": {"num_devices": num_devices, "simulated": num_devices, "memory_bytes": memory_bytes},
        "planner": PLANNER_SETTINGS,
        "training": {"checkpoint_interval": steps, "eval_replicas": "one"},
    }
    return RunConfig.model_validate(raw)


def _task_settings(name: str, steps: int) -> dict[str, Any]:
    settings = {**COMMON, **TASK_SETTINGS[name]}
    settings["steps"] = max(1, math.ceil(steps * settings.pop("share_of_steps")))
    settings.setdefault("alpha", ALPHA_OVER_RANK * settings["rank"])
    warmup = min(settings["schedule"]["warmup_steps"], settings["steps"])
    settings["schedule"] = {**settings["schedule"], "warmup_steps": warmup}
    return settings
