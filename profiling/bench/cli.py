"""`lobra bench`: speed and memory on the devices present, beside what bounds them and beside other stacks."""

from __future__ import annotations

import click

from lobra_jax.cli import CommandEntry, LazyGroup

BENCHES = {
    "estimate": CommandEntry(
        target="profiling.bench.estimate:main",
        help="Compare an estimated cost table with a measured one.",
    ),
    "step": CommandEntry(
        target="profiling.bench.step:main",
        help="Time a joint step beside the matmul ceiling and the frozen base alone.",
    ),
    "submeshes": CommandEntry(
        target="profiling.bench.submeshes:main",
        help="Time one replica of every (tp, pp) that fits, against one device.",
    ),
    "peers": CommandEntry(
        target="profiling.bench.peers:main",
        help="Time the same step with transformers and PEFT, and with Liger's kernels.",
    ),
    "experiment": CommandEntry(
        target="profiling.bench.experiment:main",
        help="Train the same batches as each compared system would; GPU-seconds.",
    ),
    "packing": CommandEntry(
        target="profiling.bench.packing:main",
        help="Run the same steps with padded and with packed rows.",
    ),
    "quantization": CommandEntry(
        target="profiling.bench.quantization:main",
        help="Compare quantised bases with the unquantised one.",
    ),
}


@click.group(cls=LazyGroup, entries=BENCHES, epilog="\b\nExample:\n  lobra bench step --out step.json")
def bench() -> None:
    """Measure speed and memory on the devices present."""
