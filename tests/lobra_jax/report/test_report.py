"""The report against a run directory whose every number is made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lobra_jax.report import Summary, Table, write_report
from lobra_jax.report.run import load_run
from lobra_jax.schedule import FORWARD, FUSED, one_f_one_b, simulate
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup

PICTURES = ("timeline", "dispatch", "losses", "shares", "step_time")
NUM_STEPS = 12
TASKS = ("signatures", "names", "errors", "bodies", "classes", "topics", "modules")
SHAPES = (
    ((8, 64), (8, 64), (4, 128), (4, 64)),
    ((8, 64), (4, 128), (4, 128), (2, 64)),
    ((4, 512), (2, 512), (8, 128), (8, 128)),
    ((1, 2048), (1, 512)),
)
SUMMARY = Summary(title="A run")


@pytest.fixture(scope="module")
def plan() -> Plan:
    def group(count: int, tp: int, pp: int, remat: str, capacity: int) -> ReplicaGroup:
        return ReplicaGroup(count=count, config=ParallelConfig(tp=tp, pp=pp, remat=remat), capacity_tokens=capacity)

    return Plan(
        model="demo-base",
        num_devices=8,
        replicas=(group(2, 1, 1, "none", 1024), group(1, 1, 2, "dots", 2048), group(1, 2, 2, "full", 8192)),
        buckets=(64, 128, 512, 2048, 4608),
    )


@pytest.fixture
def run_folder(tmp_path: Path, plan: Plan) -> Path:
    return _write_run(tmp_path, plan)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """report.html of the run, for tests that only read."""
    return write_report(_write_run(tmp_path_factory.mktemp("run"), plan), summary=SUMMARY)


def _write_run(tmp_path: Path, plan: Plan) -> Path:
    plan.save(tmp_path / "plan.yaml")
    records = [record for step in range(NUM_STEPS) for record in _records(step)]
    records.append({"kind": "event", "step": NUM_STEPS, "task": "names", "event": "finished", "message": "<done>"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "timeline.json").write_text(json.dumps(_timeline(plan)))
    return tmp_path


def _records(step: int) -> list[dict]:
    replica_s = [0.9, 0.95 + 0.02 * (step % 3), 1.0, 1.1 - 0.01 * step]
    total = max(replica_s) + 0.08
    out = [
        {
            "kind": "step",
            "step": step + 1,
            "tokens": 13_000,
            "padded_tokens": 15_000,
            "padding_share": 2 / 15 + 0.01 * (step % 4),
            "idle_share": 0.05 + 0.01 * (step % 5),
            "gpu_seconds": 8 * total,
            "seconds": {
                "wait_dispatch": 0.001,
                "issue": 0.02,
                "execute": total - 0.08,
                "sum_update": 0.08,
                "total": total,
            },
            "dispatch_solve_s": 0.02,
            "predicted_s": [0.92, 0.92, 1.02, 1.05],
            "measured_s": replica_s,
            "predicted_step_s": 1.1,
            "num_micro_batches": [4, 4, 4, 3],
            "compilations": 0,
        }
    ]
    for index, task in enumerate(TASKS):
        loss = (5 + 0.2 * index) * (0.6 + 0.4 * 0.8**step)
        row = {"step": step + 1, "task": task, "task_step": step + 1, "loss": loss, "tokens": 1000}
        out.append({"kind": "task", **row, "sequences": 8, "lr": 0.01, "grad_norm": 1.0})
        if step in (0, NUM_STEPS - 1):
            out.append({"kind": "eval", **row, "loss": 1.02 * loss})
    return out


def _timeline(plan: Plan) -> dict:
    replicas = []
    for index, (group, shapes) in enumerate(zip(plan.expanded(), SHAPES, strict=True)):
        replicas.append(
            {
                "name": f"replica {index} {group.config}",
                "config": str(group.config),
                "devices": [index],
                "stages": _stages(group.config.pp, shapes, 1.0),
                "measured_s": 1.0,
                "predicted_s": 0.95,
                "predicted_stages": _stages(group.config.pp, shapes, 0.95),
            }
        )
    end_s = max(action["end_s"] for replica in replicas for stage in replica["stages"] for action in stage)
    return {"step": 7, "step_s": end_s + 0.09, "sum_update_s": 0.09, "replicas": replicas}


def _stages(num_stages: int, shapes: tuple[tuple[int, int], ...], speed: float) -> list[list[dict]]:
    seconds = [[speed * (rows * length * 4e-4 + 0.02) / num_stages] * num_stages for rows, length in shapes]
    stages: list[list[dict]] = [[] for _ in range(num_stages)]
    for action, (start, end) in simulate(one_f_one_b(num_stages, len(shapes)), seconds).items():
        rows, length = shapes[action.micro_batch]
        common = {"micro_batch": action.micro_batch, "rows": rows, "length": length}
        middle = start + (end - start) / 3
        parts = [("forward", start, middle), ("backward", middle, end)]
        if action.phase != FUSED:
            parts = [("forward" if action.phase == FORWARD else "backward", start, end)]
        stages[action.stage] += [{**common, "phase": p, "start_s": s, "end_s": e} for p, s, e in parts]
    return stages


def _cells(page: str) -> list[str]:
    return re.findall(r"<td>(.*?)</td>", page)


def test_report_embeds_every_picture_it_writes(report: Path) -> None:
    page = report.read_text()
    for name in PICTURES:
        assert (report.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_report_escapes_what_the_run_says(report: Path) -> None:
    page = report.read_text()
    assert "&lt;done&gt;" in page and "<done>" not in page


def test_report_opens_with_the_given_summary(run_folder: Path) -> None:
    table = Table(title="Against Task-Fused", head=("plan", "device-seconds"), rows=(("ours", "8.8"),), note="mean")
    page = write_report(run_folder, summary=Summary(title="Demo", lines=("All fell.",), tables=(table,))).read_text()
    assert "<h1>Demo</h1>" in page and "All fell." in page and "Against Task-Fused" in page
    assert _cells(page)[:2] == ["ours", "8.8"]


def test_report_without_a_timeline_says_so(run_folder: Path) -> None:
    (run_folder / "timeline.json").unlink()
    page = write_report(run_folder, summary=SUMMARY).read_text()
    assert "No timeline was recorded" in page
    assert page.count("data:image/png;base64,") == len(PICTURES) - 2


def test_report_draws_a_run_with_losses_that_were_not_finite(run_folder: Path) -> None:
    with (run_folder / "metrics.jsonl").open("a") as file:
        record = {"step": 13, "task": "errors", "task_step": 13, "loss": None, "tokens": 10}
        file.write(json.dumps({"kind": "eval", **record}) + "\n")
        file.write(json.dumps({"kind": "task", **record, "sequences": 1, "lr": 0.01, "grad_norm": None}) + "\n")
    page = write_report(run_folder, summary=SUMMARY).read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES)


def test_timeline_knows_each_replicas_micro_batches(run_folder: Path) -> None:
    timeline = load_run(run_folder).timeline
    assert timeline is not None
    assert tuple(replica.shapes for replica in timeline.replicas) == SHAPES
    assert timeline.lengths == (64, 128, 512, 2048)


def test_a_replica_without_work_is_drawn_idle(run_folder: Path) -> None:
    raw = json.loads((run_folder / "timeline.json").read_text())
    raw["replicas"][0].update(stages=[[]], predicted_stages=[[]])
    (run_folder / "timeline.json").write_text(json.dumps(raw))
    write_report(run_folder, summary=SUMMARY)
    timeline = load_run(run_folder).timeline
    assert timeline is not None and timeline.replicas[0].shapes == ()


def test_report_of_a_run_without_steps_is_a_users_mistake(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: no step is recorded"):
        write_report(run_folder, summary=SUMMARY)


def test_report_of_a_damaged_timeline_names_the_file(run_folder: Path) -> None:
    (run_folder / "timeline.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match="timeline.json: bad timeline"):
        write_report(run_folder, summary=SUMMARY)


def test_a_table_with_a_short_row_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        Table(title="t", head=("a", "b"), rows=(("1",),))
