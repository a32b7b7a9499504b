"""Reads the files of the original LobRA unchanged: time and memory CSVs, trainer JSON, strategy YAML, comma lists.

Its times are milliseconds of ONE layer, forward + backward, for each (tp, length, rows); a pipeline stage of a model of
L layers takes L / pp times as long. Its profiles know no rematerialisation, so every config is (tp, pp, none).
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.config_cost import ConfigCost, CostPoint
from planner.cost import CostTable
from planner.errors import UserError
from planner.fit import fit_coefficients, hold_out
from planner.plan import ParallelConfig, ReplicaGroup
from planner.yaml_text import parse_yaml

MS_PER_S = 1e3
LOBRA_REMAT = "none"
LOBRA_FINGERPRINT = "lobra-files"
"""`CostTable.model_fingerprint` of tables read from CSVs: they do not say which model was measured."""

TIME_COLUMNS = ("tp", "seq_len", "mbs", "time")
MEMORY_COLUMNS = ("tp", "pp", "sp", "max_tokens")

TARGETS = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "qkv_proj": ("q", "k", "v"),
    "o_proj": ("o",),
    "dense_h_to_4h": ("gate", "up"),
    "dense_4h_to_h": ("down",),
}
"""The original's module names -> ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LobraTask:
    """One entry of a trainer JSON."""

    name: str
    dataset: str
    batch_size: int
    context_length: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    steps: int


def read_cost_table(
    time_csv: str | Path, memory_csv: str | Path, *, num_layers: int, model: str | None = None, sp: int = 1
) -> CostTable:
    """The cost table of a model of `num_layers` layers from a LobRA time CSV and memory CSV.

    Rows of the memory CSV with another `sp` (sequence parallelism off or on) or with 0 tokens (the config does not
    fit) are left out, as the original does. `model` names the model in plans; by default the time file's name.
    """
    if num_layers < 1:
        raise UserError("bad value", key="num_layers", value=num_layers, expected="an integer >= 1")
    times = _read_times(time_csv)
    configs = []
    for line, row in csv_rows(memory_csv, MEMORY_COLUMNS):
        tp, pp, row_sp, tokens = (_integer(row, name, memory_csv, line) for name in MEMORY_COLUMNS)
        if row_sp != sp or tokens == 0:
            continue
        if tp not in times:
            raise UserError(
                f"no time was measured for tp={tp}",
                file=f"{memory_csv}:{line}",
                expected=f"rows of tp={tp} in {time_csv}",
            )
        configs.append(_config_cost(memory_csv, line, times[tp], tp=tp, pp=pp, tokens=tokens, num_layers=num_layers))
    if not configs:
        raise UserError(f"no config with sp={sp} holds a token", file=memory_csv, expected="rows tp,pp,sp,max_tokens")
    try:
        return CostTable(
            model=model or Path(time_csv).stem,
            model_fingerprint=LOBRA_FINGERPRINT,
            hardware={"source": "LobRA profile"},
            configs=tuple(configs),
            provenance={"time_csv": str(time_csv), "memory_csv": str(memory_csv), "num_layers": num_layers},
        )
    except ValueError as error:
        raise UserError(str(error), file=memory_csv) from error


def read_tasks(path: str | Path) -> tuple[LobraTask, ...]:
    """The tasks of a trainer JSON, the first `train_task_num` of its list as the original does; names made unique."""
    raw = _json_object(path)
    entries = raw.get("task")
    if not isinstance(entries, list) or not entries:
        raise UserError("missing", file=path, key="task", expected="a list of tasks")
    number = raw.get("train_task_num", len(entries))
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(entries):
        raise UserError("bad value", file=path, key="train_task_num", value=number, expected=f"1 to {len(entries)}")
    tasks: list[LobraTask] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries[:number]):
        task = _task(entry, path, f"task[{index}]")
        seen[task.dataset] = seen.get(task.dataset, 0) + 1
        suffix = f"-{seen[task.dataset]}" if seen[task.dataset] > 1 else ""
        tasks.append(dataclasses.replace(task, name=task.dataset + suffix))
    return tuple(tasks)


