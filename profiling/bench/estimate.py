"""How far an estimated cost table is from a measured one of the same model.

    python -m profiling.bench.estimate estimated.json measured.json --out error.json

For every config that both know: the relative error of the estimate's seconds at each shape that was measured, and both
capacities.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import click

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.files import check_out, write_json
from profiling.bench.provenance import provenance

FILE = click.Path(path_type=Path, dir_okay=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigError:
    """Relative errors |estimated - measured| / measured of one config; `bias` keeps the sign."""

    config: str
    num_shapes: int
    mean: float
    max: float
    bias: float
    capacity_tokens: tuple[int, int]


def compare(estimated: CostTable, measured: CostTable) -> list[ConfigError]:
    """One entry for each config that both tables have.

    Raises:
      UserError: tables of two models, or without a config in common.
    """
    if estimated.model_fingerprint != measured.model_fingerprint:
        raise UserError("tables of two models", key="model", value=estimated.model, expected=measured.model)
    known = {cost.config: cost for cost in estimated.configs}
    errors = [_error(known[cost.config], cost) for cost in measured.configs if cost.config in known and cost.points]
    if not errors:
        expected = ", ".join(str(cost.config) for cost in measured.configs)
        raise UserError("no config in common", key="configs", expected=f"some of {expected}")
    return errors


def _error(estimated: ConfigCost, measured: ConfigCost) -> ConfigError:
    relative = [estimated.micro_batch_s(p.rows, p.length) / p.seconds - 1 for p in measured.points]
    return ConfigError(
        config=str(measured.config),
        num_shapes=len(relative),
        mean=statistics.fmean(map(abs, relative)),
        max=max(map(abs, relative)),
        bias=statistics.fmean(relative),
        capacity_tokens=(estimated.capacity_tokens, measured.capacity_tokens),
    )


def mean_error(errors: list[ConfigError]) -> float:
    """Over all shapes of all configs."""
    return sum(e.mean * e.num_shapes for e in errors) / sum(e.num_shapes for e in errors)


@click.command(epilog="\b\nExample:\n  lobra bench estimate estimated.json measured.json --out error.json")
@click.argument("estimated", type=FILE)
@click.argument("measured", type=FILE)
@click.option("--out", type=FILE, metavar="FILE", help="Write the errors as JSON, with where and when.")
def main(estimated: Path, measured: Path, out: Path | None) -> None:
    """Compare an estimated cost table with a measured one.

    ESTIMATED is what `lobra profile --estimate` wrote, MEASURED what `lobra profile` did for the same config.
    """
    check_out(out)
    tables = CostTable.load(estimated), CostTable.load(measured)
    errors = compare(*tables)
    for error in errors:
        ours, theirs = error.capacity_tokens
        click.echo(
            f"{error.config}: seconds of {error.num_shapes} shapes off by {error.mean:.1%} in the mean, "
            f"{error.max:.1%} at most ({error.bias:+.1%}); capacity {ours:,} of {theirs:,} tokens"
        )
    click.echo(f"in all {mean_error(errors):.1%} in the mean over {sum(e.num_shapes for e in errors)} shapes")
    if out is not None:
        write_json(out, _report(*tables, errors))


def _report(estimated: CostTable, measured: CostTable, errors: list[ConfigError]) -> dict[str, Any]:
    return {
        "what": "relative error of estimated seconds at measured shapes; capacity_tokens is estimated, measured",
        "model": measured.model,
        "estimated": dict(estimated.provenance),
        "measured_on": dict(measured.hardware),
        "mean_error": mean_error(errors),
        "configs": [dataclasses.asdict(error) for error in errors],
        **provenance(("jax", "numpy")),
    }


if __name__ == "__main__":
    main()
