"""What the benchmarks' command lines share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lobra_jax.config.fields import did_you_mean, one_of
from lobra_jax.models.config import PRESETS, LlamaConfig
from planner.errors import UserError


def parse_shapes(key: str, text: str) -> list[tuple[int, int]]:
    """(rows, length) of each ROWSxLENGTH in a comma list; UserError names what is not one."""
    shapes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise UserError("not a shape", key=key, value=part, expected="ROWSxLENGTH, such as 8x2048")
        shapes.append((int(numbers[0]), int(numbers[1])))
    return shapes


def parse_preset(key: str, name: str) -> LlamaConfig:
    """The model shape of that name; UserError names what is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset{did_you_mean(name, PRESETS)}", key=key, value=name, expected=one_of(PRESETS))
    return PRESETS[name]


def parse_names(key: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a comma list; UserError names one that is not `known`."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"unknown name{did_you_mean(name, known)}", key=key, value=name, expected=one_of(known))
    return names


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """The call that gives a result again; options that were not given, and flags that are off, are left out."""
    given = [
        f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
        for name, value in options.items()
        if value is not None and value is not False
    ]
    return " ".join([command, *given])


# Decorates commands that read LobRA's published data.
published_files = click.option(
    "--reference",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder with LobRA's published CSV and JSON files.",
)
