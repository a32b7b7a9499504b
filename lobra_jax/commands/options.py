"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--config FILE` (argument `config_path: Path`) and `--set KEY=VALUE` (`overrides: tuple[str, ...]`)."""
    command = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change a key of the config: training.seed=1, tasks.NAME.lr=1e-3, tasks.*.steps=5. Repeatable.",
    )(command)
    return click.option(
        "--config",
        "config_path",
        metavar="FILE",
        type=click.Path(path_type=Path),
        required=True,
        help="The run's config, .yaml or .gin.",
    )(command)
