"""Reading traces: kernels' classes, work that overlaps, steps, and a made-up GPU trace of two steps."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.program_names import Program, named, program_of, stage_detail
from lobra_jax.trace_steps import ISSUE_MARK, PAUSE_MARK, READY_MARK
from profiling.trace.events import Event, Mark
from profiling.trace.kernel_classes import CLASSES, kernel_class
from profiling.trace.steps import step_windows
from profiling.trace.sweep import Window, exclusive_ns, union_ns

KERNELS = {
    "matmul": [
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_NTN", "custom-call.12"),
        ("nvjet_tss_64x8_64x16_4x1_v_bz_splitK_TNT", "cublas-gemm.3"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel__5x_cublas", "gemm.1"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x8_stage3_ffma_kernel", "custom-call.3"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_128x128_32x5_nn_align8>(...)", "custom-call.4"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>(...)", "custom-call.5"),
        ("void gemvNSP_kernel<__nv_bfloat16, float, 1, 32, 4, 1024>(...)", None),
        ("gemm_fusion_dot_12", "gemm_fusion_dot.12"),
        ("loop_dot_fusion", "loop_dot_fusion"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "command_buffer"),
        ("ynn_fusion.5", "ynn_fusion.5"),
        ("dot.3", "dot.3"),
        ("dot_add_fusion.2", "dot_add_fusion.2"),
    ],
    "attention": [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", None),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1", "custom-call.9"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(...)", "custom-call.9"),
        ("void cudnn::fusion::convert_dq_to_16bits<false, 64>(...)", "custom-call.9"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", None),
        ("mha_forward", "custom-call.2"),
    ],
    "collective": [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce-start.2"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_SIMPLE(...)", "reduce-scatter.1"),
        ("ncclDevKernel_AllGather_RING_LL(...)", None),
        ("all-reduce.2", "all-reduce.2"),
        ("reduce-scatter.4", "reduce-scatter.4"),
        ("collective-permute-done.1", "collective-permute-done.1"),
    ],
    "copy or transpose": [
        ("input_transpose_fusion_3", "input_transpose_fusion.3"),
        ("wrapped_transpose", "wrapped_transpose"),
        ("loop_dynamic_update_slice_fusion", "loop_dynamic_update_slice_fusion"),
        ("input_concatenate_fusion", "input_concatenate_fusion"),
        ("loop_slice_fusion_2", None),
        ("copy_fusion", "copy_fusion"),
        ("wrapped_copy.1", "wrapped_copy.1"),
        ("MemcpyD2D", "copy.4"),
        ("Memset", "memset.1"),
    ],
    "reduction": [
        ("input_reduce_fusion_2", "input_reduce_fusion.2"),
        ("input_multiply_reduce_fusion", "input_multiply_reduce_fusion"),
        ("loop_add_convert_reduce_fusion_1", None),
        ("triton_softmax_4", "triton_softmax.4"),
        ("reduce-window.1", "reduce-window.1"),
    ],
    "fused elementwise": [
        ("loop_multiply_fusion_12", "loop_multiply_fusion.12"),
        ("adapted_swiglu_backward", "pallas_call.84"),
        ("loop_convert_fusion", None),
        ("loop_transpose_multiply_fusion", "loop_transpose_multiply_fusion"),
        ("loop_add_select_fusion_1", "loop_add_select_fusion.1"),
        ("wrapped_tanh", "wrapped_tanh"),
        ("reduce-precision_bitcast_fusion", "reduce-precision_bitcast_fusion"),
        ("broadcast_divide_fusion", "broadcast_divide_fusion"),
        ("fusion_123", "fusion.123"),
    ],
    "control flow": [
        ("while.3", "while.3"),
        ("call", "call"),
        ("CudaGraph", None),
    ],
    "other": [
        ("void cub::DeviceRadixSortOnesweepKernel<...>(...)", "sort.1"),
        ("input_scatter_fusion", "input_scatter_fusion"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "kernel", "hlo_op"), [(found, *names) for found, pairs in KERNELS.items() for names in pairs]
)
def test_a_kernel_has_the_class_of_its_name(expected, kernel, hlo_op):
    assert kernel_class(kernel, hlo_op, in_program=True) == expected
    assert expected in CLASSES


@pytest.mark.parametrize("kernel", ["MemcpyP2P", "MemcpyH2D", "MemcpyD2H", "MemcpyD2D"])
def test_memory_copied_outside_programs_is_a_transfer(kernel):
    assert kernel_class(kernel, None, in_program=False) == "transfer"


def test_a_programs_name_tells_its_phase_and_shape():
    function = named(lambda x: x, "fused", stage_detail(range(2, 4), 8, 2048))
    assert function(3) == 3
    assert function.__name__ == "fused_layers2_3_8x2048"
    assert program_of("jit_fused_layers2_3_8x2048") == Program(phase="fused", shape=(8, 2048))
    assert program_of("jit_gradient_sum_home") == Program(phase="gradient_sum", shape=None)
    assert program_of("jit_convert_element_type") is None
    assert program_of("jit_updated") is None


def event(start: float, end: float, name: str = "x", device: int = 0) -> Event:
    return Event(device=device, name=name, start_ns=start, end_ns=end)


def test_nested_and_overlapping_work_counts_once_and_goes_to_the_first_rank():
    outer, inner, late = event(0, 10), event(2, 5), event(8, 14)
    assert exclusive_ns([outer, inner, late], [1, 1, 2], Window(step=None, start_ns=0, end_ns=20)) == [7, 3, 4]
    assert exclusive_ns([outer, inner, late], [1, 1, 0], Window(step=None, start_ns=3, end_ns=12)) == [3, 2, 4]


@pytest.mark.parametrize("seed", range(20))
def test_exclusive_times_add_up_to_the_time_in_which_anything_runs(seed):
    rng = random.Random(seed)
    events = [event(start, start + rng.randrange(0, 12)) for start in (rng.randrange(0, 40) for _ in range(25))]
    window = Window(step=None, start_ns=rng.randrange(0, 20), end_ns=rng.randrange(20, 60))
    own = exclusive_ns(events, [rng.randrange(3) for _ in events], window)
    covered = sum(
        any(e.start_ns <= tick < e.end_ns for e in events) for tick in range(int(window.start_ns), int(window.end_ns))
    )
    assert sum(own) == union_ns(events, window) == covered
    assert all(0 <= mine <= e.end_ns - e.start_ns for mine, e in zip(own, events, strict=True))


def marks(*entries: tuple[str, int | None, float]) -> list[Mark]:
    return [Mark(name=name, step=step, start_ns=at) for name, step, at in entries]


def test_a_step_lasts_from_the_one_before_or_from_its_issue_after_a_pause():
    found = step_windows(
        marks(
            (ISSUE_MARK, 3, 10), (READY_MARK, 2, 20), (ISSUE_MARK, 4, 30), (READY_MARK, 3, 50), (READY_MARK, 4, 90),
            (PAUSE_MARK, None, 95), (ISSUE_MARK, 5, 100), (READY_MARK, 5, 120), (ISSUE_MARK, 6, 130),
        ),
        (),
    )  # fmt: skip
    assert [(w.step, w.start_ns, w.end_ns) for w in found] == [(3, 20, 50), (4, 50, 90), (5, 100, 120)]


def test_a_step_that_the_host_noted_late_ends_with_its_update():
    found = step_windows(
        marks((ISSUE_MARK, 2, 0), (READY_MARK, 1, 10), (ISSUE_MARK, 3, 20), (READY_MARK, 2, 60), (READY_MARK, 3, 90)),
        [
            dataclasses.replace(event(start, end), module=module)
            for start, end, module in (
                (5, 8, "jit_update_unpack"), (30, 40, "jit_update_home"), (35, 45, "jit_update_unpack"),
                (45, 80, "jit_fused_layers0_1_2x64"),
            )
        ],
    )  # fmt: skip
    assert [(w.step, w.start_ns, w.end_ns) for w in found] == [(2, 8, 45), (3, 45, 90)]


def test_without_marks_the_window_is_all_the_work():
    (window,) = step_windows((), [event(5, 9), event(7, 30)])
    assert (window.step, window.start_ns, window.end_ns) == (None, 5, 30)


class TextSpace:
    """An XSpace in text form."""

    def __init__(self) -> None:
        self.planes: list[str] = []

    def plane(
        self,
        name: str,
        lines: Mapping[str, Iterable[tuple[str, float, float, Mapping[str, Any]]]],
        stats: Mapping[str, str] | None = None,
    ) -> None:
        """Lines of (event, start, end in ns, stats); strings are references, as CUPTI's collector writes them."""
        names: dict[str, int] = {}
        kinds: dict[str, int] = {}

        def number(of: dict[str, int], key: str) -> int:
            return of.setdefault(key, len(of) + 1)

        def stat(key: str, value: Any) -> str:
            field = f"ref_value: {number(kinds, value)}" if isinstance(value, str) else f"int64_value: {value}"
            return f"stats {{ metadata_id: {number(kinds, key)} {field} }}"

        body = [stat(*item) for item in (stats or {}).items()]
        for line_id, (line, events) in enumerate(lines.items()):
            inner = " ".join(
                f"events {{ metadata_id: {number(names, event)} offset_ps: {int(start * 1000)} "
                f"duration_ps: {int((end - start) * 1000)} {' '.join(stat(*item) for item in found.items())} }}"
                for event, start, end, found in events
            )
            body.append(f'lines {{ id: {line_id} name: "{line}" {inner} }}')
        body += [f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for n, i in names.items()]
        body += [f'stat_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for n, i in kinds.items()]
        self.planes.append(f'planes {{ name: "{name}" {" ".join(body)} }}')

    def save(self, folder) -> None:
        from jax.profiler import ProfileData

        path = folder / "plugins" / "profile" / "2026_01_01" / "host.xplane.pb"
        path.parent.mkdir(parents=True)
        path.write_bytes(ProfileData.text_proto_to_serialized_xspace("\n".join(self.planes)))


FUSED = "jit_fused_layers0_1_2x64"


def kernel(
    name: str, start: float, end: float, module: str | None, op: str = "", path: str = "", kind: str = "kernel_details"
) -> tuple:
    stats = {kind: "about it", "correlation_id": 7, "hlo_module": module, "hlo_op": op, "name": path}
    return name, start, end, {key: value for key, value in stats.items() if value}


def gpu_trace(folder) -> None:
    """Two devices that are replicas of one stage; steps 2 (100 to 200 ns) and 3 (200 to 300 ns), and parts around."""
    space = TextSpace()
    first = [
        kernel("loop_add_fusion", 80, 100, "jit_update_home", "loop_add_fusion"),
        kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 105, 130, FUSED, "custom-call.1", "jvp(f)/dot_general"),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 130, 150, FUSED, "custom-call.2", "transpose(jvp)"),
        kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 150, 160, FUSED, "custom-call.1", "jvp(f)/dot_general"),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 160, 180, FUSED, "custom-call.2", "transpose(jvp)"),
        kernel("loop_add_fusion", 185, 200, "jit_update_home", "loop_add_fusion"),
        kernel("loop_add_fusion", 290, 300, "jit_update_home", "loop_add_fusion"),
        kernel("mystery", 250, 255, None),
    ]
    second = [
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 140, 145, FUSED, "all-reduce-start"),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 165, 175, FUSED, "all-reduce-start"),
        kernel("MemcpyP2P", 210, 230, None, kind="memcpy_details"),
    ]
    space.plane(
        "/device:GPU:0",
        {
            # CUPTI's collector calls a stream so that has an event of its overhead among the kernels.
            "CUPTI overhead": [*first, ("BUFFER_FLUSH", 240, 245, {"correlation_id": 3})],
            "Stream #21(Compute,MemcpyP2P)": second,
            "XLA Modules": [(FUSED, 80, 190, {"program_id": 1})],
            "XLA Ops - from #13": [("custom-call.1", 80, 190, {"hlo_module": FUSED})],
        },
        {"gpu_device_name": "NVIDIA H200"},
    )
    space.plane(
        "/device:GPU:1",
        {"Stream #13(Compute)": [kernel("input_reduce_fusion_1", 100, 120, "jit_gradient_sum_norms", "fusion.3")]},
        {"gpu_device_name": "NVIDIA H200"},
    )
    space.plane(
        "/host:CPU",
        {
            "python": [(ISSUE_MARK, 90, 95, {"step_num": 2}), (ISSUE_MARK, 180, 185, {"step_num": 3})],
            "watch_1": [(READY_MARK, at, at, {"step_num": n}) for n, at in ((1, 103), (2, 204), (3, 306))],
        },
    )
    space.save(folder)
    bar = {"rows": 2, "length": 64, "start_s": 0.0, "end_s": 1.0}
    bars = [{**bar, "micro_batch": m, "phase": phase} for m in (0, 1) for phase in ("forward", "backward")]
    replicas = [
        {"name": f"replica {i}", "config": "(tp1,pp1,none)", "devices": [i], "stages": [own], "measured_s": 1.0,
         "predicted_s": 5e-8, "predicted_stages": [own]}
        for i, own in enumerate((bars, bars[:2]))
    ]  # fmt: skip
    run = {
        "hardware": "2 x NVIDIA H200", "platform": "gpu", "versions": {"jax": "0.11.2"}, "date": "2026-01-01",
        "model": "m",
        "replicas": [
            {"name": f"replica {i}", "config": "(tp1,pp1,none)", "stages": [[i]]} for i in (0, 1)
        ],
        "timelines": [
            {"step": step, "step_s": 2.0, "sum_update_s": 0.5, "replicas": replicas} for step in (2, 3)
        ],
    }  # fmt: skip
    (folder / "traced_run.json").write_text(json.dumps(run))


