"""The demo's run config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lobra_jax.config import load_config, save_config
from lobra_jax.data.templates import render
from lobra_jax.data.tokenizer import load_tokenizer
from lobra_jax.demo.corpus import Corpus
from lobra_jax.demo.settings import run_config


def test_the_config_is_one_that_a_user_could_write(corpus: Corpus, tokenizer_file: Path, tmp_path: Path) -> None:
    base = tokenizer_file.parent
    config = run_config(corpus, base, steps=30, memory_bytes=2**30, cache_dir=tmp_path / "cache")
    save_config(config, tmp_path / "demo.yaml")
    assert load_config(tmp_path / "demo.yaml", check_files=False) == config


def test_tasks_are_unlike_and_all_evaluated(corpus: Corpus, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path, steps=30, memory_bytes=None, cache_dir=tmp_path)
    assert [task.name for task in config.tasks] == [task.name for task in corpus.tasks]
    assert all(task.has_evaluation for task in config.tasks)
    for field in ("rank", "steps", "batch_size", "lr", "context_length", "rslora", "weight_decay"):
        assert len({getattr(task, field) for task in config.tasks}) > 1, field


def test_one_step_is_a_valid_demo(corpus: Corpus, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path, steps=1, memory_bytes=None, cache_dir=tmp_path)
    assert {task.steps for task in config.tasks} == {1}


def test_no_example_is_cut_by_its_context_length(corpus: Corpus, tokenizer_file: Path, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path, steps=1, memory_bytes=None, cache_dir=tmp_path)
    tokenizer = load_tokenizer(tokenizer_file)
    for task in config.tasks:
        records = [json.loads(line) for line in Path(task.files[0]).read_text(encoding="utf-8").splitlines()]
        pieces = [[len(ids) for ids in tokenizer.encode([p.text for p in render(r, "auto")])] for r in records]
        assert np.max([sum(lengths) + len(lengths) for lengths in pieces]) <= task.context_length
