"""How fast text becomes tokens, and in how much memory: `python -m profiling.bench.tokenize --out tokenize.json`.

Tokenises made-up JSONL files of several sizes, each in a process of its own, and writes records a minute, processor
seconds and the process's largest resident size.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from lobra_jax.data.cache import cached_tokens
from lobra_jax.data.tokenizer import load_tokenizer
from planner.files import check_out, write_json
from profiling.bench.provenance import provenance

SIZES = (25_000, 100_000, 400_000)
PROMPT_WORDS, COMPLETION_WORDS = 30, 15
KIB = 1024
"""Unit of `ru_maxrss` on Linux, bytes."""

WORDS = "the quick brown fox jumps over a lazy dog while seven people discuss what models might compute".split()


@click.command(epilog="\b\nExample:\n  python -m profiling.bench.tokenize --out tokenize.json")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The JSON file to write.")
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True, help="Numbers of records.")
def main(out: Path, sizes: str) -> None:
    """Measure tokenising of short prompt and completion records."""
    check_out(out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokenizer(folder / "tokenizer.json")
        results = []
        for count in map(int, sizes.split(",")):
            _write_records(folder / "records.jsonl", count)
            command = [sys.executable, "-c", f"from {__spec__.name} import measure; measure({name!r})"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
            click.echo(
                f"{count:,} records: {results[-1]['records_per_minute']:,.0f} a minute, "
                f"{results[-1]['max_resident_bytes'] / 2**20:.0f} MiB at most"
            )
    write_json(out, {**provenance(("tokenizers", "numpy")), "results": results})


def measure(name: str) -> None:
    """Tokenises the folder's records and prints what it took as JSON."""
    folder = Path(name)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        _, summary = cached_tokens(
            [folder / "records.jsonl"],
            cache_dir=Path(cache),
            task="bench",
            split="train",
            template="alpaca",
            context_length=2048,
            tokenizer=tokenizer,
        )
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    result = {
        "records": summary.num_records,
        "file_bytes": (folder / "records.jsonl").stat().st_size,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "records_per_minute": 60 * summary.num_records / wall_s,
        "resident_bytes_before": before_bytes,
        "max_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
    }
    print(json.dumps(result))


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer=trainer)
    tokenizer.save(str(path))


def _write_records(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = rng.choice(WORDS, PROMPT_WORDS + COMPLETION_WORDS)
            record = {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " ".join(words[PROMPT_WORDS:])}
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
