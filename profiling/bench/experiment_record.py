"""The results of `lobra bench experiment`: kept part by part in a JSON file, added up by system, printed."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from lobra_jax.config import model_config
from lobra_jax.devices import memory_limit
from planner.errors import UserError
from planner.files import write_json
from profiling.bench.experiment_run import NUM_WARM_UPS, Scene
from profiling.bench.provenance import provenance
from profiling.systems import SYSTEMS
from profiling.table import differing_keys

WHAT = (
    "joint steps of random weights and tokens, timed after warm-up: forward, backward, gradient sum, update, dispatch "
    "ahead; GPU-seconds are seconds times all devices given; a system without joint steps takes the sum of its tasks'"
)


def set_up(scene: Scene, *, remat: str, refined: bool) -> dict[str, Any]:
    """What results must have in common to be compared."""
    config, model = scene.config, model_config(scene.config)
    costs = json.dumps(scene.costs.to_dict(), sort_keys=True)
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "devices": f"{len(scene.devices)} x {scene.devices[0].device_kind}",
        "memory_bytes": memory_limit(config.devices, scene.devices[0]),
        "tasks": {
            task.name: {
                "batch_size": task.batch_size,
                "rank": task.rank,
                "targets": list(task.targets),
                "mean_length": float(data.train.lengths.mean()),
                "longest": int(data.train.lengths.max()),
            }
            for task, data in zip(config.tasks, scene.tasks, strict=True)
        },
        "seed": config.training.seed,
        "warm_up_steps": NUM_WARM_UPS,
        "timed_steps": scene.num_steps,
        "remat": remat,
        "refined": refined,
        "padded_lengths": {"buckets": str(config.planner.buckets), "num_buckets": config.planner.num_buckets},
        "row_options": config.planner.row_options,
        "costs_of": {
            "device_kind": scene.costs.hardware.get("device_kind"),
            "command": scene.costs.provenance.get("command"),
        },
        "costs_sha256": hashlib.sha256(costs.encode()).hexdigest(),
    }


class Results:
    """The file of results. `name in results` says whether a part was run to its end."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self._path = path
        self._record = record

    @classmethod
    def begin(cls, path: Path, set_up: Mapping[str, Any], command: str) -> Results:
        """A file that was begun is gone on with; `UserError` if it is damaged or of another set-up."""
        parts: dict[str, Any] = {}
        if path.exists():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
                differing = differing_keys(old["set_up"], set_up)
                parts = dict(old["parts"])
                for name, part in parts.items():
                    if "failed" not in part:
                        _row(name, [part], 1)  # has all that a row is made of
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                expected = "what an interrupted `lobra bench experiment` left; or delete it"
                raise UserError("cannot go on from this file", file=path, expected=expected) from error
            if differing:
                expected = "the options it was begun with, or another --out"
                raise UserError("results of another set-up", file=path, key=", ".join(differing), expected=expected)
        record = {
            "what": WHAT,
            "command": command,
            **provenance(("jax", "jaxlib", "numpy", "pyscipopt")),
            "set_up": dict(set_up),
            "systems": [],
            "parts": parts,
        }
        return cls(path, record)

    def __contains__(self, name: str) -> bool:
        return "failed" not in self._record["parts"].get(name, {"failed": ""})

    def keep(self, name: str, part: dict[str, Any]) -> None:
        """Adds a part and writes the file anew, as a whole."""
        own = {key: self._record[key] for key in ("commit", "date")}
        self._record["parts"][name] = {**own, **part}
        self._record["systems"] = [row for key in SYSTEMS if (row := self.row(key)) is not None]
        write_json(self._path, self._record)

    def line(self, name: str) -> str:
        """One part, for people."""
        part = self._record["parts"][name]
        if "failed" in part:
            return f"{name}: {part['failed']}"
        row = _row(name, [part], self._num_devices)
        return (
            f"{name}: step {row['step_s']:.3f} s (predicted {row['predicted_step_s']:.3f}, off by "
            f"{row['prediction_error']:.1%}), {part['num_programs']} programs in {part['compile_s']:.0f} s"
        )

    def row(self, key: str) -> dict[str, Any] | None:
        """A system's numbers; None while parts of it are missing."""
        names = self._names(key)
        if not names or any(name not in self for name in names):
            return None
        return _row(SYSTEMS[key].name, [self._record["parts"][name] for name in names], self._num_devices)

    def failed(self, keys: Sequence[str]) -> list[str]:
        return [name for key in keys for name in self._names(key) if name not in self]

    def _names(self, key: str) -> list[str]:
        if SYSTEMS[key].is_joint:
            return [key]
        return [f"{key}/{task}" for task in self._record["set_up"]["tasks"]]

    @property
    def _num_devices(self) -> int:
        return int(self._record["set_up"]["devices"].partition(" ")[0])


