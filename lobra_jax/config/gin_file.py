"""Reads the run config's fields from a gin file, with gin's own parser but without its global registry.

    ModelConfig.preset = "tiny"
    TaskConfig.rank = 8                     # without a scope: for every task
    dolly/TaskConfig.files = ["dolly.jsonl"]
    dolly/TaskConfig.lr = %LR               # the scope is the task's name
    dolly/ScheduleConfig.kind = "cosine"
    LR = 1e-3                               # a macro

Tasks come in the order in which their scopes first appear, or as `RunConfig.tasks = ["dolly", ...]` says; an element
may also be a dictionary of a task's keys, which is how to name a task that is no identifier. `include "other.gin"` is
taken from the folder of the including file; imports and @references are refused: a config is data.
"""

from __future__ import annotations

import dataclasses
import tokenize
from pathlib import Path
from typing import Any

from gin import config_parser

from lobra_jax.config.fields import did_you_mean, one_of
from planner.errors import UserError

SECTIONS = {
    "ModelConfig": "model",
    "DataConfig": "data",
    "DevicesConfig": "devices",
    "PlannerConfig": "planner",
    "TrainingConfig": "training",
}
TASK_CLASSES = ("TaskConfig", "ScheduleConfig")
CLASSES = ("RunConfig", *SECTIONS, *TASK_CLASSES)


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Macros are kept to be looked up at the end, references to be refused with their place."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def read_gin(text: str, path: Path) -> dict[str, Any]:
    """The raw config, as YAML would give it. Raises `UserError` with file and line."""
    statements = _statements(text, path, including=(path.resolve(),))
    macros = {s.selector: s.value for _, s in statements if not s.arg_name}
    raw: dict[str, Any] = {}
    listed: list[Any] | None = None
    defaults: dict[str, Any] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for file, statement in statements:
        if not statement.arg_name:
            continue
        where = f"{file}:{statement.location.line_num}"
        value = _expand(statement.value, macros, where)
        selector = statement.selector
        if selector not in CLASSES:
            problem = f"unknown class {selector!r}{did_you_mean(selector, CLASSES)}"
            raise UserError(problem, file=where, expected=one_of(CLASSES))
        if statement.scope and selector not in TASK_CLASSES:
            raise UserError(f"a scope before {selector}", file=where, value=statement.scope, expected="none")
        if selector in TASK_CLASSES:
            place = tasks.setdefault(statement.scope, {}) if statement.scope else defaults
            if selector == "ScheduleConfig":
                place = _subsection(place, "schedule", where)
        elif selector == "RunConfig" and statement.arg_name == "tasks":
            listed = _task_list(value, where)
            continue
        else:
            place = raw if selector == "RunConfig" else _subsection(raw, SECTIONS[selector], where)
        place[statement.arg_name] = value
    raw["tasks"] = _merge_tasks(listed, defaults, tasks, path)
    return raw


def _statements(
    text: str, path: Path, including: tuple[Path, ...]
) -> list[tuple[Path, config_parser.BindingStatement]]:
    """All bindings with the file they stand in, included files in place."""
    out: list[tuple[Path, config_parser.BindingStatement]] = []
    for statement in _parsed(text, path):
        if isinstance(statement, config_parser.BindingStatement):
            out.append((path, statement))
        elif isinstance(statement, config_parser.IncludeStatement):
            out.extend(_include(path.parent / statement.filename, path, statement, including))
        elif isinstance(statement, config_parser.ImportStatement):
            where = f"{path}:{statement.location.line_num}"
            raise UserError("an import", file=where, expected='bindings such as ModelConfig.preset = "tiny"')
    return out


def _parsed(text: str, path: Path) -> list[Any]:
    """The statements as gin's parser gives them."""
    try:
        return list(config_parser.ConfigParser(text, _Delegate()))
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise UserError(f"not gin: {error.msg}", file=f"{path}{line}", expected="CLASS.key = value") from error
    except tokenize.TokenError as error:
        says, (line, _) = error.args
        raise UserError(f"not gin: {says}", file=f"{path}:{line}", expected="CLASS.key = value") from error
    except (TypeError, RecursionError) as error:  # a list as a key; too many levels
        raise UserError(f"not gin: {error.args[0]}", file=path, expected="CLASS.key = value") from error


def _include(
    file: Path, path: Path, statement: config_parser.IncludeStatement, including: tuple[Path, ...]
) -> list[tuple[Path, config_parser.BindingStatement]]:
    where = f"{path}:{statement.location.line_num}"
    if file.resolve() in including:
        raise UserError("a file includes itself", file=where, value=statement.filename, expected="no cycle")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"cannot read the included file: {error.strerror}"
        raise UserError(problem, file=where, value=statement.filename, expected="a gin file") from error
    except UnicodeDecodeError as error:
        problem = "the included file is not UTF-8 text"
        raise UserError(problem, file=where, value=statement.filename, expected="a gin file") from error
    return _statements(text, file, (*including, file.resolve()))


def _expand(value: Any, macros: dict[str, Any], where: str, within: tuple[str, ...] = ()) -> Any:
    """`value` with its macros replaced, however deep they stand."""
    if isinstance(value, _Reference):
        raise UserError("a reference", file=where, value=f"@{value.name}", expected="a plain value: a config is data")
    if isinstance(value, _Macro):
        if value.name not in macros or value.name in within:
            problem = "a macro that refers to itself" if value.name in macros else "unknown macro"
            raise UserError(problem, file=where, value=f"%{value.name}", expected=f"{value.name} = value")
        return _expand(macros[value.name], macros, where, (*within, value.name))
    if isinstance(value, list | tuple):
        return [_expand(item, macros, where, within) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, macros, where, within) for key, item in value.items()}
    return value


def _subsection(place: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    section = place.setdefault(key, {})
    if not isinstance(section, dict):
        raise UserError(f"{key} was given a single value before", file=where, expected="a dictionary")
    return section


def _task_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, str | dict) for item in value):
        raise UserError("bad value", file=where, key="RunConfig.tasks", expected="a list of task names or dictionaries")
    return value


def _merge_tasks(
    listed: list[Any] | None, defaults: dict[str, Any], tasks: dict[str, dict[str, Any]], path: Path
) -> list[dict[str, Any]]:
    """One dictionary a task: unscoped bindings, over them the list's element, over them the scoped bindings."""
    items = list(tasks) if listed is None else listed
    elements = [{"name": item} if isinstance(item, str) else item for item in items]
    names = [element.get("name") for element in elements]
    for name in tasks:
        if name not in names:
            known = [str(n) for n in names]
            problem = f"task {name!r} is not in RunConfig.tasks{did_you_mean(name, known)}"
            raise UserError(problem, file=path, expected=one_of(known))
    merged = []
    for element in elements:
        name = element.get("name")
        own = tasks.get(name, {}) if isinstance(name, str) else {}
        task = {**defaults, **element, **own}
        layers = [part["schedule"] for part in (defaults, element, own) if isinstance(part.get("schedule"), dict)]
        if layers and isinstance(task["schedule"], dict):
            task["schedule"] = {key: value for layer in layers for key, value in layer.items()}
        merged.append(task)
    return merged
