"""The token cache: a task's sources -> a folder of flat arrays that is made once and memory-mapped afterwards.

A folder is named after everything its content depends on (the sources' contents, tokenizer, template, context length),
so it never goes stale: what changes gets a folder of its own. It appears by one atomic rename. Making it holds a few
blocks of records in memory, however large the sources are.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lobra_jax.data.chat import ChatTemplate, SpannedText
from lobra_jax.data.dataset import TokenStore, TokenStoreWriter
from lobra_jax.data.sources import HubDataset, Source, digest, records, size
from lobra_jax.data.templates import CHAT_TEMPLATE, Piece, RecordError, render, with_columns
from lobra_jax.data.tokenizer import TextTokenizer
from planner.errors import UserError
from planner.files import writing

CACHE_VERSION = 3
RECORDS_PER_BATCH = 512
NUM_ENCODERS = 2
"""Threads that encode while the next records are read and parsed; most of encoding runs outside Python's lock."""

KEY_DIGITS = 24
MANIFEST = "manifest.json"
NO_COLUMNS: Mapping[str, str] = types.MappingProxyType({})

Rendered = list[tuple[Piece, ...] | SpannedText]
"""Records as pieces that are encoded apart, or as texts that are encoded whole."""
Example = tuple[np.ndarray, np.ndarray]
"""(ids int32 [n], trainable bool [n]) of a record."""

Encoded = list[Example]

Render = Callable[[Any], tuple[Piece, ...] | SpannedText]


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
      records_by_source: records of each source, in order.
    """

    split: str
    origin: str
    num_records: int
    num_truncated: int
    num_dropped: int
    max_token: int
    records_by_source: tuple[int, ...] = ()


def cached_tokens(
    sources: Sequence[Source],
    *,
    cache_dir: Path,
    task: str,
    split: str,
    template: str,
    context_length: int,
    tokenizer: TextTokenizer,
    columns: Mapping[str, str] = NO_COLUMNS,
) -> tuple[TokenStore, SourceSummary]:
    """The tokens of the sources, from the cache or tokenised now (with a progress bar on a terminal).

    An example is [BOS] + pieces, with EOS after a completion or an assistant's turn, cut at `context_length` + 1 tokens
    (so `context_length` are fed to the model). A chat template is taken at its word: no BOS or EOS beside those that
    it writes. `columns`: see `with_columns`.

    Raises:
      UserError: a missing, empty or malformed source (with its line), or no example with a token to train.
    """
    identity = {
        "version": CACHE_VERSION,
        "sources": [digest(source) for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "template": template if template != CHAT_TEMPLATE else _chat_template(tokenizer).fingerprint,
        "columns": dict(columns),
        "context_length": context_length,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    folder = cache_dir / f"{task}-{key}"
    found, origin = _open(folder, identity), "reused"
    if found is None:
        with _new_folder(folder, identity) as temporary:
            counts = _tokenize(sources, temporary, template, columns, context_length, tokenizer)
            manifest = json.dumps({**identity, "counts": counts}, indent=1)
            with _writing(folder):
                (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        found, origin = _open(folder, identity), "built"
        assert found is not None, f"{folder} was just written"
    store, counts = found
    return store, SourceSummary(split=split, origin=origin, **counts)


def _open(folder: Path, identity: Mapping[str, Any]) -> tuple[TokenStore, dict[str, Any]] | None:
    """The folder's arrays and counts; None where there is no whole folder (somebody removed a part)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        store = TokenStore.load(folder)
    except (OSError, ValueError):
        return None
    if any(manifest.get(k) != v for k, v in identity.items()):
        return None
    counts = manifest["counts"]
    return store, {**counts, "records_by_source": tuple(counts["records_by_source"])}


def _writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    return writing(folder, what="the token cache", key="data.cache_dir")


