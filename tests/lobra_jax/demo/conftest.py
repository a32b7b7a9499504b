"""The demo's corpus and tokenizer, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lobra_jax.demo.corpus import Corpus, write_corpus
from lobra_jax.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer_file(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [task.train_file for task in corpus.tasks] + [corpus.base_file]
    return train_tokenizer(files, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
