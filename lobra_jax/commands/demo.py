"""`lobra demo`: everything on built-in tasks and simulated devices."""

from __future__ import annotations

from pathlib import Path

import click

from lobra_jax.demo import DEFAULT_STEPS


@click.command(epilog="\b\nExample:\n  lobra demo --out demo_out\n  lobra demo --out longer --steps 40")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo_out"),
    show_default=True,
    help="A new or empty folder, or an earlier demo's, which is replaced.",
)
@click.option("--steps", type=click.IntRange(min=1), default=DEFAULT_STEPS, show_default=True, help="Joint steps.")
def demo(out: Path, steps: int) -> None:
    """Run everything on built-in tasks and simulated devices.

    Makes six tasks of real text, a tokenizer and a small base; measures, plans, trains jointly on unlike replicas,
    compares with Task-Fused, exports the adapters and writes a report with pictures. About five minutes on two cores.
    """
    from lobra_jax.demo.run import run_demo

    run_demo(out, steps=steps, say=click.echo)
