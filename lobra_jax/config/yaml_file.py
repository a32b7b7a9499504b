"""Reads a mapping from YAML, with the line of every mistake."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from planner.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML, but a key given twice is an error instead of a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, path: Path, *, keys: Iterable[str]) -> dict[str, Any]:
    """The mapping that a file's text holds; `keys` are those that a user may have meant to write."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise UserError(f"not YAML: {error.problem}", file=f"{path}{line}", expected="a YAML mapping") from error
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}", file=path, expected="a YAML mapping") from error
    if not isinstance(raw, dict):
        problem = "an empty config" if raw is None else "not a mapping"
        raise UserError(problem, file=path, expected=f"a mapping with {', '.join(keys)}")
    return _unshared(raw)


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are apart, so that an override of one task leaves the others alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
