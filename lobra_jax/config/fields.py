"""Field types of the run config that pydantic lacks: paths beside the file, byte sizes, target modules, names."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from lobra_jax.data.templates import check_template
from lobra_jax.models.config import PRESETS, TARGETS
from planner.bucketing import PRESETS as STATIC_BUCKETS
from planner.lattice import MAX_ROW_OPTIONS

USER_ERROR_TYPE = "lobra_user"
"""Type of the validation errors made by `wrong`; their context carries "problem" and "expected"."""

BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def wrong(problem: str, *, expected: str) -> NoReturn:
    """Fails the field under validation; the reader of the config adds file, key and value."""
    raise PydanticCustomError(USER_ERROR_TYPE, "{problem}", {"problem": problem, "expected": expected})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to add after an unknown word: the nearest known one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def one_of(known: Iterable[str]) -> str:
    return f"one of {', '.join(known)}"


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        wrong("a truth value", expected="a number")
    return value


def _resolve(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path.cwd())
    return Path(os.path.abspath(folder / path.expanduser()))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return _not_bool(value)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in BYTE_UNITS:
        wrong("not a size", expected='bytes as a number or with a unit, such as "40GiB" or "512MiB"')
    return round(float(match[1]) * BYTE_UNITS[match[2].upper()])


def _target(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    short = value.removesuffix("_proj")
    if short not in TARGETS:
        wrong(f"unknown target module{did_you_mean(short, TARGETS)}", expected=one_of(TARGETS))
    return short


def _targets(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or len(set(value)) != len(value):
        wrong("no target modules" if not value else "a target module twice", expected="one or more different modules")
    return tuple(target for target in TARGETS if target in value)


def _name(value: str) -> str:
    if not NAME_PATTERN.fullmatch(value) or value.endswith("."):
        wrong("not usable as a folder name", expected="letters, digits, '_', '-' and '.', not starting with '-' or '.'")
    return value


def _preset(value: str) -> str:
    if value not in PRESETS:
        wrong(f"unknown preset{did_you_mean(value, PRESETS)}", expected=one_of(PRESETS))
    return value


def _template(value: str) -> str:
    problem = check_template(value)
    if problem is not None:
        wrong(problem.problem, expected=problem.expected)
    return value


def _identifier(value: str) -> str:
    if not value.isidentifier():
        wrong("not a key", expected="prompt, completion, text, messages, or a name that the template has in braces")
    return value


def _buckets(value: Any) -> Any:
    if isinstance(value, str):
        names = ["dynamic", *STATIC_BUCKETS]
        if value not in names:
            wrong(
                f"unknown bucket preset{did_you_mean(value, names)}", expected=f"a list of lengths or {one_of(names)}"
            )
        return value
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not numbers or not value or min(value) < 1 or list(value) != sorted(set(value)):
        wrong("not buckets", expected=f"ascending lengths >= 1, or one of dynamic, {', '.join(STATIC_BUCKETS)}")
    return tuple(value)


Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
"""An integer >= 1."""
RowOptions = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=MAX_ROW_OPTIONS)]
Seed = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**32)]
NonNegativeInt = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_not_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, lt=1)]
"""A number in [0, 1)."""
ClosedFraction = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=1)]
FilePath = Annotated[Path, AfterValidator(_resolve)]
"""A path made absolute; relative ones count from the folder of the config file."""
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_as_list)]
"""One or more paths; a single one may stand without brackets."""
ByteSize = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Target = Annotated[str, BeforeValidator(_target)]
Targets = Annotated[tuple[Target, ...], BeforeValidator(_as_list), AfterValidator(_targets)]
"""Target modules in the order they run; PEFT's `q_proj` is taken as `q`."""
TaskName = Annotated[str, AfterValidator(_name)]
Template = Annotated[str, AfterValidator(_template)]
Preset = Annotated[str, AfterValidator(_preset)]
"""A template's name or a format string with {prompt}."""
Identifier = Annotated[str, AfterValidator(_identifier)]
Buckets = Annotated[Any, BeforeValidator(_buckets)]
"""A preset's name or a tuple of ascending lengths."""
