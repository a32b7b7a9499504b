"""YAML of users' files and flags as plain values, with the line of whatever is wrong with it."""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

from planner.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML, but a key given twice is an error instead of a silent loss, and a value that is not what it looks like or
    is tagged as is an error with its line instead of whatever Python raises."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            problem = f"bad {node.tag.rpartition(':')[2]} {reprlib.repr(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, *, file: object, expected: str, key: str | None = None) -> Any:
    """The value that a text holds. Raises `UserError` for anything else: line of `file` (unless `key` says the place),
    what is wrong, what was `expected`."""
    line = None
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        problem, cause = error.problem, error
        line = None if error.problem_mark is None else error.problem_mark.line + 1
    except yaml.YAMLError as error:
        problem, cause = str(error), error
    except RecursionError as error:
        problem, cause = "a value that holds itself, or too many levels", error
    where = file if line is None or key is not None else f"{file}:{line}"
    raise UserError(f"not YAML: {problem}", file=where, key=key, expected=expected) from cause


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are apart, so that a change of one leaves the others alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
