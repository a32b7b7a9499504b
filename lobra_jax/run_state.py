"""What a checkpoint of a run holds and which run it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lobra_jax.checkpoint import CheckpointMetadata
from lobra_jax.config import RunConfig
from lobra_jax.data.batches import TaskData
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import weights_digest
from lobra_jax.models.weights import DRAWING
from lobra_jax.reduce import AdapterState
from lobra_jax.tasks import lora_spec

NOT_COMPARED = (
    "name", "files", "dataset", "eval_files", "eval_fraction", "eval_interval", "patience", "steps", "adapter",
    "rank", "alpha", "rslora", "targets", "dropout", "dora",
)  # fmt: skip
"""Keys of a task that a resumed run may change, and those that its adapter spec compares already."""


LAYOUT = 3
"""Of what a checkpoint holds of adapters: 3 has AdamW's last rate, and last good adapters only where
`optim.goes_back` says; 2 has the rank before the feature in both factors, 1 had it behind in `a`."""

NOT_ALWAYS = ("last_good", "averages")
"""Trees of the state that a run need not have."""


def run_metadata(
    config: RunConfig, model: LlamaConfig, tasks: Sequence[TaskData], position: Mapping[str, Any]
) -> CheckpointMetadata:
    """What a run's checkpoints say they belong to: all that decides what the next step computes.

    More `steps` of a task that still trains (rates follow the new number from then on, see `standing.check_steps`),
    other evaluation and other paths to the same data or base are no other run.
    """
    settings: dict[str, Any] = {
        "training.seed": config.training.seed,
        "model.dtype": config.model.dtype,
        "layout of adapters": LAYOUT,
    }
    if config.model.quantization != "none":
        settings["model.quantization"] = config.model.quantization
    if config.model.preset is not None:
        settings["model.init_seed"] = config.model.init_seed
        settings["drawing of random weights"] = DRAWING
    else:
        settings["model.path"] = weights_digest(config.model.path)
    for task, data in zip(config.tasks, tasks, strict=True):
        for name, value in task.model_dump(mode="json").items():
            if name not in NOT_COMPARED:
                settings[f"tasks.{task.name}.{name}"] = value
        settings[f"tasks.{task.name}.examples"] = len(data.train)
        settings[f"tasks.{task.name}.tokens"] = int(data.train.lengths.sum())
    return CheckpointMetadata(
        model=model.name,
        model_fingerprint=model.fingerprint,
        tasks={task.name: lora_spec(task) for task in config.tasks},
        settings=settings,
        position=position,
    )


def state_to_tree(state: AdapterState) -> dict[str, Any]:
    """The state as nested dicts of arrays; optax's own containers become numbered leaves."""
    return {
        "adapters": state.tasks.adapters,
        **{name: tree for name in NOT_ALWAYS if jax.tree.leaves(tree := getattr(state.tasks, name))},
        "moments": {
            layer: {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
            for layer, tree in state.tasks.moments.items()
        },
        "alive": state.alive,
    }


def state_from_tree(tree: dict[str, Any], like: AdapterState) -> AdapterState:
    """The state that `state_to_tree` took apart; `like` is one of the same tasks."""
    moments = {
        layer: jax.tree.unflatten(
            jax.tree.structure(like.tasks.moments[layer]), [leaves[str(i)] for i in range(len(leaves))]
        )
        for layer, leaves in tree["moments"].items()
    }
    tasks = dataclasses.replace(
        like.tasks,
        adapters=tree["adapters"],
        moments=moments,
        **{name: tree.get(name, getattr(like.tasks, name)) for name in NOT_ALWAYS},
    )
    return AdapterState(tasks=tasks, alive=tree["alive"])
