"""The demo: every command on built-in tasks and simulated devices, then a table and a report.

Each stage is the very command that a user would run, in a process of its own; this module only strings them together.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lobra_jax.config import RunConfig, save_config
from lobra_jax.data.load import task_lengths
from lobra_jax.demo.corpus import Corpus, write_corpus
from lobra_jax.demo.settings import run_config
from lobra_jax.demo.tokenizer import train_tokenizer
from planner.bucketing import DEFAULT_ALIGN
from planner.errors import UserError
from planner.files import writing

BASE_STEPS = 360
MEMORY_BYTES = 128 * 1024**2
"""Of each simulated device: the longest sequences fit none alone."""

NUM_EXPORTS = 2
"""Exports at a time."""

MARKER_FILE = ".lobra_demo"
"""Lies in a folder that a demo made, and may be replaced by the next."""

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3)}
"""Tells glibc to keep freed memory: XLA on CPU allocates a program's temporaries anew each time that it runs, and the
kernel took a quarter of the processor time to clear them (2 cores, JAX 0.10.2, a 5 x 352 micro-batch)."""

BUCKETS = (96, 416, 1104, 2304)
"""Padded lengths below the longest. Dynamic buckets would take more for as short steps: of these only three fit the
narrow replicas, each of which compiles programs of its own."""

PROFILED_CONFIGS = "1x1,4x1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoFolder:
    """Where everything lies."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def costs(self) -> Path:
        return self.root / "costs.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.yaml"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"


def run_demo(out: Path, *, steps: int, say: Callable[[str], None]) -> None:
    """Runs the whole demo into the folder `out`, see `claim_folder`.

    Raises:
      UserError: `out` is not the demo's to use, or a command failed (it has printed its own line).
    """
    claim_folder(out, say)
    started = time.perf_counter()

    def stage(number: int, text: str) -> None:
        say(f"[{time.perf_counter() - started:5.0f} s] {number}/6 {text}")

    folder = DemoFolder(root=out)
    stage(1, "six tasks and a tokenizer out of the text that Python ships")
    config = _make_inputs(folder, steps, stage)
    _lobra("tokenize", "--config", folder.config)
    stage(3, f"a cost table of {config.devices.simulated} simulated devices")
    # Two lengths and a held-out shape between them are enough for so small a model, and as the extreme buckets of the
    # plan some of their programs serve the training again.
    shortest, *_, longest = config.planner.buckets
    _lobra(
        "profile", "--config", folder.config, "--out", folder.costs, "--configs", PROFILED_CONFIGS,
        "--lengths", f"{shortest},{longest}", "--max-tokens", longest, "--repeats", "1",
    )  # fmt: skip
    stage(4, "a plan")
    _lobra("plan", "--config", folder.config, "--costs", folder.costs, "--out", folder.plan)
    stage(5, "training every task jointly on the planned replicas")
    _lobra("train", "--config", folder.config, "--plan", folder.plan, "--out", folder.run)
    stage(6, "adapters and report")
    with ThreadPoolExecutor(NUM_EXPORTS) as exports:
        list(exports.map(lambda task: _export(folder, task.name), config.tasks))
    _finish(folder, config, say)
    say(f"[{time.perf_counter() - started:5.0f} s] done")


def claim_folder(out: Path, say: Callable[[str], None]) -> None:
    """Makes `out` an empty folder but for the demo's marker; what an earlier demo left there is removed.

    Raises:
      UserError: `out` is a file, a folder with something in it that no demo has marked as its own, or not to be
        written.
    """
    with writing(out, key="--out"):
        _claim(out, out / MARKER_FILE, say)


def _claim(out: Path, marker: Path, say: Callable[[str], None]) -> None:
    if marker.is_file():
        say(f"{out}: replacing an earlier demo")
        for path in sorted(out.iterdir()):
            if path == marker:  # stays, so that a demo that is stopped here can be replaced too
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "already exists", file=out, key="--out", expected="a new or empty folder, or one of an earlier `lobra demo`"
        )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("Made by `lobra demo`, which replaces everything in this folder.\n", encoding="utf-8")


def _make_inputs(folder: DemoFolder, steps: int, stage: Callable[[int, str], None]) -> RunConfig:
    corpus: Corpus = write_corpus(folder.root / "data")
    tokenizer = folder.root / "tokenizer.json"
    train_tokenizer([corpus.base_file, *(task.train_file for task in corpus.tasks)], tokenizer)
    stage(2, f"a small Llama base, pre-trained for {BASE_STEPS} steps")
    base = folder.root / "base"
    command = [sys.executable, "-m", "lobra_jax.demo.base", "--corpus", str(corpus.base_file)]
    _run([*command, "--tokenizer", str(tokenizer), "--out", str(base), "--steps", str(BASE_STEPS)])
    config = run_config(corpus, base, steps=steps, memory_bytes=MEMORY_BYTES, cache_dir=folder.root / "cache")
    longest = -(-task_lengths(config).max_length // DEFAULT_ALIGN) * DEFAULT_ALIGN
    planner = config.planner.model_copy(update={"buckets": (*BUCKETS, longest)})
    config = config.model_copy(update={"planner": planner})
    save_config(config, folder.config)
    return config


def _export(folder: DemoFolder, task: str) -> None:
    _lobra("export", "--run", folder.run, "--task", task, "--out", folder.adapters / task)


def _finish(folder: DemoFolder, config: RunConfig, say: Callable[[str], None]) -> None:
    from rich.console import Console

    from lobra_jax.demo.baseline import compare_with_task_fused
    from lobra_jax.demo.summary import demo_summary, print_summary
    from lobra_jax.report import write_report

    summary = demo_summary(folder.run, *compare_with_task_fused(config, folder.plan))
    report = write_report(folder.run, summary=summary)
    print_summary(summary, Console())
    say(f"adapters (PEFT): {folder.adapters}")
    say(f"report: {report} (pictures beside it)")


def _lobra(*arguments: object) -> None:
    _run([sys.executable, "-m", "lobra_jax", *map(str, arguments)])


def _run(command: list[str]) -> None:
    status = subprocess.run(command, env={**ALLOCATOR, **os.environ}, check=False).returncode
    if status != 0:
        name = " ".join(command[2:4])
        raise UserError(f"{name} failed with status {status}", expected="its one-line reason above")