def lobra(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """(a run directory with a made-up GPU trace, its summary, what was printed)."""
    run = tmp_path_factory.mktemp("run")
    (run / "trace").mkdir()
    gpu_trace(run / "trace")
    done = lobra("trace", run, "--out", run / "trace.json", "--pictures", run / "pictures")
    assert done.exit_code == 0, done.output
    return run, json.loads((run / "trace.json").read_text()), done.output


def nanoseconds(seconds: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value * 1e9) for name, value in seconds.items() if value}


def test_a_gpu_trace_is_summed_up_within_its_steps(gpu):
    _, summary, _ = gpu
    assert [(s["step"], round(s["start_s"] * 1e9), round(s["end_s"] * 1e9)) for s in summary["steps"]] == [
        (2, 0, 100), (3, 100, 200),
    ]  # fmt: skip
    one, two = summary["devices"]
    assert (one["replica"], one["stage"], two["replica"]) == (0, 0, 1)
    # The all-reduces are hidden under attention, the copy between devices under nothing.
    assert nanoseconds(one["classes"]) == {
        "matmul": 35, "attention": 40, "fused elementwise": 25, "transfer": 20, "other": 5,
    }  # fmt: skip
    assert nanoseconds(one["overlapped"]) == {"collective": 15}
    assert nanoseconds(one["phases"]) == {
        "fused forward": 35, "fused backward": 40, "update": 25, "transfer": 20, "unattributed": 5,
    }  # fmt: skip
    assert nanoseconds(two["phases"]) == {"gradient_sum": 20}
    assert nanoseconds(summary["unattributed"]) == {"mystery": 5}
    assert summary["unread_lines"] == {"CUPTI overhead": 1}


