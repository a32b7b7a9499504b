"""Where records come from: files by their ending, and data sets of the Hugging Face library. All are read as streams.

A reader gives one `RawRecord` after another and holds no more than a block of the file, so memory does not grow with
it. The libraries for Parquet and Arrow (extra `data`) and for hub data sets (extra `datasets`) are imported when used.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from planner.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_DELIMITERS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_DELIMITERS, ".parquet", *ARROW_SUFFIXES)
FILE_KINDS = "a .jsonl, .json, .csv or .tsv file (.gz too), or a .parquet or .arrow file"
BLOCK_BYTES = 1 << 20
ROWS_PER_BLOCK = 512
GLOB_CHARACTERS = "*?["
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACES = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRecord:
    """One record as it was read: its place for error lines, and how far it advances the reading (bytes or rows)."""

    value: Any
    where: str
    size: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A split of a data set that the `datasets` library loads: by hub name, or a folder on disk."""

    name: str | None
    path: Path | None
    config: str | None
    split: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name or self.path}[{self.split}]"


Source = Path | HubDataset


def expand(entry: Path) -> tuple[Path, ...]:
    """The files that an entry of a config means: itself, or those that match its glob, in order of name."""
    if entry.exists() or not any(c in str(entry) for c in GLOB_CHARACTERS):
        return (entry,)
    return tuple(sorted(found for name in glob.glob(str(entry), recursive=True) if (found := Path(name)).is_file()))


def digest(source: Source) -> str:
    """Changes with the content of the source. Raises `UserError` if it cannot be read."""
    if isinstance(source, HubDataset):
        files = [Path(part["filename"]) for part in _load_dataset(source).cache_files]
        return f"{source.split}/" + "/".join(map(digest, files))
    try:
        with source.open("rb") as stream:
            return f"{_kind(source)}{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise UserError(f"cannot read the data: {error.strerror}", file=source, expected=FILE_KINDS) from error


def size(source: Source) -> float:
    """What the sizes of its records sum to: bytes of a file, rows of a data set."""
    return len(_load_dataset(source)) if isinstance(source, HubDataset) else source.stat().st_size


def records(source: Source) -> Iterator[RawRecord]:
    """Every record of the source, in order. Raises `UserError` with the place of what cannot be read."""
    if isinstance(source, HubDataset):
        return _dataset_rows(source)
    kind = _kind(source)
    if kind == ".parquet":
        return _parquet_rows(source)
    if kind in ARROW_SUFFIXES:
        return _arrow_rows(source)
    return _table_rows(source, TABLE_DELIMITERS[kind]) if kind in TABLE_DELIMITERS else _json_records(source)


def _kind(file: Path) -> str:
    suffix = (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()
    if suffix not in SUFFIXES or (file.suffix == ".gz" and suffix not in (*JSON_SUFFIXES, *TABLE_DELIMITERS)):
        raise UserError(f"unknown kind of data file {''.join(file.suffixes)!r}", file=file, expected=FILE_KINDS)
    return suffix


def require(module: str, extra: str, *, needed_for: str) -> Any:
    """Imports an optional library; `UserError` naming the extra that brings it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        expected = f'pip install "lobra-jax[{extra}]"'
        raise UserError(f"{needed_for} needs the library {library!r}", expected=expected) from error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's bytes, unpacked if it ends in .gz, and a function that says how many were read of it."""
    with file.open("rb") as raw:
        try:
            yield (gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw), raw.tell  # type: ignore[misc]
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"not a gzip file: {error}", file=file, expected=FILE_KINDS) from error


def _json_records(file: Path) -> Iterator[RawRecord]:
    """One object a line; a .json file may also be one array of objects."""
    if _kind(file) == ".json":
        with _opened(file) as (stream, _):
            if stream.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[":
                return _json_array(file)
    return _json_lines(file)


def _json_lines(file: Path) -> Iterator[RawRecord]:
    expected = "one JSON object a line"
    with _opened(file) as (lines, tell):
        before = 0
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError("not UTF-8", file=where, expected=expected) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"not JSON: {error}", file=where, expected=expected) from error
            now = tell()
            yield RawRecord(value=value, where=where, size=now - before)
            before = now


class _Text:
    """A text file read ahead in blocks, so that values of JSON can be cut from its front."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = io.TextIOWrapper(stream, encoding="utf-8-sig")
        self._buffer, self._position = "", 0

    def _read(self, amount: int) -> bool:
        part = self._stream.read(amount)
        self._buffer, self._position = self._buffer[self._position :] + part, 0
        return bool(part)

    def next_character(self) -> str:
        """The next character that is no space, which stays where it is; empty at the end."""
        while True:
            match = _SPACES.match(self._buffer, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read(BLOCK_BYTES):
                return ""

    def skip(self) -> None:
        self._position += 1

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next value of JSON; reads on, ever more at a time, while it looks cut off."""
        amount = BLOCK_BYTES
        self.next_character()
        while True:
            try:
                value, self._position = decoder.raw_decode(self._buffer, self._position)
                return value
            except json.JSONDecodeError:
                if not self._read(amount):
                    raise
                amount *= 2


