"""`lobra export`: one task's adapter out of a run folder, as PEFT reads it or merged into the base."""

from __future__ import annotations

from pathlib import Path

import click

from lobra_jax.run_folder import CONFIG_FILE


@click.command(
    epilog="\b\nExample:\n"
    "  lobra export --run runs/support --task answers --out answers_adapter\n"
    "  lobra export --run runs/support --task answers --out answers_model --merged"
)
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Run folder of `lobra train`.")
@click.option("--task", required=True, help="Name of the task.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make; never overwritten.")
@click.option("--best", is_flag=True, help="The adapter at the lowest held-out loss instead of the last.")
@click.option("--merged", is_flag=True, help="Write the whole model, adapter merged in, for transformers.")
def export(run: Path, task: str, out: Path, best: bool, merged: bool) -> None:
    """Write one task's adapter as PEFT reads it, or the merged model."""
    from tqdm import tqdm

    from lobra_jax.config import load_config, model_config
    from lobra_jax.export import base_model_name, export_adapter, export_merged, task_folder
    from lobra_jax.models.weights import weight_shapes

    folder = task_folder(run, task, best=best)
    config = load_config(run / CONFIG_FILE, check_files=False)
    if not merged:
        export_adapter(folder, out, base_model_name(config.model.preset, config.model.path))
        click.echo(f"{out}: adapter of task {task}")
        return
    shapes = model_config(config)
    with tqdm(total=len(weight_shapes(shapes)), unit="tensor", desc="merge", disable=None) as bar:
        export_merged(
            folder,
            out,
            shapes,
            path=config.model.path,
            init_seed=config.model.init_seed,
            dtype=config.model.dtype,
            tokenizer=config.data.tokenizer,
            on_tensor=bar.update,
        )
    click.echo(f"{out}: {shapes.name} with the adapter of task {task} merged in")
