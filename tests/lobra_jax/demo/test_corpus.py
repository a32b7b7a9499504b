"""The demo's tasks: real text of unlike lengths, the same every time, and never silently less."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lobra_jax.data.templates import render
from lobra_jax.data.tokenizer import load_tokenizer
from lobra_jax.demo import sources
from lobra_jax.demo.corpus import LONGEST_CHARS, TASKS, Corpus, write_corpus
from planner.errors import UserError

TENS, THOUSANDS = 64, 4096
FEW = TASKS[:1]


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lengths(path: Path, tokenizer_file: Path) -> np.ndarray:
    tokenizer = load_tokenizer(tokenizer_file)
    texts = ["".join(piece.text for piece in render(record, "auto")) for record in _records(path)]
    return np.array([len(ids) for ids in tokenizer.encode(texts)])


def test_there_are_at_least_six_tasks_in_all_three_formats(corpus: Corpus) -> None:
    assert len(corpus.tasks) >= 6
    formats = {frozenset(record) for task in corpus.tasks for record in _records(task.train_file)}
    assert formats == {frozenset({"text"}), frozenset({"prompt", "completion"}), frozenset({"messages"})}


def test_every_example_can_be_trained_on(corpus: Corpus) -> None:
    for task in corpus.tasks:
        for path, number in ((task.train_file, task.num_train), (task.eval_file, task.num_eval)):
            records = _records(path)
            assert len(records) == number > 0
            assert all(any(p.trainable and p.text for p in render(record, "auto")) for record in records)


def test_lengths_reach_from_tens_of_tokens_to_thousands(corpus: Corpus, tokenizer_file: Path) -> None:
    lengths = {task.name: _lengths(task.train_file, tokenizer_file) for task in corpus.tasks}
    medians = {name: float(np.median(values)) for name, values in lengths.items()}
    assert min(medians.values()) < TENS
    assert max(medians.values()) > 5 * min(medians.values())
    assert max(values.max() for values in lengths.values()) > THOUSANDS
    for name, values in lengths.items():
        assert values.mean() > medians[name], f"{name} is not skewed to long sequences"


def test_held_out_examples_are_not_trained_on(corpus: Corpus) -> None:
    for task in corpus.tasks:
        trained = set(task.train_file.read_text(encoding="utf-8").splitlines())
        assert not trained & set(task.eval_file.read_text(encoding="utf-8").splitlines())


def test_the_base_models_modules_are_no_tasks() -> None:
    assert not set(sources.BASE_MODULES) & set(sources.TASK_MODULES)


def test_the_same_python_gives_the_same_files(tmp_path: Path, corpus: Corpus) -> None:
    again = write_corpus(tmp_path, FEW)
    names = {spec.name for spec in FEW}
    for first, second in zip([t for t in corpus.tasks if t.name in names], again.tasks, strict=True):
        assert first.train_file.read_bytes() == second.train_file.read_bytes()
        assert first.eval_file.read_bytes() == second.eval_file.read_bytes()
    assert corpus.base_file.read_bytes() == again.base_file.read_bytes()


def test_a_task_that_came_out_small_is_an_error(tmp_path: Path) -> None:
    greedy = dataclasses.replace(FEW[0], min_examples=10**6)
    with pytest.raises(UserError, match=r"task 'signatures' has too few examples .* expected 1000000 or more"):
        write_corpus(tmp_path, [greedy])


def test_a_missing_module_is_named() -> None:
    with pytest.raises(UserError, match=r"no_such_module\.py: the standard library lacks a module"):
        sources.read_modules(["textwrap", "no_such_module"])


def test_a_package_stands_for_its_own_files() -> None:
    names = [module.name for module in sources.read_modules(["json"])]
    assert "json" in names and "json.decoder" in names


def test_functions_are_read_with_signature_doc_and_body() -> None:
    library = sources.read_library(["textwrap"])
    (dedent,) = [function for function in library.functions if function.name == "textwrap.dedent"]
    assert dedent.signature == "def dedent(text):"
    assert "leading whitespace" in dedent.doc
    assert dedent.body and not dedent.body.startswith((" ", '"""'))
    assert "textwrap.TextWrapper.fill" in {function.name for function in library.functions}


def test_pieces_keep_the_text_and_its_order() -> None:
    text = "\n\n".join(f"paragraph {i}\n" + "line\n" * (i % 7) for i in range(200)) + "long line\n" * 90
    parts = list(sources.pieces(text, 300))
    assert all(len(part) <= 300 for part in parts)
    assert "".join(parts).replace("\n", "") == text.replace("\n", "")


def test_error_messages_come_with_their_condition() -> None:
    module = sources.Module(
        name="m",
        text='def f(x):\n    """Doc."""\n    if x < 0:\n        raise ValueError("x is negative")\n    return x\n',
    )
    (function,) = sources.public_functions(module)
    assert list(sources.error_messages(function)) == [("x < 0", "raise ValueError('x is negative')")]


def test_no_document_is_longer_than_the_limit(corpus: Corpus) -> None:
    for task in corpus.tasks:
        for record in _records(task.train_file):
            text = sum(len(piece.text) for piece in render(record, "auto"))
            assert text <= 1.1 * LONGEST_CHARS
