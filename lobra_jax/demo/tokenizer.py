"""Trains the demo's tokenizer: a byte-level BPE over the corpus, saved as `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from planner.errors import UserError

VOCAB_SIZE = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
"""Marks before a chat message of each role; one token each."""

SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLES)
MAX_TRAINING_CHARS = 4_000_000


def train_tokenizer(corpus_files: list[Path], out: str | Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """Trains on all texts of the JSONL files (capped at `MAX_TRAINING_CHARS`), writes the file `out`; returns it.

    The special tokens have ids 0 to 5 in the order of `SPECIAL_TOKENS`. Any text round-trips: the alphabet is bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus_files), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            "the corpus is too small for the tokenizer",
            value=tokenizer.get_vocab_size(),
            expected=f"{vocab_size} tokens",
        )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))
    return out


def _texts(files: list[Path]) -> Iterator[str]:
    """Texts of the files, an equal share of characters from each."""
    for path in files:
        left = MAX_TRAINING_CHARS // len(files)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for text in strings(json.loads(line)):
                    yield text
                    left -= len(text)
                if left <= 0:
                    break


def strings(example: dict) -> Iterator[str]:
    """All text of one example, whichever of the three formats it has."""
    if "messages" in example:
        yield from (message["content"] for message in example["messages"])
    else:
        yield from (example[key] for key in ("prompt", "completion", "text") if key in example)
