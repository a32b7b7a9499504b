"""Typed reads from files that users edit: what is wrong is said with file, key, value and what was expected."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import UserError

MISSING = object()
"""The value of a key that is not there."""

MOST_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

NEAR = 0.8
"""A key that the format lacks and that is so similar to one that it has is a slip of the pen (1: the same)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """A value of a parsed JSON or YAML file that knows where it stands. Its methods raise `UserError`.

    Attributes:
      raw: as it was parsed, MISSING where there is none.
      file: the file's name in messages.
      key: where in the file, "configs[3].tp"; None for all of it.
    """

    raw: Any
    file: object = None
    key: str | None = None

    def field(self, name: str) -> Value:
        """The value of a key of a mapping."""
        self.mapping()
        return Value(raw=self.raw.get(name, MISSING), file=self.file, key=self._under(name))

    def given(self, name: str) -> Value | None:
        """The same, None where the key is not there or null."""
        value = self.field(name)
        return None if value.raw is MISSING or value.raw is None else value

    def mapping(self, expected: str | None = None) -> Mapping[str, Any]:
        if not isinstance(self.raw, Mapping):
            raise self.refused("a mapping") if expected is None else self.refused(expected, "not a mapping")
        return self.raw

    def items(self, expected: str = "a list") -> list[Value]:
        """The values of a list."""
        if not isinstance(self.raw, list | tuple):
            raise self.refused(expected)
        return [Value(raw=raw, file=self.file, key=f"{self.key or ''}[{index}]") for index, raw in enumerate(self.raw)]

    def integer(self, *, least: int | None = None) -> int:
        if isinstance(self.raw, bool) or not isinstance(self.raw, int) or (least is not None and self.raw < least):
            raise self.refused("an integer" if least is None else f"an integer >= {least}")
        return self.raw

    def number(self, *, least: float | None = None, expected: str = "a finite number") -> float:
        if isinstance(self.raw, bool) or not isinstance(self.raw, int | float):
            raise self.refused(expected)
        try:
            number = float(self.raw)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not math.isfinite(number) or (least is not None and number < least):
            raise self.refused(expected)
        return number

    def seconds(self) -> float:
        return self.number(least=0.0, expected="seconds >= 0")

    def text(self, expected: str = "a text") -> str:
        if not isinstance(self.raw, str) or not self.raw:
            raise self.refused(expected)
        return self.raw

    def flag(self) -> bool:
        if not isinstance(self.raw, bool):
            raise self.refused("true or false")
        return self.raw

    def called(self, name: object) -> Value:
        """The same, its key followed by a name that readers know it by: "configs[3] (tp1,pp1,none)"."""
        return dataclasses.replace(self, key=f"{self.key} {name}")

    def only(self, known: Collection[str]) -> None:
        """Refuses keys that are not among those known."""
        for name in self.mapping():
            if name not in known:
                raise self.error(f"unknown key {name!r}", "one of " + ", ".join(sorted(known)))

    def no_slips(self, known: Collection[str]) -> None:
        """Refuses keys that look like one of those known; others are let be, a newer version may know them."""
        for name in self.mapping():
            near = [] if name in known else difflib.get_close_matches(str(name), known, n=1, cutoff=NEAR)
            if near:
                raise self.error(f"unknown key {name!r}", f"{near[0]}, or a key unlike those of the format")

    def refused(self, expected: str, problem: str = "bad value") -> UserError:
        """The mistake that the value is, with what it is."""
        if self.raw is MISSING:
            return self.error("missing", expected)
        shown = "null" if self.raw is None else repr(self.raw)
        if len(shown) > MOST_SHOWN:
            shown = shown[: MOST_SHOWN - 3] + "..."
        return self.error(f"{problem} (got {shown})", expected)

    def error(self, problem: str, expected: str | None = None) -> UserError:
        return UserError(problem, file=self.file, key=self.key, expected=expected)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Turns the `ValueError` of a check that a type makes of its values into a `UserError` here."""
        try:
            yield
        except ValueError as error:
            raise self.error(str(error)) from error

    def _under(self, name: str) -> str:
        return name if self.key is None else f"{self.key}.{name}"


def load_json(path: str | Path, what: str, expected: str) -> Value:
    """A JSON file's mapping; `what` it is and what was `expected` are for messages."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror}", file=path, expected=expected) from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", file=path, expected=expected) from error
    value = Value(raw=raw, file=path)
    value.mapping(expected)
    return value
