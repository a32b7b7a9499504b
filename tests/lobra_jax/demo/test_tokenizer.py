"""The demo's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lobra_jax.data.tokenizer import load_tokenizer
from lobra_jax.demo.corpus import Corpus
from lobra_jax.demo.tokenizer import ROLES, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer
from planner.errors import UserError


def test_vocabulary_is_full_and_special_tokens_come_first(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "naïve 🐍\t\x00", "", "  \n\n\n  "])
def test_any_text_comes_back_unchanged(tokenizer_file: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_run_finds_bos_and_eos_by_itself(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("</s>"))


def test_chat_roles_are_single_tokens(tokenizer_file: Path) -> None:
    for role in ROLES:
        assert len(load_tokenizer(tokenizer_file).encode([role])[0]) == 1


def test_training_twice_gives_the_same_file(corpus: Corpus, tokenizer_file: Path, tmp_path: Path) -> None:
    files = [task.train_file for task in corpus.tasks] + [corpus.base_file]
    again = train_tokenizer(files, tmp_path / "tokenizer.json")
    assert json.loads(again.read_text()) == json.loads(tokenizer_file.read_text())


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tiny.jsonl"
    file.write_text('{"text": "a few words"}\n')
    with pytest.raises(UserError, match="too small for the tokenizer"):
        train_tokenizer([file], tmp_path / "tokenizer.json")