def _row(name: str, parts: Sequence[Mapping[str, Any]], num_devices: int) -> dict[str, Any]:
    """The k-th step of a system is the k-th of each of its parts, one after the other."""
    steps = [step for part in parts for step in part["steps"]]

    def by_step(key: str) -> np.ndarray:
        return np.sum([[step[key] for step in part["steps"]] for part in parts], axis=0)

    def total(key: str) -> float:
        return float(sum(step[key] for step in steps))

    step_s, predicted_s = by_step("step_s"), by_step("predicted_step_s")
    return {
        "system": name,
        "plan": "; ".join(part["replicas"] if len(parts) == 1 else _named(part) for part in parts),
        "gpu_seconds": num_devices * float(step_s.mean()),
        "gpu_seconds_of_all_steps": num_devices * float(step_s.sum()),
        "step_s": float(step_s.mean()),
        "step_s_p50": float(np.quantile(step_s, 0.5)),
        "step_s_p95": float(np.quantile(step_s, 0.95)),
        "tokens_per_s_per_device": total("tokens") / float(step_s.sum()) / num_devices,
        "idle_share": 1 - total("busy_s") / (num_devices * float(step_s.sum())),
        "padding_share": 1 - total("tokens") / total("padded_tokens"),
        "predicted_step_s": float(predicted_s.mean()),
        "prediction_error": float(np.mean(np.abs(predicted_s - step_s) / step_s)),
        "sum_update_share": total("sum_update_s") / float(step_s.sum()),
        "host_wait_share": total("host_wait_s") / float(step_s.sum()),
        "wait_dispatch_s": statistics.mean(step["wait_dispatch_s"] for step in steps),
        "dispatch_solve_s": statistics.mean(step["dispatch_solve_s"] for step in steps),
        "host_late_share": sum(max(step["replica_late_s"]) for step in steps) / float(step_s.sum()),
        "issue_s_per_micro_batch": total("issue_s") / total("num_micro_batches"),
        "compile_s": sum(part["compile_s"] for part in parts),
        "num_programs": sum(part["num_programs"] for part in parts),
        "compilations_while_timed": int(total("compilations")),
    }


def _named(part: Mapping[str, Any]) -> str:
    return f"{', '.join(part['tasks'])}: {part['replicas']}"


def print_table(results: Results, keys: Sequence[str]) -> None:
    """The systems that are complete, and their plans below."""
    rows = [row for key in keys if (row := results.row(key)) is not None]
    if not rows:
        return
    most = max(row["gpu_seconds"] for row in rows)
    click.echo(
        f"{'system':18} {'GPU-s':>8} {'share':>6} {'p50 s':>8} {'p95 s':>8} {'idle':>6} {'padding':>7} "
        f"{'predicted':>9} {'error':>6} {'update':>6} {'wait ms':>8} {'late':>6} {'compile s':>9}"
    )
    for row in rows:
        click.echo(
            f"{row['system']:18} {row['gpu_seconds']:8.2f} {row['gpu_seconds'] / most:6.3f} {row['step_s_p50']:8.3f} "
            f"{row['step_s_p95']:8.3f} {row['idle_share']:6.1%} {row['padding_share']:7.1%} "
            f"{row['predicted_step_s']:9.3f} {row['prediction_error']:6.1%} {row['sum_update_share']:6.1%} "
            f"{1e3 * row['wait_dispatch_s']:8.1f} {row['host_late_share']:6.1%} {row['compile_s']:9.0f}"
        )
    for row in rows:
        click.echo(f"{row['system']}: {row['plan']}")
