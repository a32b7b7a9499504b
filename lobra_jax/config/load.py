"""Reads a run config: YAML or gin file, `--set` overrides, validation; writes it back resolved.

Every mistake is a `UserError` of one line: file (or the `--set` it came from), key, value, what was expected.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lobra_jax.config.fields import NAME_PATTERN, USER_ERROR_TYPE, did_you_mean, one_of
from lobra_jax.config.gin_file import read_gin
from lobra_jax.config.overrides import Location, Override, apply_override, parse_override
from lobra_jax.config.schema import RunConfig
from lobra_jax.config.task_files import include_task_files
from lobra_jax.config.yaml_file import read_yaml
from lobra_jax.data.sources import FILE_KINDS, expand
from lobra_jax.models.config import PRESETS, LlamaConfig, check_quantization
from lobra_jax.models.hf_config import load_llama_config
from planner.errors import UserError
from planner.files import write_whole

MAX_SHOWN_ITEMS = 8
"""Longer lists are left out of error lines."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> RunConfig:
    """Reads and checks a config.

    Args:
      path: `.yaml`, `.yml` or `.gin`.
      overrides: "key=value" each, dotted keys: "training.seed=1", "tasks.dolly.lr=1e-3", "tasks.0.lr=1e-3",
        "tasks.*.steps=5"; later ones win. Values are read as YAML.
      check_files: whether the data files, histogram, tokenizer and model folder that the config names must exist.

    Relative paths, in overrides too, count from the config file's folder.
    """
    path = Path(path)
    raw = _read(path)
    include_task_files(raw, path.resolve())
    applied = [apply_override(raw, parse_override(text)) for text in overrides]
    try:
        config = RunConfig.model_validate(raw, context={"folder": path.resolve().parent, "check_files": check_files})
    except ValidationError as error:
        raise _first_error(error, raw, path, applied) from error
    if check_files:
        _check_files(config, path)
    return config


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the config with every default and absolute paths; loads again equal from anywhere."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, text)


def select_tasks(config: RunConfig, names: Iterable[str]) -> RunConfig:
    """The config with only the named tasks, in the config's order; an unknown name raises `UserError`."""
    names = list(names)
    known = [task.name for task in config.tasks]
    for name in names:
        if name not in known:
            raise UserError(f"unknown task {name!r}{did_you_mean(name, known)}", key="--tasks", expected=one_of(known))
    if not names:
        raise UserError("no task named", key="--tasks", expected=f"one or more of {', '.join(known)}")
    return config.model_copy(update={"tasks": tuple(task for task in config.tasks if task.name in names)})


def model_config(config: RunConfig) -> LlamaConfig:
    """Shapes of the base model: a preset's, or those of the Hugging Face folder's config.json."""
    preset = config.model.preset
    model = PRESETS[preset] if preset is not None else load_llama_config(config.model.path)
    check_quantization(model, config.model.quantization)
    return model


def _read(path: Path) -> dict[str, Any]:
    expected = "a YAML or gin file"
    if path.suffix not in (".yaml", ".yml", ".gin"):
        raise UserError(f"unknown kind of config {path.suffix!r}", file=path, expected="a .yaml, .yml or .gin file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", file=path, expected=expected) from error
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", file=path, expected=expected) from error
    if path.suffix == ".gin":
        return read_gin(text, path)
    return read_yaml(text, path, keys=RunConfig.model_fields)


def _first_error(error: ValidationError, raw: dict[str, Any], path: Path, overrides: Sequence[Override]) -> UserError:
    """The most telling of pydantic's errors: a misspelt key comes before the required key that it leaves missing."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")[0]
    location, kind, value = details["loc"], details["type"], details["input"]
    source = next((override for override in reversed(overrides) if _caused(override, location)), None)
    where = {"file": path if source is None else f"--set {source.text}", "key": _key(location, raw)}
    if kind == "extra_forbidden":
        name, known = str(location[-1]), _section(location[:-1]).model_fields
        return UserError(f"unknown key {name!r}{did_you_mean(name, known)}", **where, expected=one_of(known))
    if kind == "missing":
        return UserError("missing", **where, expected=f"a value for {location[-1]!r}")
    short = isinstance(value, str | int | float | bool) or (isinstance(value, list) and len(value) <= MAX_SHOWN_ITEMS)
    shown = value if short else None
    if kind == USER_ERROR_TYPE:
        context = details["ctx"]
        return UserError(context["problem"], **where, value=shown, expected=context["expected"])
    if kind == "model_type":
        return UserError("not a mapping", **where, value=shown, expected="a mapping of keys")
    if kind == "too_short":
        return UserError("empty", **where, expected="at least one item")
    for prefix in ("Input should be ", "Value should have "):
        if details["msg"].startswith(prefix):
            problem = "no value" if value is None else "bad value"
            expected = details["msg"].removeprefix(prefix).replace("a valid tuple", "a list")
            return UserError(problem, **where, value=shown, expected=expected)
    return UserError(details["msg"], **where, value=shown)


def _caused(override: Override, location: Location) -> bool:
    """Whether the value at `location` is the override's, holds it as a key it should not, or lies within it."""
    for place in override.places:
        if location[: len(place)] == place:
            return True
        if place[: len(location)] == location and not _is_section(location):
            return True
    return False


def _is_section(location: Location) -> bool:
    try:
        section = _section(location)
    except KeyError:
        return False
    return isinstance(section, type) and issubclass(section, BaseModel)


def _key(location: Location, raw: Any) -> str | None:
    """The dotted key as `--set` takes it, a task by its name where it has one."""
    parts = []
    for index, part in enumerate(location):
        if index == 1 and location[0] == "tasks":
            task = raw["tasks"][part]
            name = task.get("name") if isinstance(task, dict) else None
            part = name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else part
        parts.append(str(part))
    return ".".join(parts) or None


def _section(location: Location) -> Any:
    """The type at `location`, a schema class if it is a section; `KeyError` if the schema has no such place."""
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[0]
            continue
        section = section.model_fields[part].annotation
        sections = [kind for kind in get_args(section) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if isinstance(section, types.UnionType) and sections:
            section = sections[0]
    return section


def _check_files(config: RunConfig, path: Path) -> None:
    def require(found: bool, key: str, value: Path, expected: str) -> None:
        if not found:
            raise UserError("not found", file=path, key=key, value=str(value), expected=expected)

    if config.model.path is not None:
        folder = config.model.path
        require((folder / "config.json").is_file(), "model.path", folder, "a folder with config.json and weights")
    if config.data.source == "synthetic":
        require(config.data.lengths.is_file(), "data.lengths", config.data.lengths, "a histogram (hist.json)")
        return
    if config.data.tokenizer is not None:
        require(config.data.tokenizer.is_file(), "data.tokenizer", config.data.tokenizer, "a tokenizer.json")
    if config.data.chat_template is not None:
        template = config.data.chat_template
        require(template.is_file(), "data.chat_template", template, "a Jinja chat template")
    for task in config.tasks:
        if task.dataset is None:
            if not task.files:
                expected = f"files ({FILE_KINDS}) or dataset"
                raise UserError("no data", file=path, key=f"tasks.{task.name}.files", expected=expected)
        elif task.dataset.path is not None:
            place = task.dataset.path
            require(place.is_dir(), f"tasks.{task.name}.dataset.path", place, "the folder of a data set")
        for key in ("files", "eval_files"):
            for entry in getattr(task, key):
                found = expand(entry)
                expected = f"{FILE_KINDS}, or a glob that matches one"
                require(
                    bool(found) and all(file.is_file() for file in found), f"tasks.{task.name}.{key}", entry, expected
                )
