"""Host memory of loading a base: `python -m profiling.bench.load --out load.json`.

Writes checkpoints of a preset's shapes cut to some numbers of layers (zeros, bf16, in shards), loads each in a process
of its own onto one CPU device, and reports the largest private memory of the process above its start and the arrays.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from lobra_jax.models.config import PRESETS
from lobra_jax.models.weights import weight_shapes
from planner.files import check_out, write_json
from profiling.bench.provenance import provenance

SHARD_BYTES = 2**30
SAMPLE_INTERVAL_S = 0.005
KIB = 1024


class _Zeros:
    """Weights that cost no time to make."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.zeros(self._shapes[name], ml_dtypes.bfloat16)[index]


@click.command(epilog="\b\nExample:\n  python -m profiling.bench.load --preset llama2-7b --layers 2,8 --out load.json")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama2-7b", show_default=True, help="Shapes.")
@click.option("--layers", default="2,8", show_default=True, help="Numbers of layers to load.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The JSON file to write.")
def main(preset: str, layers: str, out: Path) -> None:
    """Measure the host memory that loading a base takes beside the arrays themselves."""
    from lobra_jax.models.hf import save_hf

    check_out(out)
    results = []
    for count in map(int, layers.split(",")):
        config = dataclasses.replace(PRESETS[preset], num_layers=count)
        with tempfile.TemporaryDirectory() as name:
            save_hf(name, config, _Zeros(weight_shapes(config)), dtype="bfloat16", max_shard_bytes=SHARD_BYTES)
            command = [sys.executable, "-c", f"from {__spec__.name} import measure; measure({name!r})"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append({"preset": preset, "layers": count, **json.loads(done.stdout.splitlines()[-1])})
        above, arrays = results[-1]["above_arrays_bytes"], results[-1]["array_bytes"]
        click.echo(
            f"{count} layers: {arrays / 2**30:.2f} GiB of arrays in {results[-1]['wall_s']:.1f} s, "
            f"{above / 2**30:.2f} GiB at most beside them"
        )
    libraries = ("jax", "numpy", "safetensors")
    write_json(out, {**provenance(libraries), "results": results})


def measure(folder: str) -> None:
    """Loads the folder onto one CPU device and prints what it took as JSON."""
    import jax
    import jax.numpy as jnp

    from lobra_jax.engine import Engine
    from lobra_jax.lora import LoraSpec
    from lobra_jax.models.hf import HFWeights
    from lobra_jax.models.hf_config import load_llama_config
    from planner.plan import ParallelConfig, Plan, ReplicaGroup

    config = load_llama_config(folder)
    one = ParallelConfig(tp=1, pp=1, remat="none")
    group = ReplicaGroup(count=1, config=one, capacity_tokens=16)
    plan = Plan(model=config.name, num_devices=1, replicas=(group,), buckets=(16,))
    engine = Engine(plan, config, [LoraSpec(rank=1, alpha=1)], dtype=jnp.bfloat16, devices=jax.devices()[:1])
    start_bytes, largest, over = _private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_INTERVAL_S):
            largest[0] = max(largest[0], _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    engine.load(HFWeights(folder, config))
    jax.block_until_ready([replica.params for replica in engine.replicas])
    wall_s = time.perf_counter() - started
    over.set()
    watcher.join()
    array_bytes = sum(leaf.nbytes for replica in engine.replicas for leaf in jax.tree.leaves(replica.params))
    above = max(largest[0], _private_bytes()) - start_bytes - array_bytes
    print(json.dumps({"array_bytes": array_bytes, "above_arrays_bytes": above, "wall_s": wall_s}))


def _private_bytes() -> int:
    """Memory of this process that is no file's; mapped checkpoints are the page cache's, which gives way."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
