"""Reads a mapping from YAML, with the line of every mistake."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planner.errors import UserError
from planner.yaml_text import parse_yaml


def read_yaml(text: str, path: Path, *, keys: Iterable[str]) -> dict[str, Any]:
    """The mapping that a file's text holds; `keys` are those that a user may have meant to write."""
    raw = parse_yaml(text, file=path, expected="a YAML mapping")
    if not isinstance(raw, dict):
        problem = "an empty config" if raw is None else "not a mapping"
        raise UserError(problem, file=path, expected=f"a mapping with {', '.join(keys)}")
    return raw
