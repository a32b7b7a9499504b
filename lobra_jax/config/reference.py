"""Writes the config reference from the schema: `python -m lobra_jax.config.reference --out docs/config.md`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lobra_jax.config import fields, schema
from lobra_jax.models.config import PRESETS
from planner.files import write_whole
from planner.lattice import MAX_ROW_OPTIONS

COMMAND = "python -m lobra_jax.config.reference --out docs/config.md"
KINDS = (
    (fields.Count, "integer >= 1"),
    (fields.RowOptions, f"integer in [1, {MAX_ROW_OPTIONS}]"),
    (fields.Seed, "integer in [0, 2^32)"),
    (fields.NonNegativeInt, "integer >= 0"),
    (fields.Positive, "number > 0"),
    (fields.NonNegative, "number >= 0"),
    (fields.Fraction, "number in [0, 1)"),
    (fields.ClosedFraction, "number in [0, 1]"),
    (fields.FilePath, "path"),
    (fields.FilePaths, "path or list of paths"),
    (fields.ByteSize, "bytes, or 512MiB, 40GiB, ..."),
    (fields.Targets, "list of q, k, v, o, gate, up, down"),
    (fields.TaskName, "name"),
    (fields.Template, "template"),
    (fields.Preset, ", ".join(PRESETS)),
    (fields.Identifier, "key"),
    (fields.Buckets, "dynamic, static7, static16 or a list"),
    (str, "text"),
    (bool, "true or false"),
    (type(None), "null"),
)


def reference() -> str:
    """The page: one table a section, in the order of the schema."""
    parts = [
        "# Every key of a config",
        f"Made from the types by `{COMMAND}`. Unknown keys are errors. Relative paths count from the config's folder.",
    ]
    for name, field in schema.RunConfig.model_fields.items():
        section = _section_of(field)
        parts += _tables("tasks[]" if name == "tasks" else name, section)
    return "\n\n".join(parts) + "\n"


def _tables(prefix: str, section: type[BaseModel]) -> list[str]:
    hints = get_type_hints(section, include_extras=True)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            nested += _tables(f"{prefix}.{name}", inner)
        kind = _kind(hints[name])
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{prefix}.{name}` | {_cell(kind)} | {_cell(_default(field))} | {_cell(meaning)} |")
    doc = " ".join((section.__doc__ or "").split())
    return [f"## {prefix}", doc, "\n".join(rows), *nested]


def _section_of(field: FieldInfo) -> Any:
    """The schema class that a field holds (alone, in a tuple or beside null), None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, schema.Section):
            return kind
    return None


def _kind(hint: Any) -> str:
    for known, text in KINDS:
        if hint == known:
            return text
    if isinstance(hint, type) and issubclass(hint, schema.Section):
        return "section below"
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(map(str, arguments))
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(map(_kind, arguments))
    if get_origin(hint) is tuple:
        return f"list of {_kind(arguments[0])}"
    if get_origin(hint) is dict:
        return f"{_kind(arguments[0])}: {_kind(arguments[1])}"
    raise TypeError(f"no words for the type {hint!r} of a config key")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else {}
    if isinstance(value, schema.Section):
        return "its defaults"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "none" if isinstance(value, dict) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@click.command(epilog=f"\b\nExample:\n  {COMMAND}")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The page to write.")
def main(out: Path) -> None:
    """Write the config reference."""
    write_whole(out, reference())


if __name__ == "__main__":
    main()
