import json
from pathlib import Path

import numpy as np
import pytest

from lobra_jax.metrics import (
    EvalRecord,
    EventRecord,
    MetricsWriter,
    PhaseSeconds,
    StepRecord,
    TaskRecord,
    convert_bar,
    length_counts,
    progress_bar,
    read_metrics,
)
from planner.errors import UserError


def step_record(step: int, *, total_s: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=900,
        padded_tokens=1000,
        padding_share=0.1,
        idle_share=0.25,
        gpu_seconds=4.0,
        seconds=PhaseSeconds(
            wait_dispatch=0.01, issue=0.02, host_wait=0.0, execute=0.4, sum_update=0.05, total=total_s
        ),
        dispatch_solve_s=0.03,
        predicted_s=(0.4, 0.35),
        measured_s=(0.41, 0.34),
        predicted_step_s=0.45,
        num_micro_batches=(3, 0),
        compilations=0,
        first_runs=0,
    )


def task_record(step: int, *, task: str = "answers", loss: float = 2.5) -> TaskRecord:
    return TaskRecord(
        step=step,
        task=task,
        task_step=step,
        loss=loss,
        tokens=90,
        sequences=4,
        lr=1e-3,
        grad_norm=0.7,
        lengths={"16": 1, "48": 3},
    )


def eval_record(step: int) -> EvalRecord:
    return EvalRecord(step=step, task="answers", task_step=step, loss=2.0, perplexity=7.4, best_loss=1.5, tokens=50)


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
        writer.write(task_record(1))
        writer.write(eval_record(1))
        writer.write(EventRecord(step=1, task="answers", event="finished"))
    step, task, evaluation, event = read_metrics(tmp_path / "metrics.jsonl")
    assert step["kind"] == "step"
    assert step["seconds"] == {
        "wait_dispatch": 0.01,
        "issue": 0.02,
        "host_wait": 0.0,
        "execute": 0.4,
        "sum_update": 0.05,
        "total": 0.5,
    }
    assert step["num_micro_batches"] == [3, 0]
    assert task == {
        "kind": "task",
        "step": 1,
        "task": "answers",
        "task_step": 1,
        "loss": 2.5,
        "tokens": 90,
        "sequences": 4,
        "lr": 1e-3,
        "grad_norm": 0.7,
        "lengths": {"16": 1, "48": 3},
    }
    assert (evaluation["kind"], evaluation["loss"]) == ("eval", 2.0)
    assert event == {"kind": "event", "step": 1, "task": "answers", "event": "finished", "message": ""}
    assert read_metrics(tmp_path / "metrics.jsonl", kind="task") == [task]


def test_a_record_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_loss_that_is_not_finite_is_null_so_that_the_file_stays_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(task_record(1, loss=float("nan")))
        writer.write(task_record(2, loss=float("inf")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


def test_resuming_removes_what_came_after_the_restored_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step_record(step))
            writer.write(task_record(step))
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(EventRecord(step=2, event="resumed"))
        writer.write(step_record(3, total_s=9.0))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("step", 1),
        ("task", 1),
        ("step", 2),
        ("task", 2),
        ("event", 2),
        ("step", 3),
    ]
    assert records[-1]["seconds"]["total"] == 9.0


def test_a_new_run_begins_the_file_anew(tmp_path: Path) -> None:
    for step in (1, 5):
        with MetricsWriter(tmp_path) as writer:
            writer.write(step_record(step))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [5]


def test_a_line_cut_short_by_an_interruption_is_left_out_and_gone_after_a_resume(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 2, "tok')
    assert [record["step"] for record in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(step_record(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_damage_elsewhere_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\nnot json\n{"kind": "step", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: bad record"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line", [b"5", b"[]", b"{}", b'{"kind": "step"}', b'{"kind": "step", "step": "1"}', b'{"kind": "\xff", "step": 1}']
)
def test_a_line_that_is_no_record_is_named_on_reading_and_on_resuming(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"kind": "step", "step": 1}\n' + line + b"\n"
    path.write_bytes(content)
    for read in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, resume_step=3)):
        with pytest.raises(
            UserError, match=r"metrics.jsonl:2: bad record.*; expected a JSON object with kind and step"
        ):
            read()
    assert path.read_bytes() == content


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot read the metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step_record(1))
        writer.write(task_record(1, loss=2.5))
        writer.write(eval_record(1))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (
        b"step/tokens_per_s",
        b"seconds/execute",
        b"replica_1/measured_s",
        b"answers/loss",
        b"answers/eval_loss",
    ):
        assert tag in content


def test_the_progress_bar_shows_throughput_and_idle_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar(12, done=10) as advance:
        advance(step_record(11))
        advance(step_record(12, total_s=1.0))
    shown = capsys.readouterr().err
    assert "12/12" in shown
    assert "1,620 tokens/s, idle 25%" in shown  # 1800, then a fifth of the way to 900


def test_the_progress_bar_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(1) as advance:
        advance(step_record(1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("delay_s", "shown"), [(0.0, "2/2"), (60.0, "")])
def test_the_conversion_bar_counts_tensors_where_it_takes_long(
    delay_s: float, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("lobra_jax.metrics.CONVERT_BAR_DELAY_S", delay_s)
    with convert_bar(2) as advance:
        advance()
        advance()
    written = capsys.readouterr().err
    assert shown in written and bool(written) == bool(shown)


def test_length_counts_round_up_and_keep_every_sequence():
    assert length_counts(np.array([1, 16, 17, 40, 48])) == {"16": 2, "32": 1, "48": 2}