def test_every_sum_of_a_summary_agrees(gpu):
    check_sums(gpu[1])


def check_sums(summary: Mapping[str, Any]) -> None:
    for row in summary["devices"]:
        assert sum(row["classes"].values()) == pytest.approx(row["busy_s"], abs=1e-8)
        assert sum(row["phases"].values()) == pytest.approx(row["busy_s"], abs=1e-8)
        assert row["busy_s"] + row["idle_s"] == pytest.approx(summary["window_s"], abs=1e-8)
        assert row["idle_share"] == pytest.approx(1 - row["busy_s"] / summary["window_s"], abs=1e-8)
    assert sum(step["end_s"] - step["start_s"] for step in summary["steps"]) >= summary["window_s"] - 1e-8
    assert sum(summary["classes"].values()) == pytest.approx(summary["busy_s"], abs=1e-7)
    by_stage = sum(sum(own.values()) for stage in summary["stages"] for own in stage["phases"].values())
    assert by_stage == pytest.approx(summary["busy_s"], abs=1e-7)
    assert sum(kernel["seconds"] for kernel in summary["top_kernels"]) <= summary["busy_s"] + 1e-7


def test_a_gpus_kernels_are_cut_into_the_executions_that_were_issued(gpu):
    """Step 3 has none of the work that its timeline says, step 2 has two executions of one program in a row."""
    from profiling.trace.events import find_trace, read_trace
    from profiling.trace.measured_timeline import measured_timeline

    run, summary, _ = gpu
    assert [r["measured_by"] for r in summary["timeline"]["replicas"]] == ["host", "host"]
    described = json.loads((run / "trace" / "traced_run.json").read_text())
    events = read_trace(find_trace(run)).events
    by_device = {device: [e for e in events if e.device == device] for device in (0, 1)}
    window = Window(step=2, start_ns=100, end_ns=200)
    found = measured_timeline(described["timelines"][0], described["replicas"], by_device, window)
    assert [r["measured_by"] for r in found["replicas"]] == ["devices", "host"]
    (bars,) = found["replicas"][0]["stages"]
    ends = [(round(bar["start_s"] * 1e9), round(bar["end_s"] * 1e9)) for bar in bars]
    assert ends[0][0] == 5 and ends[1][1] == 50 and ends[2][0] == 50 and ends[3][1] == 80
    assert ends[0][1] == ends[1][0] and ends[2][1] == ends[3][0]


