"""What the benchmarks' command lines share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """The call that gives a result again; options that were not given are left out."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    return " ".join([command, *given])