@contextlib.contextmanager
def _new_folder(folder: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside `folder`, renamed to it if all goes well: readers see all of it or nothing."""
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-", ignore_cleanup_errors=True)
            temporary = Path(stack.enter_context(scratch)) / folder.name
            temporary.mkdir()
        yield temporary
        with _writing(folder):
            if folder.exists() and _open(folder, identity) is None:
                shutil.rmtree(folder)
            try:
                temporary.rename(folder)
            except OSError:
                if _open(folder, identity) is None:  # else another run has just published the same
                    raise


def _tokenize(
    sources: Sequence[Source],
    folder: Path,
    template: str,
    columns: Mapping[str, str],
    context_length: int,
    tokenizer: TextTokenizer,
) -> dict[str, Any]:
    """Writes the arrays into `folder`; returns the counts of `SourceSummary`."""
    by_source = [0] * len(sources)
    num_records = num_truncated = num_dropped = max_token = 0
    with _writing(folder):
        writer = TokenStoreWriter(folder)
    with writer:
        if template == CHAT_TEMPLATE:
            to_text: Render = _chat_template(tokenizer).render
        else:
            to_text = functools.partial(render, template=template)
        for encoded in _encoded(_rendered(sources, to_text, columns, by_source), tokenizer):
            kept: Encoded = []
            numbers: list[int] = []
            for ids, mask in encoded:
                num_truncated += len(ids) > context_length + 1
                ids, mask = ids[: context_length + 1], mask[: context_length + 1]
                mask[:1] = False  # the first token is nobody's target
                if mask.any():
                    kept.append((ids, mask))
                    numbers.append(num_records)
                    max_token = max(max_token, int(ids.max()))
                else:
                    num_dropped += 1
                num_records += 1
            with _writing(folder):
                writer.append(kept, numbers)
        num_kept = len(writer)
    if num_kept == 0:
        problem = f"none of {num_records} examples has a token to train within context_length = {context_length}"
        raise UserError(problem, file=sources[0], expected="completions, or prompts shorter than the context length")
    return {
        "num_records": num_records,
        "num_truncated": num_truncated,
        "num_dropped": num_dropped,
        "max_token": max_token,
        "records_by_source": by_source,
    }


def _encoded(batches: Iterator[Rendered], tokenizer: TextTokenizer) -> Iterator[Encoded]:
    """Each batch encoded, in order, a few of them ahead in threads."""
    waiting: collections.deque[Future[Encoded]] = collections.deque()
    with ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="encode") as threads:
        for batch in batches:
            waiting.append(threads.submit(_encode, batch, tokenizer))
            if len(waiting) > NUM_ENCODERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode(batch: Rendered, tokenizer: TextTokenizer) -> Encoded:
    """Pieces are encoded apart, a prompt as it will be later."""
    pieces = [piece.text for item in batch if not isinstance(item, SpannedText) for piece in item]
    wholes = [item.text for item in batch if isinstance(item, SpannedText)]
    encoded = iter(tokenizer.encode(pieces))
    encoded_wholes = iter(tokenizer.encoder.encode_with_offsets(wholes))
    return [
        _mask_spans(*next(encoded_wholes), item.spans)
        if isinstance(item, SpannedText)
        else _join(item, encoded, tokenizer)
        for item in batch
    ]


def _join(pieces: tuple[Piece, ...], encoded: Iterator[list[int]], tokenizer: TextTokenizer) -> Example:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    mask = [False] * len(ids)
    for piece in pieces:
        part = next(encoded) + ([tokenizer.eos_id] if piece.ends_turn else [])
        ids += part
        mask += [piece.trainable] * len(part)
    return np.asarray(ids, np.int32), np.asarray(mask, bool)


def _mask_spans(ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Example:
    """Trains, for each span of characters, from the first token that reaches into it to the last."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        inside = np.flatnonzero((starts < end) & (ends > start))
        if len(inside):
            mask[inside[0] : inside[-1] + 1] = True
    return np.asarray(ids, np.int32), mask


def _chat_template(tokenizer: TextTokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        expected = "data.chat_template, or a chat_template beside the tokenizer"
        raise UserError("the tokenizer has no chat template", key="template", value=CHAT_TEMPLATE, expected=expected)
    return tokenizer.chat_template


def _rendered(
    sources: Sequence[Source], to_text: Render, columns: Mapping[str, str], by_source: list[int]
) -> Iterator[Rendered]:
    """The records' pieces in batches; counts each source's records in `by_source` on the way."""
    in_rows = any(isinstance(source, HubDataset) for source in sources)
    name = Path(str(sources[0])).name
    unit = {"unit": " rows"} if in_rows else {"unit": "B", "unit_scale": True}
    batch: Rendered = []
    with tqdm(total=sum(map(size, sources)), desc=name, leave=False, disable=None, **unit) as bar:
        for index, source in enumerate(sources):
            for record in records(source):
                try:
                    batch.append(to_text(with_columns(record.value, columns)))
                except RecordError as error:
                    raise UserError(error.problem, file=record.where, expected=error.expected) from error
                by_source[index] += 1
                bar.update(record.size)
                if len(batch) == RECORDS_PER_BATCH:
                    yield batch
                    batch = []
            if by_source[index] == 0:
                raise UserError("an empty data file", file=source, expected="one or more records")
    if batch:
        yield batch