def read_strategy(path: str | Path) -> tuple[ReplicaGroup, ...]:
    """The replicas of a strategy YAML (`strategy_config: - {dp, tp, pp, max_tokens}`)."""
    raw = _yaml(path)
    entries = raw.get("strategy_config") if isinstance(raw, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise UserError("missing", file=path, key="strategy_config", expected="a list of {dp, tp, pp, max_tokens}")
    groups = []
    for index, entry in enumerate(entries):
        key = f"strategy_config[{index}]"
        if not isinstance(entry, Mapping):
            raise UserError("bad value", file=path, key=key, value=entry, expected="{dp, tp, pp, max_tokens}")
        groups.append(_group(**{name: _positive(entry, name, path, key) for name in ("dp", "tp", "pp", "max_tokens")}))
    return tuple(groups)


def is_strategy_file(path: str | Path) -> bool:
    """Whether a plan file is a strategy YAML of the original."""
    raw = _yaml(path)
    return isinstance(raw, Mapping) and "strategy_config" in raw


def parse_plan_lists(tokens: str, dps: str, tps: str, pps: str) -> tuple[ReplicaGroup, ...]:
    """The replicas of the original's four comma lists, for example "2048,4096,16384" "6,1,1" "1,2,8" "1,1,1"."""
    flag = "--lobra-plan"
    lists = {}
    for name, text in (("max_tokens", tokens), ("dp", dps), ("tp", tps), ("pp", pps)):
        try:
            lists[name] = [int(item) for item in text.split(",")]
        except ValueError as error:
            raise UserError("bad list", key=f"{flag} {name}", value=text, expected="integers, comma between") from error
        if any(number < 1 for number in lists[name]):
            raise UserError("bad list", key=f"{flag} {name}", value=text, expected="integers >= 1")
    sizes = {name: len(numbers) for name, numbers in lists.items()}
    if len(set(sizes.values())) != 1:
        raise UserError("lists of unlike length", key=flag, value=sizes, expected="one entry a config in each list")
    return tuple(_group(**dict(zip(lists, numbers, strict=True))) for numbers in zip(*lists.values(), strict=True))


def _group(*, dp: int, tp: int, pp: int, max_tokens: int) -> ReplicaGroup:
    config = ParallelConfig(tp=tp, pp=pp, remat=LOBRA_REMAT)
    return ReplicaGroup(count=dp, config=config, capacity_tokens=max_tokens)


def _read_times(path: str | Path) -> dict[int, tuple[CostPoint, ...]]:
    """Seconds of one layer by tp, held-out points marked."""
    times: dict[int, list[CostPoint]] = {}
    for line, row in csv_rows(path, TIME_COLUMNS):
        tp, length, rows = (_integer(row, name, path, line, least=1) for name in TIME_COLUMNS[:3])
        try:
            milliseconds = float(row["time"])
        except ValueError:
            milliseconds = float("nan")
        if not 0 < milliseconds < float("inf"):
            raise UserError(
                "bad time", file=f"{path}:{line}", key="time", value=row["time"], expected="positive milliseconds"
            )
        times.setdefault(tp, []).append(
            CostPoint(rows=rows, length=length, seconds=milliseconds / MS_PER_S, peak_bytes=0)
        )
    if not times:
        raise UserError("no rows", file=path, expected="rows tp,seq_len,mbs,time")
    return {tp: hold_out(points) for tp, points in times.items()}


def _config_cost(
    path: str | Path, line: int, layer: Sequence[CostPoint], *, tp: int, pp: int, tokens: int, num_layers: int
) -> ConfigCost:
    if pp > num_layers:
        raise UserError(
            "more stages than layers", file=f"{path}:{line}", key="pp", value=pp, expected=f"<= {num_layers}"
        )
    layers = num_layers / pp
    coefficients, error = fit_coefficients(layer)
    return ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat=LOBRA_REMAT),
        capacity_tokens=tokens,
        coefficients=tuple(value * layers for value in coefficients),
        points=tuple(dataclasses.replace(point, seconds=point.seconds * layers) for point in layer),
        fit_error=error,
    )


def _task(entry: Any, path: str | Path, key: str) -> LobraTask:
    if not isinstance(entry, Mapping):
        raise UserError("bad value", file=path, key=key, value=entry, expected="a mapping")
    dataset = entry.get("dataset_name")
    if not isinstance(dataset, str) or not dataset:
        raise UserError("bad value", file=path, key=f"{key}.dataset_name", value=dataset, expected="a name")
    alpha = entry.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError("bad value", file=path, key=f"{key}.lora_alpha", value=alpha, expected="a positive number")
    return LobraTask(
        name=dataset,
        dataset=dataset,
        batch_size=_positive(entry, "global_batch_size", path, key),
        context_length=_positive(entry, "context_length", path, key),
        rank=_positive(entry, "rank", path, key),
        alpha=float(alpha),
        targets=_targets(entry.get("target_modules"), path, f"{key}.target_modules"),
        steps=_positive(entry, "steps", path, key),
    )


def _targets(names: Any, path: str | Path, key: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not names:
        raise UserError("bad value", file=path, key=key, value=names, expected="a list of module names")
    found: list[str] = []
    for name in names:
        if name not in TARGETS:
            raise UserError("unknown target module", file=path, key=key, value=name, expected=", ".join(TARGETS))
        found.extend(target for target in TARGETS[name] if target not in found)
    return tuple(found)


def _positive(entry: Mapping[str, Any], name: str, path: str | Path, key: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError("bad value", file=path, key=f"{key}.{name}", value=value, expected="an integer >= 1")
    return value


def _integer(row: Mapping[str, str], name: str, path: str | Path, line: int, least: int | None = None) -> int:
    least = (0 if name in ("sp", "max_tokens") else 1) if least is None else least
    try:
        number = float(row[name])
        value = int(number) if number.is_integer() else least - 1
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(
            "bad number", file=f"{path}:{line}", key=name, value=row[name], expected=f"an integer >= {least}"
        )
    return value


def csv_rows(path: str | Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV whose header names at least `columns`; blanks around names and values are cut.

    Raises:
      UserError: the file cannot be read, lacks a column, or has a row of another number of columns.
    """
    reader = csv.DictReader(_text(path).splitlines())
    header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"no column {missing[0]}", file=f"{path}:1", value=",".join(header), expected=",".join(columns))
    reader.fieldnames = header
    rows = []
    for row in reader:
        if not any(value and value.strip() for value in row.values() if isinstance(value, str | None)):
            continue
        if any(row[name] is None for name in columns) or None in row:
            raise UserError("wrong number of columns", file=f"{path}:{reader.line_num}", expected=",".join(header))
        rows.append((reader.line_num, {name: row[name].strip() for name in columns}))
    return rows


def _json_object(path: str | Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(_text(path))
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"not JSON: {error}", file=f"{path}{line}", expected="a LobRA trainer JSON") from error
    if not isinstance(raw, Mapping):
        raise UserError("not a mapping", file=path, expected="a LobRA trainer JSON")
    return raw


def _yaml(path: str | Path) -> Any:
    return parse_yaml(_text(path), file=path, expected="a plan.yaml, or strategy_config: a list")


def _text(path: str | Path) -> str:
    """The file's text; a byte order mark, as spreadsheets write it, is no part of it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise UserError("not a text file", file=path, expected="UTF-8") from error
