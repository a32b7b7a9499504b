"""The configuration of a run: its schema, reading it from YAML or gin with overrides, writing it back."""

from lobra_jax.config.load import load_config, model_config, save_config, select_tasks
from lobra_jax.config.schema import (
    DataConfig,
    DevicesConfig,
    ModelConfig,
    PlannerConfig,
    RunConfig,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
)

__all__ = [
    "DataConfig",
    "DevicesConfig",
    "ModelConfig",
    "PlannerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainingConfig",
    "load_config",
    "model_config",
    "save_config",
    "select_tasks",
]
