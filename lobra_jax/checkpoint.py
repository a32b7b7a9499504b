"""Checkpoints of a run: adapters, optimiser state and data position, never the frozen base. Orbax, synchronous.

A checkpoint is written beside its place and renamed, so it is there whole or not at all; what an interruption left
behind is ignored, and removed at the next save.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lobra_jax.lora import LoraSpec
from planner.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint belongs to, and where its run stood.

    Attributes:
      model, model_fingerprint: of the base (`LlamaConfig.name` and `.fingerprint`).
      tasks: name -> adapter spec, in the order of the adapters' task axis.
      settings: dotted key -> value of whatever else decides what the next step computes (seeds, data, optimisers).
      position: what the run needs to go on beside the step: the tasks that were stopped.
    """

    model: str
    model_fingerprint: str
    tasks: Mapping[str, LoraSpec]
    settings: Mapping[str, Any]
    position: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "tasks": [{"name": name, **dataclasses.asdict(spec)} for name, spec in self.tasks.items()],
            "settings": dict(self.settings),
            "position": dict(self.position),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CheckpointMetadata:
        tasks = {}
        for item in raw["tasks"]:
            fields = {key: value for key, value in item.items() if key != "name"}
            tasks[item["name"]] = LoraSpec(**{**fields, "targets": tuple(fields["targets"])})
        return cls(
            model=raw["model"],
            model_fingerprint=raw["model_fingerprint"],
            tasks=tasks,
            settings=raw["settings"],
            position=raw["position"],
        )


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them kept. A context manager: closing waits for writes."""

    def __init__(self, folder: str | Path, *, keep: int) -> None:
        self.folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,  # a step that is reported saved is on disk
                cleanup_tmp_directories=True,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    def steps(self) -> tuple[int, ...]:
        """Steps that have a whole checkpoint, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: CheckpointMetadata) -> None:
        """Writes `state`, a pytree of JAX arrays (each with a sharding of its own) and NumPy arrays.

        A step that already has a checkpoint keeps it.
        """
        if step in self.steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                metadata=ocp.args.JsonSave(metadata.to_dict()),
            ),
        )

    def metadata(self, step: int) -> CheckpointMetadata:
        """Raises UserError if there is no readable metadata at this step."""
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
            return CheckpointMetadata.from_dict(restored.metadata)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"no readable checkpoint of step {step}: {error}", file=self.folder, expected=f"one of {self.steps()}"
            ) from error

    def check(self, expected: CheckpointMetadata) -> None:
        """Raises UserError if there is a checkpoint and the newest is not of the run that `expected` describes."""
        step = self.latest_step()
        if step is not None:
            _require_same_run(self.metadata(step), expected, self.folder / str(step))

    def restore(self, step: int, target: Any, expected: CheckpointMetadata) -> tuple[Any, Mapping[str, Any]]:
        """The state saved at `step` and its position, bitwise as saved.

        `target` has the state's structure; its leaves say what to restore onto: a `jax.ShapeDtypeStruct` with a
        sharding or a `jax.Array` (its sharding is taken), NumPy leaves as NumPy. `expected` describes the present
        run (its position is not compared). Raises UserError naming what differs: model, tasks, their ranks and so on.
        """
        found = self.metadata(step)
        _require_same_run(found, expected, self.folder / str(step))
        abstract = jax.tree.map(_abstract, target)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored.state, found.position


def _require_same_run(found: CheckpointMetadata, expected: CheckpointMetadata, file: Path) -> None:
    if found.model_fingerprint != expected.model_fingerprint:
        raise UserError(
            "the checkpoint is of another model",
            file=file,
            key="model",
            value=f"{found.model}, fingerprint {found.model_fingerprint}",
            expected=f"{expected.model}, fingerprint {expected.model_fingerprint}",
        )
    if list(found.tasks) != list(expected.tasks):
        raise UserError(
            "the checkpoint is of other tasks",
            file=file,
            key="tasks",
            value=", ".join(found.tasks),
            expected=", ".join(expected.tasks),
        )
    for name, spec in expected.tasks.items():
        for field in dataclasses.fields(LoraSpec):
            saved, wanted = getattr(found.tasks[name], field.name), getattr(spec, field.name)
            if saved != wanted:
                raise UserError(
                    "the checkpoint's adapter differs",
                    file=file,
                    key=f"tasks.{name}.{field.name}",
                    value=saved,
                    expected=f"{wanted!r}, as this run has it",
                )
    for key in sorted(found.settings.keys() | expected.settings.keys()):
        saved, wanted = found.settings.get(key), expected.settings.get(key)
        if saved != wanted:
            raise UserError(
                "the checkpoint is of another run", file=file, key=key, value=saved, expected=f"{wanted!r}, as now"
            )


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf
