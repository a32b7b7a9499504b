"""The token cache: JSONL files -> a folder of flat arrays that is made once and memory-mapped afterwards.

A folder is named after everything its content depends on (the files' contents, tokenizer, template, context length), so
it never goes stale: what changes gets a folder of its own. It appears by one atomic rename.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lobra_jax.data.dataset import TokenStore
from lobra_jax.data.templates import Piece, RecordError, render
from lobra_jax.data.tokenizer import TextTokenizer
from planner.errors import UserError

CACHE_VERSION = 1
RECORDS_PER_BATCH = 512
KEY_DIGITS = 24
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """Where a task's tokens came from and what became of its records.

    Attributes:
      split: "train", "eval", or "train+eval" where one source is split.
      origin: "built", "reused" (from the cache) or "synthetic".
      num_records: records read.
      num_truncated: of these, how many were cut at the context length.
      num_dropped: of these, how many have no token to train.
      max_token: largest token id.
    """

    split: str
    origin: str
    num_records: int
    num_truncated: int
    num_dropped: int
    max_token: int


def cached_tokens(
    files: Sequence[Path],
    *,
    cache_dir: Path,
    task: str,
    split: str,
    template: str,
    context_length: int,
    tokenizer: TextTokenizer,
) -> tuple[TokenStore, SourceSummary]:
    """The tokens of the files, from the cache or tokenised now (with a progress bar on a terminal).

    An example is [BOS] + pieces, with EOS after a completion or an assistant's turn, cut at `context_length` + 1 tokens
    (so `context_length` are fed to the model).

    Raises:
      UserError: a missing, empty or malformed file (with its line), or no example with a token to train.
    """
    identity = {
        "version": CACHE_VERSION,
        "files": [_digest(file) for file in files],
        "tokenizer": tokenizer.fingerprint,
        "template": template,
        "context_length": context_length,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    folder = cache_dir / f"{task}-{key}"
    found = _open(folder, identity)
    if found is not None:
        return found[0], SourceSummary(split=split, origin="reused", **found[1])
    store, counts = _tokenize(files, template=template, context_length=context_length, tokenizer=tokenizer)
    _publish(folder, store, identity, counts)
    return TokenStore.load(folder), SourceSummary(split=split, origin="built", **counts)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the data: {error.strerror}", file=file, expected="a JSONL file") from error


def _open(folder: Path, identity: Mapping[str, Any]) -> tuple[TokenStore, dict[str, int]] | None:
    """The folder's arrays and counts; None where there is no whole folder (somebody removed a part)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        store = TokenStore.load(folder)
    except (OSError, ValueError):
        return None
    return (store, manifest["counts"]) if all(manifest.get(k) == v for k, v in identity.items()) else None


def _publish(folder: Path, store: TokenStore, identity: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Writes beside the folder, then renames: readers see all of it or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-", ignore_cleanup_errors=True) as name:
            temporary = Path(name) / folder.name
            temporary.mkdir()
            store.save(temporary)
            manifest = json.dumps({**identity, "counts": counts}, indent=1)
            (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
            if folder.exists() and _open(folder, identity) is None:
                shutil.rmtree(folder)
            try:
                temporary.rename(folder)
            except OSError:
                if _open(folder, identity) is None:  # else another run has just published the same
                    raise
    except OSError as error:
        problem = f"cannot write the token cache: {error.strerror}"
        raise UserError(problem, file=folder, key="data.cache_dir", expected="a folder that can be written") from error


def _tokenize(
    files: Sequence[Path], *, template: str, context_length: int, tokenizer: TextTokenizer
) -> tuple[TokenStore, dict[str, int]]:
    tokens: list[np.ndarray] = []
    trainable: list[np.ndarray] = []
    sources: list[int] = []
    num_records = num_truncated = num_dropped = 0
    for records in _record_batches(files, template):
        for ids, mask in _encode(records, tokenizer):
            num_truncated += len(ids) > context_length + 1
            ids, mask = ids[: context_length + 1], mask[: context_length + 1]
            mask[:1] = False  # the first token is nobody's target
            if mask.any():
                tokens.append(ids)
                trainable.append(mask)
                sources.append(num_records)
            else:
                num_dropped += 1
            num_records += 1
    if not sources:
        problem = f"none of {num_records} examples has a token to train within context_length = {context_length}"
        raise UserError(problem, file=files[0], expected="completions, or prompts shorter than the context length")
    store = TokenStore(
        tokens=np.concatenate(tokens),
        trainable=np.concatenate(trainable),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64),
        sources=np.asarray(sources, np.int64),
    )
    counts = {
        "num_records": num_records,
        "num_truncated": num_truncated,
        "num_dropped": num_dropped,
        "max_token": int(store.tokens.max()),
    }
    return store, counts


def _encode(records: Sequence[tuple[Piece, ...]], tokenizer: TextTokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], trainable bool [n]) of each record; pieces are encoded apart, a prompt as it will be later."""
    encoded = iter(tokenizer.encode([piece.text for pieces in records for piece in pieces]))
    for pieces in records:
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        mask = [False] * len(ids)
        for piece in pieces:
            part = next(encoded) + ([tokenizer.eos_id] if piece.ends_turn else [])
            ids += part
            mask += [piece.trainable] * len(part)
        yield np.asarray(ids, np.int32), np.asarray(mask, bool)


def _record_batches(files: Sequence[Path], template: str) -> Iterator[list[tuple[Piece, ...]]]:
    total = sum(file.stat().st_size for file in files)
    batch: list[tuple[Piece, ...]] = []
    with tqdm(total=total, desc=files[0].name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for file in files:
            empty = True
            for pieces, num_bytes in _records(file, template):
                empty = False
                batch.append(pieces)
                bar.update(num_bytes)
                if len(batch) == RECORDS_PER_BATCH:
                    yield batch
                    batch = []
            if empty:
                raise UserError("an empty data file", file=file, expected="one JSON object a line")
    if batch:
        yield batch


def _records(file: Path, template: str) -> Iterator[tuple[tuple[Piece, ...], int]]:
    """The pieces of each line and its size in bytes; blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError("not UTF-8", file=where, expected="one JSON object a line") from error
            except (ValueError, RecursionError) as error:
                problem = f"not JSON: {error}"
                raise UserError(problem, file=where, expected="one JSON object a line") from error
            try:
                yield render(record, template), len(line)
            except RecordError as error:
                raise UserError(error.problem, file=where, expected=error.expected) from error
