"""Files that commands write: each as a whole, and what cannot be written is the user's mistake, said in time."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.errors import UserError

NEW_SUFFIX = ".new"
"""Of a file that is not yet whole; `.partial` beside a cost table holds what an interrupted profile measured."""


@contextlib.contextmanager
def writing(place: Path, *, what: str | None = None, key: str | None = None) -> Iterator[None]:
    """Raises `UserError` naming `place`, and `key` if it came from one, where the system refuses what is done inside.

    `what` is written there, if that is not the place itself.
    """
    try:
        yield
    except OSError as error:
        # Of a folder that cannot be made because a file has its name, the system says no more than that it exists.
        reason = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror or error
        problem = f"cannot write{'' if what is None else f' {what}'}: {reason}"
        raise UserError(problem, file=place, key=key, expected="a path that can be written") from error


def write_whole(path: str | Path, text: str) -> None:
    """Writes a file that is replaced as a whole, so that an interruption leaves the old one; makes its folder.

    A link or a device, such as /dev/stdout, is written through. Raises `UserError`.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_written_through(path):
            path.write_text(text, encoding="utf-8")
            return
        new = path.with_name(path.name + NEW_SUFFIX)
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON that people can read, see `write_whole`."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def check_folder(folder: Path, *, key: str = "--out") -> None:
    """Raises `UserError` unless files can be written to `folder`, once it is made: for use before long work.

    Leaves nothing behind.
    """
    with writing(folder, key=key):
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass


def check_file(path: Path, *, key: str = "--out") -> None:
    """Raises `UserError` unless `write_whole` can write to `path`, see `check_folder`."""
    with writing(path, key=key):
        if path.is_dir():
            raise UserError("a folder", file=path, key=key, expected="the name of a file")
        is_special = _is_written_through(path)
    if not is_special:
        check_folder(path.parent, key=key)


def check_out(out: Path | None) -> None:
    """As `check_file`, for a file in a folder that must be there; None is no file."""
    if out is None:
        return
    if not out.parent.is_dir():
        raise UserError("no such folder", key="--out", value=str(out), expected="a file in an existing folder")
    check_file(out)


def _is_written_through(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())
