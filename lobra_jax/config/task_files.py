"""Ready tasks: `use: PATH` in a task takes the keys of that YAML file, under those that stand beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lobra_jax.config.schema import TaskConfig
from lobra_jax.config.yaml_file import read_yaml
from planner.errors import UserError

USE = "use"
EXPECTED = "a YAML file with the keys of one task"


def include_task_files(raw: dict[str, Any], path: Path) -> None:
    """Replaces each `use` in the raw config `raw` of file `path` by what it names.

    Relative paths inside a task's file count from that file's folder. Raises `UserError`.
    """
    tasks = raw.get("tasks")
    if not isinstance(tasks, list):
        return
    for index, task in enumerate(tasks):
        if isinstance(task, dict) and USE in task:
            own = {key: value for key, value in task.items() if key != USE}
            tasks[index] = {**_task_file(task[USE], path, f"tasks.{task.get('name', index)}.{USE}"), **own}


def _task_file(name: Any, path: Path, key: str) -> dict[str, Any]:
    if not isinstance(name, str):
        raise UserError("not a path", file=path, key=key, value=name, expected=EXPECTED)
    file = path.parent / name
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot read the task's file: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        raise UserError(problem, file=path, key=key, value=name, expected=EXPECTED) from error
    task = read_yaml(text, file, keys=TaskConfig.model_fields)
    for found in task:
        if found not in TaskConfig.model_fields:
            raise UserError(f"unknown key {found!r}", file=file, expected=EXPECTED)
    return _with_paths_from(file.parent, task)


def _with_paths_from(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return os.path.join(folder, os.path.expanduser(value)) if isinstance(value, str) else value

    out = {key: resolved(value) if key in ("files", "eval_files", "adapter") else value for key, value in task.items()}
    if isinstance(out.get("dataset"), dict) and "path" in out["dataset"]:
        out["dataset"] = {**out["dataset"], "path": resolved(out["dataset"]["path"])}
    return out