def test_what_is_printed_names_devices_phases_and_what_is_left_over(gpu):
    run, summary, output = gpu
    assert summary["idle_share"] == pytest.approx(1 - 145 / 400)
    assert "2 x NVIDIA H200, jax 0.11.2: steps 2, 3, 0.00 ms a step, idle 63." in output
    assert "replica 0 (tp1,pp1,none) stage 0" in output and "fused backward" in output
    assert "unattributed: mystery 0.00 ms" in output
    assert {path.name for path in (run / "pictures").iterdir()} == {"devices.png", "phases.png", "timeline.png"}


def test_a_trace_without_a_runs_marks_is_summed_up_whole(tmp_path):
    space = TextSpace()
    work = [kernel("nvjet_tst_128x256", 10, 30, "jit_f"), kernel("loop_add_fusion", 50, 60, "jit_f")]
    space.plane("/device:GPU:0", {"Stream #13(Compute)": work}, {"gpu_device_name": "NVIDIA H200"})
    space.save(tmp_path)
    done = lobra("trace", tmp_path, "--out", tmp_path / "t.json")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "t.json").read_text())
    assert summary["hardware"] == "1 x NVIDIA H200" and summary["timeline"] is None
    assert nanoseconds(summary["devices"][0]["phases"]) == {"jit_f": 30}
    assert summary["idle_share"] == pytest.approx(0.4)
    check_sums(summary)