def _json_array(file: Path) -> Iterator[RawRecord]:
    """The elements of one array, parsed as they come."""
    expected = "one array of JSON objects"
    decoder, number, before = json.JSONDecoder(), 0, 0
    with _opened(file) as (stream, tell):
        text = _Text(stream)
        try:
            while text.next_character() == ("," if number else "["):
                text.skip()
                if number == 0 and text.next_character() == "]":
                    break
                value = text.value(decoder)
                number, now = number + 1, tell()
                yield RawRecord(value=value, where=f"{file}: record {number}", size=now - before)
                before = now
            if text.next_character() != "]":
                raise UserError("neither , nor ] after it", file=f"{file}: record {number}", expected=expected)
            text.skip()
            if text.next_character():
                raise UserError("text after the array", file=file, expected=expected)
        except UnicodeDecodeError as error:
            raise UserError("not UTF-8", file=file, expected=expected) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}", file=f"{file}: record {number + 1}", expected=expected) from error


def _table_rows(file: Path, delimiter: str) -> Iterator[RawRecord]:
    """Rows under a header line; empty cells are absent keys."""
    expected = "a header line and rows of as many cells"
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as (stream, tell):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        before = 0
        while True:
            where = f"{file}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except UnicodeDecodeError as error:
                raise UserError("not UTF-8", file=where, expected=expected) from error
            except csv.Error as error:
                raise UserError(f"not CSV: {error}", file=where, expected=expected) from error
            if row is None:
                return
            if header is None:
                header = row
                if len(set(row)) != len(row) or not all(row):
                    raise UserError("a column without a name, or two of one", file=where, value=row, expected=expected)
            elif row:
                if len(row) != len(header):
                    raise UserError(f"{len(row)} cells under {len(header)} columns", file=where, expected=expected)
                value = {key: cell for key, cell in zip(header, row, strict=True) if cell}
                now = tell()
                yield RawRecord(value=value, where=where, size=now - before)
                before = now


def _parquet_rows(file: Path) -> Iterator[RawRecord]:
    parquet = require("pyarrow.parquet", "data", needed_for=f"{file}: Parquet")
    arrow = require("pyarrow", "data", needed_for=f"{file}: Parquet")
    try:
        with parquet.ParquetFile(file, memory_map=True) as table:
            count = table.metadata.num_rows
            yield from _rows(file, table.iter_batches(batch_size=ROWS_PER_BLOCK), count)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read the data: {error}", file=file, expected="a Parquet file") from error


def _arrow_rows(file: Path) -> Iterator[RawRecord]:
    """An Arrow file with a footer, or a stream as `datasets` writes it."""
    arrow = require("pyarrow", "data", needed_for=f"{file}: Arrow")
    try:
        with arrow.memory_map(str(file)) as source:
            try:
                reader = arrow.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except arrow.ArrowInvalid:
                source.seek(0)
                batches = list(arrow.ipc.open_stream(source))  # views of the mapped file: no bytes are read yet
            yield from _rows(file, batches, sum(batch.num_rows for batch in batches))
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read the data: {error}", file=file, expected="an Arrow file or stream") from error


def _rows(file: Path, batches: Any, count: int) -> Iterator[RawRecord]:
    """Rows of Arrow batches; nulls are absent keys."""
    share = file.stat().st_size / max(count, 1)
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BLOCK):
            for value in batch.slice(start, ROWS_PER_BLOCK).to_pylist():
                number += 1
                yield RawRecord(value=_without_nulls(value), where=f"{file}: row {number}", size=share)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _dataset_rows(source: HubDataset) -> Iterator[RawRecord]:
    for number, row in enumerate(_load_dataset(source), start=1):
        yield RawRecord(value=_without_nulls(row), where=f"{source}: row {number}", size=1)


@functools.lru_cache(maxsize=4)
def _load_dataset(source: HubDataset) -> Any:
    """The split, mapped from disk; the library keeps what it fetched and prepared. Asked for thrice, loaded once."""
    library = require("datasets", "datasets", needed_for=f"data set {source.name or source.path}")
    try:
        if source.path is not None and (source.path / "dataset_dict.json").is_file():
            splits: Sequence[str] | Any = library.load_from_disk(str(source.path))
            if source.split not in splits:
                known = ", ".join(splits)
                raise UserError("no such split", file=source.path, value=source.split, expected=f"one of {known}")
            return splits[source.split]
        if source.path is not None and (source.path / "state.json").is_file():
            return library.load_from_disk(str(source.path))
        place = source.name if source.path is None else str(source.path)
        return library.load_dataset(place, source.config, split=source.split, revision=source.revision)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such name, split or config
        reason = str(error).strip() or type(error).__name__
        problem = f"cannot load the data set: {reason}"
        expected = "a hub name, config and split that exist and can be reached, or a data set's folder"
        raise UserError(problem, file=source, expected=expected) from error
