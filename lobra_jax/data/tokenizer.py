"""The run's tokenizer: a `tokenizer.json` or a SentencePiece model, its special tokens and its chat template."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lobra_jax.data.chat import ChatTemplate
from lobra_jax.data.sources import require
from planner.errors import UserError

USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]")
USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""In a model's folder; the first that is there."""
SENTENCEPIECE_SUFFIX = ".model"
SENTENCEPIECE_SETTINGS = ("added_tokens_decoder", "legacy")
"""Settings that change a SentencePiece model's ids."""
SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Beside the tokenizer; what the second says goes before the first."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PROBE = "a"
"""A text that shows what a post-processor puts around it."""
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Behind a serialised SentencePiece model: normalizer_spec (field 3) with add_dummy_prefix (field 3) false. Protocol
buffers merge a message that comes twice, the later value of a scalar counting."""
EXPECTED = "a tokenizer.json or a SentencePiece tokenizer.model"

Spans = list[tuple[int, int]]


class Encoder(Protocol):
    """Text to ids, special tokens recognised by their text and none added.

    `prefix` is the token that the file itself says to begin a text with; None where it says none.
    """

    prefix: str | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        """(ids, characters [start, end) of each token) of each text."""
        ...

    def token_to_id(self, token: str) -> int | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """An encoder with its special tokens; `bos_id` is None for a model that has none.

    `fingerprint` changes whenever the ids that it gives might.
    """

    encoder: Encoder
    bos_id: int | None
    eos_id: int
    fingerprint: str
    chat_template: ChatTemplate | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.encoder.encode(texts)


def load_tokenizer(
    path: str | Path,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    chat_template: Path | None = None,
) -> TextTokenizer:
    """Reads a `tokenizer.json`, or a SentencePiece model (a name that ends in .model; extra `sentencepiece`).

    EOS is, in this order: the token given here, that of a `tokenizer_config.json` or `special_tokens_map.json` in the
    same folder, the first of the usual names that the vocabulary holds; none raises `UserError`. BOS is the token given
    here ("" for none), or what `transformers` begins a text with: its settings' where they say `add_bos_token`, that of
    the tokenizer.json's post-processor, and for a SentencePiece model its own. A tokenizer.json with neither settings
    nor post-processor begins with the first of the usual names that it holds, or with nothing. The chat template is,
    in this order: the given file, chat_template.jinja in the same folder, that of the `tokenizer_config.json`; there
    may be none.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", file=path, expected=EXPECTED) from error
    settings: dict[str, Any] = {}
    for name in SETTINGS_FILES:
        settings |= _settings(path.parent / name)
    if path.suffix == SENTENCEPIECE_SUFFIX:
        encoder: Encoder = _SentencePiece(content, path, settings)
    else:
        encoder = _Json(content, path)
    bos = _checked(encoder, path, "bos_token", _bos(encoder, path, bos_token, settings))
    eos = _checked(encoder, path, "eos_token", _named(encoder, "eos_token", eos_token, settings, USUAL_EOS))
    if eos is None:
        expected = f"data.eos_token, or a vocabulary with one of {', '.join(USUAL_EOS)}"
        raise UserError("no end-of-sequence token", file=path, key="data.eos_token", expected=expected)
    used = {} if path.suffix == ".json" else {key: settings.get(key) for key in SENTENCEPIECE_SETTINGS}
    digest = hashlib.sha256(content + json.dumps(used, sort_keys=True).encode()).hexdigest()[:32]
    bos_id = None if bos is None else encoder.token_to_id(bos)
    eos_id = encoder.token_to_id(eos)
    assert eos_id is not None, "checked by _checked"
    return TextTokenizer(
        encoder=encoder,
        bos_id=bos_id,
        eos_id=eos_id,
        fingerprint=f"{digest}/{bos_id}/{eos_id}",
        chat_template=_chat_template(path.parent, settings, chat_template, bos, eos),
    )


