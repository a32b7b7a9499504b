"""Every code block of docs/ works: data and configs are written where the page says, commands run in its order."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lobra_jax.cli import main
from lobra_jax.config.reference import COMMAND, reference
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import save_hf
from lobra_jax.models.weights import RandomWeights

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = ("quick-start.md", "file-formats.md", "planning.md", "traces.md", "from-lobra.md", "from-peft.md")
"""In the order of reading: a later page goes on with the files of the first."""

BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./-]+)`[^\n]*\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
MODEL = LlamaConfig(
    name="small", vocab_size=300, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would sit: a base model, and the repository's configs."""
    folder = tmp_path_factory.mktemp("docs")
    save_hf(folder / "models" / "small", MODEL, RandomWeights(MODEL, 0))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what is the capital of the largest planet and who wrote it"], trainer)
    tokenizer.save(str(folder / "models" / "small" / "tokenizer.json"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@pytest.mark.slow
def test_every_code_block_works(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for page in PAGES:
        _follow(page)


def _follow(page):
    blocks = list(BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")))
    assert blocks
    for block in blocks:
        if block["kind"] in ("jsonl", "json", "csv", "yaml"):
            assert block["file"], f"{page}: a block without the name of its file:\n{block['text']}"
            Path(block["file"]).write_text(block["text"], encoding="utf-8")
    for block in blocks:
        if block["kind"] == "sh":
            for line in block["text"].splitlines():
                program, *arguments = shlex.split(line)
                assert program == "lobra", line
                done = CliRunner().invoke(main, arguments)
                assert done.exit_code == 0, f"{line}\n{done.output}"
        elif block["kind"] == "python":
            _run_python(block["text"])
        elif block["kind"] == "json":
            json.loads(block["text"])
    for block in blocks:
        if block["kind"] == "yaml" and "\ntasks:" in block["text"]:
            from lobra_jax.config import load_config

            assert load_config(block["file"]).tasks


def _run_python(text: str) -> None:
    """Runs where what it imports is installed; is at least Python everywhere."""
    ast.parse(text)
    if importable("peft") and importable("transformers"):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_the_pages_are_all_here_and_their_links_lead_somewhere():
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages == {*PAGES, "config.md", "data.md"}
    for path in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_config_reference_is_current():
    assert (DOCS / "config.md").read_text(encoding="utf-8") == reference(), f"run {COMMAND}"


def test_every_key_of_the_config_reference_has_a_meaning():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert all(not line.endswith("|  |") for line in rows), [line for line in rows if line.endswith("|  |")]
