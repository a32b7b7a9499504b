"""`--set key=value`: dotted keys into the raw config, tasks by name, by number or all at once."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from planner.errors import UserError
from planner.yaml_text import parse_yaml

EVERY_TASK = "*"


Location = tuple[str | int, ...]
"""Where a value stands in the raw config, as pydantic reports it: ("tasks", 0, "lr")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """One `--set`: its text, the dotted key, the value as YAML reads it, the places it went to once applied."""

    text: str
    key: str
    value: Any
    places: tuple[Location, ...] = ()


def parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        expected = "key=value such as training.seed=1 or tasks.NAME.lr=1e-3"
        raise UserError("bad override", file=f"--set {text}", expected=expected)
    value = parse_yaml(value, file=f"--set {text}", key=key, expected="a YAML value")
    return Override(text=text, key=key, value=value)


def apply_override(raw: dict[str, Any], override: Override) -> Override:
    """Sets the value in `raw`, making the sections on the way; returns the override with its places."""
    places = _places(override, raw)
    for location in places:
        place: Any = raw
        keys: Location = location
        if len(location) > 1 and isinstance(location[1], int):
            place, keys = raw["tasks"][location[1]], location[2:]
        for key in keys[:-1]:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise UserError(f"{key!r} is not a section", file=f"--set {override.text}", expected="a section's key")
        place[keys[-1]] = copy.deepcopy(override.value)
    return dataclasses.replace(override, places=tuple(places))


def _places(override: Override, raw: dict[str, Any]) -> list[Location]:
    """The places in `raw` that the key means: one, or one a task for "tasks.*"."""
    head, _, rest = override.key.partition(".")
    tasks = raw.get("tasks")
    if head != "tasks" or not rest or not isinstance(tasks, list):
        return [tuple(override.key.split("."))]
    names = [task.get("name") if isinstance(task, dict) else None for task in tasks]
    # A name may hold dots and one may begin another: the longest that fits is meant.
    fitting = [name for name in names if isinstance(name, str) and f"{rest}.".startswith(f"{name}.")]
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
