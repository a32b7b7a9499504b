"""The best plan of each of several cost tables of one model, measured with its base stored in different ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import Plan
from planner.planning import PlanningFlags, choose_plan
from planner.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What one cost table comes to: its plan, or why there is none.

    `path` is the table's where another than the one that was planned on.
    """

    quantization: str
    plan: Plan | None
    reason: str = ""
    path: Path | None = None


def compare_tables(
    workload: Workload, tables: Mapping[Path, CostTable], num_devices: int, flags: PlanningFlags
) -> tuple[Compared, ...]:
    """Plans on each table as the flags say, all for the same lengths and devices."""

    def of(path: Path, costs: CostTable) -> Compared:
        try:
            plan = choose_plan(workload, costs, num_devices, flags).plan
        except UserError as error:
            return Compared(quantization=costs.quantization, plan=None, reason=str(error), path=path)
        return Compared(quantization=costs.quantization, plan=plan, path=path)

    return tuple(of(path, costs) for path, costs in tables.items())


def load_compared(paths: Sequence[Path], costs: CostTable) -> dict[Path, CostTable]:
    """The tables at `paths`, which must be of the model that `costs` is of, each of a quantisation of its own."""
    tables: dict[Path, CostTable] = {}
    seen = {costs.quantization: "the table that is planned on"}
    for path in paths:
        table = CostTable.load(path)
        if table.model_fingerprint != costs.model_fingerprint:
            raise UserError(
                "cost table of another model",
                file=path,
                key="model",
                value=f"{table.model} {table.model_fingerprint}",
                expected=f"{costs.model} {costs.model_fingerprint}, as the table that is planned on",
            )
        if table.quantization in seen:
            raise UserError(
                "the same quantisation twice",
                file=path,
                key="provenance.quantization",
                value=table.quantization,
                expected=f"another than that of {seen[table.quantization]}",
            )
        seen[table.quantization] = str(path)
        tables[path] = table
    return tables


def comparison_lines(rows: Sequence[Compared]) -> tuple[str, ...]:
    """A line for each row, the soonest first, those without a plan last, then what to say to take the soonest."""

    def line(row: Compared) -> tuple[float, str]:
        if row.plan is None or row.plan.predicted is None:
            return math.inf, f"quantization {row.quantization}: no plan ({row.reason})"
        predicted = row.plan.predicted
        return predicted.step_s, (
            f"quantization {row.quantization}: step {predicted.step_s:.4g} s, "
            f"{predicted.gpu_seconds:.4g} GPU-seconds a step on {row.plan}"
        )

    lines = [text for _, text in sorted(map(line, rows))]
    soonest = min(rows, key=lambda row: line(row)[0])
    if soonest.path is not None and soonest.plan is not None:
        setting = f"--set model.quantization={soonest.quantization}"
        plan = f"lobra plan {setting} --costs {soonest.path} ..."
        lines.append(f"to take {soonest.quantization}: {plan}, and lobra train {setting} ...")
    return tuple(lines)
