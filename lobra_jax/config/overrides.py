"""`--set key=value`: dotted keys into the raw config, tasks by name, by number or all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from planner.errors import UserError

EVERY_TASK = "*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """One `--set`: its text, the dotted key, the value as YAML reads it."""

    text: str
    key: str
    value: Any

    def covers(self, location: tuple[str | int, ...], raw: dict[str, Any]) -> bool:
        """Whether the value at `location` of the raw config came from this override."""
        try:
            paths = resolve(self, raw)
        except UserError:
            return False
        return any(location[: len(path)] == path for path in paths)


def parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError("bad override", file=f"--set {text}", expected="key=value such as training.seed=1 or tasks.a.lr=1e-3")
    try:
        return Override(text=text, key=key, value=yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise UserError("the value is not YAML", file=f"--set {text}", key=key, value=value) from error


def apply_override(raw: dict[str, Any], override: Override) -> None:
    """Sets the value in `raw`, making the sections on the way."""
    for path in resolve(override, raw):
        place: Any = raw
        for part in path[:-1]:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict | list):
                raise UserError(f"{part!r} holds a single value", file=f"--set {override.text}", expected="a section")
        place[path[-1]] = override.value


def resolve(override: Override, raw: dict[str, Any]) -> list[tuple[str | int, ...]]:
    """The places in `raw` that the key means: one, or one a task for "tasks.*"."""
    head, _, rest = override.key.partition(".")
    tasks = raw.get("tasks")
    if head != "tasks" or not rest or not isinstance(tasks, list):
        return [tuple(override.key.split("."))]
    names = [task.get("name") if isinstance(task, dict) else None for task in tasks]
    # A name may hold dots and one may begin another: the longest that fits is meant.
    fitting = [name for name in names if isinstance(name, str) and rest.startswith(f"{name}.")]
    if fitting:
        name = max(fitting, key=len)
        indices, rest = [names.index(name)], rest[len(name) + 1 :]
    else:
        first, _, rest = rest.partition(".")
        if first == EVERY_TASK:
            indices = list(range(len(tasks)))
        elif first.isdecimal() and int(first) < len(tasks):
            indices = [int(first)]
        else:
            known = ", ".join(str(name) for name in names)
            raise UserError(
                f"unknown task {first!r}",
                file=f"--set {override.text}",
                expected=f"one of {known}, a number below {len(tasks)} or *",
            )
    if not rest or not all(isinstance(tasks[index], dict) for index in indices):
        raise UserError("no key of a task", file=f"--set {override.text}", expected="tasks.NAME.key=value")
    return [("tasks", index, *rest.split(".")) for index in indices]
