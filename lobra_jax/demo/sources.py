"""Reads the text that Python ships: standard-library modules, their functions and classes, the licence.

Everything comes from the running interpreter's own installation. What is missing there is a `UserError`, never a
smaller corpus. Sources are parsed, not imported, so nothing runs and `python -OO` changes nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from planner.errors import UserError

EXPECTED = "a CPython installation with its whole standard library as source (on Debian: python3 with python3-venv)"

MIN_COMMENT_CHARS = 60

TASK_MODULES = (
    "abc argparse ast asyncio base64 bdb bisect calendar cmd code codecs collections concurrent.futures configparser"
    " contextlib copy csv dataclasses datetime difflib doctest email enum fileinput fractions ftplib functools gettext"
    " glob gzip hashlib heapq html http imaplib importlib inspect io json logging mailbox multiprocessing numbers"
    " operator optparse os pickle pprint queue random selectors shlex shutil smtplib socket socketserver sqlite3 ssl"
    " statistics string subprocess tarfile tempfile textwrap threading tokenize tomllib trace types typing unittest"
    " urllib uuid warnings weakref xml.etree xmlrpc zipfile"
).split()
"""Modules whose functions, classes and sources make up the tasks. CPython 3.11 to 3.14 have them all."""

BASE_MODULES = (
    "_pydecimal _pyio _strptime cProfile codeop colorsys compileall copyreg ctypes curses dbm dis filecmp fnmatch"
    " genericpath getopt getpass graphlib hmac ipaddress keyword linecache locale mimetypes modulefinder netrc ntpath"
    " opcode pathlib pdb pickletools pkgutil platform plistlib poplib posixpath profile pstats pty py_compile pyclbr"
    " pydoc quopri reprlib rlcompleter runpy sched secrets shelve signal site stat stringprep struct symtable sysconfig"
    " tabnanny timeit token traceback tracemalloc tty venv wave webbrowser wsgiref xml.dom xml.sax zipapp zipimport"
    " zoneinfo"
).split()
"""Modules that only the base model is pre-trained on, so that it saw no held-out example of any task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """One source file: dotted name and text."""

    name: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """One function or method.

    Attributes:
      name: dotted, with the module, e.g. "textwrap.TextWrapper.fill".
      signature: the source from `def` to the colon, on one line.
      doc: its docstring, cleaned, or "".
      body: source of the statements after the docstring, dedented.
      node: its syntax tree.
    """

    name: str
    signature: str
    doc: str
    body: str
    node: ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Class:
    """One class: dotted name with the module, its source, base classes as source, cleaned docstring, its methods."""

    name: str
    module: Module
    source: str
    bases: tuple[str, ...]
    doc: str
    methods: tuple[Function, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """What the tasks are made of: public functions include the methods of public classes."""

    modules: tuple[Module, ...]
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]


def read_library(names: Sequence[str]) -> Library:
    """Reads the named modules; see `read_modules` for errors."""
    modules = tuple(read_modules(names))
    functions: list[Function] = []
    classes: list[Class] = []
    for module in modules:
        functions += public_functions(module)
        found = list(_classes(module))
        functions += (method for one in found for method in one.methods)
        classes += found
    return Library(modules=modules, functions=tuple(functions), classes=tuple(classes))


def read_modules(names: Sequence[str]) -> list[Module]:
    """Reads the named modules; a package stands for the files of its own folder, sub-packages left out."""
    return [_read_module(name, path) for module in names for name, path in _module_files(module)]


def _module_files(name: str) -> list[tuple[str, Path]]:
    stem = Path(sysconfig.get_paths()["stdlib"]).joinpath(*name.split("."))
    if stem.is_dir():
        files = sorted(stem.glob("*.py"))
        if files:
            return [(name if f.stem == "__init__" else f"{name}.{f.stem}", f) for f in files if f.stem != "__main__"]
    path = stem.with_name(stem.name + ".py")
    if not path.is_file():
        raise UserError("the standard library lacks a module", file=path, expected=EXPECTED)
    return [(name, path)]


def _read_module(name: str, path: Path) -> Module:
    try:
        return Module(name=name, text=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a standard-library module: {error}", file=path, expected=EXPECTED) from error


def read_licence() -> str:
    """The text of Python's licence, or UserError."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    path = folder / "LICENSE.txt"
    if not path.is_file():
        raise UserError("Python's licence text is missing", file=path, expected=EXPECTED)
    return path.read_text(encoding="utf-8")


def public_functions(module: Module) -> Iterator[Function]:
    """The public functions of a module's top level, in source order."""
    yield from _functions_in(module.tree, module.name, module.text.splitlines())


def _classes(module: Module) -> Iterator[Class]:
    lines = module.text.splitlines()
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            name = f"{module.name}.{node.name}"
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield Class(
                name=name,
                module=module,
                source=_lines(lines, first, node.end_lineno),
                bases=tuple(ast.unparse(base) for base in node.bases),
                doc=ast.get_docstring(node) or "",
                methods=tuple(_functions_in(node, name, lines)),
            )


def _functions_in(parent: ast.Module | ast.ClassDef, prefix: str, lines: list[str]) -> Iterator[Function]:
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            doc = ast.get_docstring(node) or ""
            statements = node.body[1:] if doc else node.body
            body = "" if not statements else _lines(lines, statements[0].lineno, statements[-1].end_lineno)
            yield Function(name=f"{prefix}.{node.name}", signature=_signature(node), doc=doc, body=body, node=node)


def _lines(lines: list[str], first: int, last: int | None) -> str:
    return textwrap.dedent("\n".join(lines[first - 1 : last])).rstrip()


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def error_messages(function: Function) -> Iterator[tuple[str, str]]:
    """(source of the condition or "", raise statement) of every `raise Something(...)` with a text in a function."""
    for node in ast.walk(function.node):
        for test, statements in _branches(node):
            for statement in statements:
                if isinstance(statement, ast.Raise) and isinstance(statement.exc, ast.Call) and statement.exc.args:
                    source = ast.unparse(statement)
                    if re.search(r"['\"].*\s.*['\"]", source):
                        yield test, source


def _branches(node: ast.AST) -> Iterator[tuple[str, list[ast.stmt]]]:
    if isinstance(node, ast.If):
        yield ast.unparse(node.test), node.body
        if not (len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)):
            yield f"not ({ast.unparse(node.test)})", node.orelse
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        yield f"except {ast.unparse(node.type)}", node.body


def prose(module: Module) -> Iterator[str]:
    """Docstrings and longer comments of a module: what people wrote, without the code."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
    for is_comment, lines in itertools.groupby(
        (line.strip() for line in module.text.splitlines()), key=lambda line: line.startswith("#")
    ):
        if is_comment:
            text = "\n".join(line.lstrip("# ") for line in lines).strip()
            if len(text) >= MIN_COMMENT_CHARS:
                yield text


def pieces(text: str, max_chars: int) -> Iterator[str]:
    """Cuts a text at blank lines into pieces of at most `max_chars` characters, all but the last nearly that long.

    A paragraph that is longer by itself is cut at line ends (a single longer line stays whole).
    """
    piece = ""
    for unit in _units(text, max_chars):
        if piece and len(piece) + len(unit) > max_chars:
            yield piece.strip("\n")
            piece = ""
        piece += unit
    if piece.strip():
        yield piece.strip("\n")


def _units(text: str, max_chars: int) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n)(?=\n)", text):
        if len(paragraph) <= max_chars:
            yield paragraph
        else:
            yield from paragraph.splitlines(keepends=True)