@pytest.mark.parametrize(
    ("option", "name", "complaint"),
    [
        ("--out", "gone/t.json", "--out: no such folder"),
        ("--out", "/proc/t.json", "--out: cannot write"),
        ("--pictures", "file/pictures", "--pictures: cannot write: Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_the_trace_is_read(
    tmp_path, monkeypatch, option, name, complaint
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("profiling.trace.summary.summarise", lambda *_, **__: pytest.fail("it reads"))
    done = lobra("trace", tmp_path, option, tmp_path / name)
    assert done.exit_code == 2 and complaint in done.output and done.output.count("\n") == 1, done.output


def test_what_is_no_trace_is_refused_in_a_line(tmp_path):
    (tmp_path / "bad.xplane.pb").write_bytes(b"no trace")
    space = TextSpace()
    space.plane("/host:CPU", {"python": [("f", 0, 1, {})]})
    (tmp_path / "host").mkdir()
    space.save(tmp_path / "host")
    (tmp_path / "empty").mkdir()
    for path, complaint in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "no trace; expected a run of lobra train --trace, or a folder with plugins/profile"),
        (tmp_path / "bad.xplane.pb", "cannot read the trace"),
        (tmp_path / "host", "no work of any device"),
    ):
        done = lobra("trace", path)
        assert done.exit_code == 2 and complaint in done.output and done.output.count("\n") == 1, done.output
