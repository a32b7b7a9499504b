"""The run's tokenizer: a `tokenizer.json`, and which of its tokens begin and end a sequence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]")
USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """Text to ids, without any special token of its own; `bos_id` is None for a model that has none.

    `fingerprint` changes whenever the ids that it gives might.
    """

    tokenizer: Tokenizer
    bos_id: int | None
    eos_id: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(path: str | Path, *, bos_token: str | None = None, eos_token: str | None = None) -> TextTokenizer:
    """Reads a `tokenizer.json`.

    BOS and EOS are, in this order: the tokens given here ("" for no BOS), those of a `tokenizer_config.json` in the
    same folder, the first of the usual names that the vocabulary holds. A model may have no BOS; no EOS raises
    `UserError`.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", file=path, expected="a tokenizer.json") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise UserError(f"not a tokenizer: {error}", file=path, expected="a tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _settings(path.parent / "tokenizer_config.json")
    bos_id = _special_id(tokenizer, path, "bos_token", bos_token, settings, USUAL_BOS)
    eos_id = _special_id(tokenizer, path, "eos_token", eos_token, settings, USUAL_EOS)
    if eos_id is None:
        expected = f"data.eos_token, or a vocabulary with one of {', '.join(USUAL_EOS)}"
        raise UserError("no end-of-sequence token", file=path, key="data.eos_token", expected=expected)
    digest = hashlib.sha256(content).hexdigest()[:32]
    return TextTokenizer(tokenizer=tokenizer, bos_id=bos_id, eos_id=eos_id, fingerprint=f"{digest}/{bos_id}/{eos_id}")


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    expected = "the JSON object that comes with a tokenizer.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read: {error}", file=path, expected=expected) from error
    if not isinstance(settings, dict):
        raise UserError("not a JSON object", file=path, expected=expected)
    return settings


def _special_id(
    tokenizer: Tokenizer,
    path: Path,
    key: str,
    given: str | None,
    settings: Mapping[str, Any],
    usual: Sequence[str],
) -> int | None:
    if given is not None:
        token: str | None = given or None
    elif settings.get(f"add_{key}") is False and key == "bos_token":
        token = None
    elif key in settings:
        value = settings[key]
        token = value.get("content") if isinstance(value, dict) else value
    else:
        token = next((name for name in usual if tokenizer.token_to_id(name) is not None), None)
    if token is None:
        return None
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(
            "not in the vocabulary", file=path, key=f"data.{key}", value=token, expected="one of its tokens"
        )
    return found