class _Json:
    """A tokenizer.json."""

    def __init__(self, content: bytes, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise UserError(f"not a tokenizer: {error}", file=path, expected="a tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        alone = self._tokenizer.encode(PROBE, add_special_tokens=False).tokens
        processed = self._tokenizer.encode(PROBE).tokens
        before = len(processed) - len(alone)
        starts = next((i for i in range(before + 1) if processed[i : i + len(alone)] == alone), 0)
        self.prefix: str | None = processed[0] if starts else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        return [(e.ids, e.offsets) for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _SentencePiece:
    """A SentencePiece model; control tokens and those that tokenizer_config.json adds are cut out of texts first.

    As in `transformers`, the space that the model puts before a text comes before a whole one alone, not after each
    special token (unless its settings say `legacy`), and not beside a space that is there.
    """

    def __init__(self, content: bytes, path: Path, settings: Mapping[str, Any]) -> None:
        library = require("sentencepiece", "sentencepiece", needed_for=f"{path}: SentencePiece")
        try:
            original = library.SentencePieceProcessor(model_proto=content)
            self._model = library.SentencePieceProcessor(model_proto=content + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise UserError("not a SentencePiece model", file=path, expected=EXPECTED) from error
        self._has_prefix = original.encode(PROBE) != self._model.encode(PROBE)
        self._is_legacy = bool(settings.get("legacy"))
        ids = range(self._model.get_piece_size())
        self._special = {self._model.id_to_piece(i): i for i in ids if self._model.is_control(i)}
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            content_of = token["content"] if isinstance(token, dict) else token
            if self._model.piece_to_id(content_of) in (int(number), self._model.unk_id()):
                self._special[content_of] = int(number)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.prefix = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids for ids, _ in self.encode_with_offsets(texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        ids: list[int] = []
        spans: Spans = []
        start = 0
        for match in [*self._split.finditer(text), None]:
            end = len(text) if match is None else match.start()
            if end > start:
                added = self._has_prefix and (start == 0 or self._is_legacy) and text[start] not in " \u2581"
                position = start - added
                for piece in self._model.encode(" " * added + text[start:end], return_type="proto").pieces:
                    # Surfaces, as begin and end count bytes. Of the bytes of one character the last has its surface.
                    width = len(piece.surface) or int(self._model.is_byte(piece.id))
                    ids.append(piece.id)
                    spans.append((max(position, start), position + width))
                    position += len(piece.surface)
            if match is not None:
                ids.append(self._special[match[0]])
                spans.append(match.span())
                start = match.end()
        return ids, spans

    def token_to_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() and token != self._model.id_to_piece(found) else found


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    expected = "the JSON object that comes with a tokenizer"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read: {error}", file=path, expected=expected) from error
    if not isinstance(settings, dict):
        raise UserError("not a JSON object", file=path, expected=expected)
    return settings


def _bos(encoder: Encoder, path: Path, given: str | None, settings: Mapping[str, Any]) -> str | None:
    """The text of the token that texts begin with."""
    adds = settings.get("add_bos_token")
    if given is not None:
        return given or None
    if adds is False or ("bos_token" in settings and settings["bos_token"] is None):
        return None
    if adds or path.suffix == SENTENCEPIECE_SUFFIX:
        return _named(encoder, "bos_token", None, settings, USUAL_BOS)
    if encoder.prefix is not None or settings:
        return encoder.prefix
    return _named(encoder, "bos_token", None, settings, USUAL_BOS)


def _named(
    encoder: Encoder, key: str, given: str | None, settings: Mapping[str, Any], usual: Sequence[str]
) -> str | None:
    """The text of the special token `key`: as given, as the settings have it, or by a usual name."""
    if given is not None:
        return given or None
    if key in settings:
        return _content(settings[key])
    return next((name for name in usual if encoder.token_to_id(name) is not None), None)


def _checked(encoder: Encoder, path: Path, key: str, token: str | None) -> str | None:
    """The token, which the vocabulary holds."""
    if token is not None and encoder.token_to_id(token) is None:
        raise UserError(
            "not in the vocabulary", file=path, key=f"data.{key}", value=token, expected="one of its tokens"
        )
    return token


def _content(token: Any) -> str | None:
    """A special token's text, as settings write it: a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(
    folder: Path, settings: Mapping[str, Any], given: Path | None, bos: str | None, eos: str
) -> ChatTemplate | None:
    named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    tokens = {key: token for key, token in named.items() if isinstance(token, str)}
    tokens = {**({} if bos is None else {"bos_token": bos}), **tokens, "eos_token": eos}
    file = given if given is not None else folder / CHAT_TEMPLATE_FILE
    if given is not None or file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), tokens, str(file))
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            raise UserError(problem, file=file, key="data.chat_template", expected="a Jinja chat template") from error
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {item.get("name"): item.get("template") for item in source}.get("default")
    return ChatTemplate(source, tokens, str(folder / SETTINGS_FILES[1])) if isinstance(source, str) else None
