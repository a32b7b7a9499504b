"""Stage programs that are kept: had again without tracing, the same, and never in place of others."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lobra_jax import kept_programs
from lobra_jax.compilation import CompilationCount
from lobra_jax.mesh import make_submesh
from lobra_jax.replica import Replica, ReplicaRun
from lobra_jax.stage import StageFunctions, compile_evaluation, compile_training
from planner.plan import ParallelConfig

SHAPES = ((2, 8), (1, 16))
TARGETS = ("q", "v", "down")


@contextlib.contextmanager
def setting(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture
def keep(monkeypatch, tmp_path):
    """Keeps every program, however short it takes to make, in the folder that it returns."""
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: tmp_path)
    with setting("jax_persistent_cache_min_compile_time_secs", 0.0), setting("jax_enable_compilation_cache", False):
        compilation_cache.reset_cache()
        yield tmp_path
    compilation_cache.reset_cache()


@pytest.fixture
def no_tracing(monkeypatch):
    def forbid():
        for name in ("forward", "backward", "fused", "evaluate"):
            monkeypatch.setattr(StageFunctions, name, lambda *_: pytest.fail("traced"))

    return forbid


def make(model, tp=1, pp=1, remat="dots", *, first_device=0, packed=False, **changes):
    settings = {"num_tasks": 3, "max_rank": 4, "targets": TARGETS, "dropout": False, "dtype": jnp.float32} | changes
    devices = jax.devices()[first_device : first_device + tp * pp]
    submesh = make_submesh(ParallelConfig(tp=tp, pp=pp, remat=remat), devices)
    return Replica(index=0, model=model, submesh=submesh, packed=packed, **settings)


def filled(tree):
    rng = np.random.default_rng(0)

    def fill(leaf):
        values = rng.normal(0, 0.1, leaf.shape) if leaf.dtype == jnp.float32 else np.ones(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, tree)


def outcome(replica):
    """Losses, gradients and evaluation of a step with made-up weights, adapters and tokens, and whether what gradients
    are added to was handed over."""
    replica.params = [filled(layout.params) for layout in replica.layouts]
    adapters, tasks = ([filled(getattr(layout, kind)) for layout in replica.layouts] for kind in ("adapters", "tasks"))
    rng = np.random.default_rng(1)
    batches = []
    for shape in (*SHAPES, SHAPES[0]):
        empty = replica.empty_micro_batch(shape)
        tokens = rng.integers(0, replica.model.vocab_size, shape, dtype=np.int32)
        batches.append(dataclasses.replace(empty, tokens=tokens, loss_weights=np.ones(shape, np.float32)))
    run = ReplicaRun(gradients=replica.zero_gradients())
    handed_over = jax.tree.leaves(run.gradients)
    replica.issue(run, batches, adapters, tasks)
    evaluation = () if replica.packed else replica.evaluate(batches[0], adapters, tasks)
    arrays = jax.tree.map(np.asarray, (run.losses, run.gradients, evaluation))
    return jax.tree.leaves(arrays), all(array.is_deleted() for array in handed_over)


def compile_all(replica):
    """But for the zeros that gradients are added to, one program a stage."""
    for call in replica.compilations(SHAPES, () if replica.packed else SHAPES)[: -replica.parallel.pp]:
        call()


@pytest.mark.parametrize(
    ("config", "packed"),
    [((1, 1, "dots"), False), ((2, 2, "full"), False), ((1, 1, "none"), True)],
)
def test_programs_kept_do_the_same_without_being_traced(world, keep, no_tracing, config, packed):
    first = make(world.model, *config, packed=packed)
    compile_all(first)
    expected, _ = outcome(first)
    no_tracing()
    again, count = make(world.model, *config, packed=packed), CompilationCount()
    compile_all(again)
    num_files = len(SHAPES) * config[1] * (1 if packed else 2)
    num_programs = num_files + len(SHAPES) * (config[1] - 1)  # forward and backward are two, the last stage's is one
    assert len(list(keep.iterdir())) == num_files
    assert count.total == count.from_cache == num_programs
    found, handed_over = outcome(again)
    assert handed_over
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    for program, other in zip(again.training_programs(SHAPES[0]), first.training_programs(SHAPES[0]), strict=True):
        assert program.memory.keys() == other.memory.keys()
        for name, memory in program.memory.items():
            assert memory.temp_size_in_bytes == other.memory[name].temp_size_in_bytes


CHANGES = {
    "policy": {"remat": "full"},
    "tasks": {"num_tasks": 4},
    "rank": {"max_rank": 6},
    "targets": {"targets": ("q", "v")},
    "dropout": {"dropout": True},
    "dora": {"dora": True},
    "dtype": {"dtype": jnp.bfloat16},
    "quantization": {"quantization": "int8"},
    "device": {"first_device": 1},
    "width": {"tp": 2},
    "stages": {"pp": 2},
}


def files_of(replica, shape=SHAPES[0], *, packed=False):
    """Names of what is looked for of a replica's first stage."""
    looked_for = []
    layout = replica.layouts[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kept_programs, "_read", lambda path, devices: looked_for.append(path.name) or {"evaluation": None}
        )
        compile_evaluation(layout, *shape)
        patch.setattr("lobra_jax.stage.StageProgram.of", lambda **programs: None)
        compile_training(layout, *shape, packed=packed)
    return set(looked_for)


@pytest.mark.parametrize("name", CHANGES)
def test_other_programs_are_not_taken_for_them(world, keep, name):
    usual, other = files_of(make(world.model)), files_of(make(world.model, **CHANGES[name]))
    assert len(usual) == len(other) == 2
    assert len(usual & other) == (name == "policy")  # of which an evaluation makes no use


def test_other_models_and_shapes_are_not_taken_for_them(world, keep):
    replica = make(world.model)
    usual = files_of(replica)
    assert not usual & files_of(make(dataclasses.replace(world.model, rms_norm_eps=1e-3)))
    assert not usual & files_of(replica, (SHAPES[0][0] + 1, SHAPES[0][1]))
    assert not usual & files_of(replica, (SHAPES[0][0], SHAPES[0][1] + 1))
    assert len(usual & files_of(make(world.model, packed=True), packed=True)) == 1  # evaluation is never packed


def test_other_flags_settings_and_sources_are_not_taken_for_them(world, keep, monkeypatch):
    replica = make(world.model)
    usual = files_of(replica)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_dump_max_hlo_modules=7")
        assert not usual & files_of(replica)
    with setting("jax_default_matmul_precision", "highest"):
        assert not usual & files_of(replica)
    for name, value in {"_SOURCES": "others", "LIBRARIES": ("jax",), "_fingerprint": lambda _: "others"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(kept_programs, name, value)
            assert not usual & files_of(replica)
    assert usual == files_of(replica)


def test_the_digest_of_sources_is_of_their_names_and_texts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kept_programs, "SOURCES", ("kept_here",))
    file = tmp_path / "kept_here" / "inner" / "one.py"
    file.parent.mkdir(parents=True)
    digests = []
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        digests.append(kept_programs.sources())
    assert digests[-1] == kept_programs.sources()
    file.rename(file.with_name("two.py"))
    assert len({*digests, kept_programs.sources()}) == 3


def test_nothing_is_kept_once_sources_were_changed(world, keep, monkeypatch):
    """What is in memory may then be of either."""
    monkeypatch.setattr(kept_programs, "sources", lambda: "edited")
    compile_evaluation(make(world.model).layouts[0], *SHAPES[0])
    assert not list(keep.iterdir())


def test_what_cannot_be_read_or_written_is_said_and_made_anew(world, keep, monkeypatch, caplog):
    layout = make(world.model).layouts[0]
    compile_evaluation(layout, *SHAPES[0])
    (file,) = keep.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    compile_evaluation(layout, *SHAPES[0])
    assert re.search(f"{file.name} cannot be read: .*; made anew", caplog.text)
    assert len(file.read_bytes()) > len(whole) // 2
    caplog.clear()
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: file)  # a file is no folder
    compile_evaluation(layout, *SHAPES[0])
    assert "Not a directory; made anew" in caplog.text and "programs are not kept in" in caplog.text


def test_what_is_damaged_goes_though_nothing_takes_its_place(world, keep, monkeypatch):
    layout = make(world.model).layouts[0]
    compile_evaluation(layout, *SHAPES[0])
    (file,) = keep.iterdir()
    file.write_bytes(b"")
    monkeypatch.setattr(kept_programs, "_write", lambda *_: None)
    compile_evaluation(layout, *SHAPES[0])
    assert not list(keep.iterdir())


def test_programs_that_jax_cannot_take_apart_are_at_hand_all_the_same(world, keep, monkeypatch, caplog):
    def refuse(_):
        raise NotImplementedError("const_args")

    monkeypatch.setattr(kept_programs.serialize_executable, "serialize", refuse)
    assert compile_evaluation(make(world.model).layouts[0], *SHAPES[0]) is not None
    assert "programs are not kept" in caplog.text and "const_args" in caplog.text
    assert not list(keep.iterdir())


def test_no_room_to_load_a_program_is_no_damage(world, keep, monkeypatch):
    layout = make(world.model).layouts[0]
    compile_evaluation(layout, *SHAPES[0])
    (file,) = keep.iterdir()

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(kept_programs.serialize_executable, "deserialize_and_load", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_evaluation(layout, *SHAPES[0])
    assert file.is_file()


def test_files_that_nobody_reads_are_removed(world, keep):
    old, new = keep / "old.new", keep / "new"
    for file, age_s in ((old, 2 * kept_programs.UNUSED_S), (new, kept_programs.UNUSED_S / 2)):
        file.touch()
        os.utime(file, 2 * (time.time() - age_s,))
    layout = make(world.model).layouts[0]
    compile_evaluation(layout, *SHAPES[0])
    (kept,) = set(keep.iterdir()) - {new}
    assert new.is_file() and not old.exists()
    os.utime(kept, (0, 0))
    compile_evaluation(layout, *SHAPES[0])
    assert kept.stat().st_mtime > time.time() - 60  # read, and so in use


def test_nothing_is_kept_without_a_compilation_cache_or_of_what_compiles_at_once(world, monkeypatch, tmp_path):
    layout = make(world.model).layouts[0]
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: None)
    compile_evaluation(layout, *SHAPES[0])
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: tmp_path)
    with setting("jax_persistent_cache_min_compile_time_secs", 1000.0):
        compile_evaluation(layout, *SHAPES[0])
    assert not list(tmp_path.iterdir())


def test_what_came_from_jaxs_cache_is_not_kept_of_a_cpu(world, keep):
    """XLA writes it without its functions."""
    layout = make(world.model).layouts[0]
    with setting("jax_enable_compilation_cache", True), setting("jax_compilation_cache_dir", str(keep / "jax")):
        compilation_cache.reset_cache()
        compile_evaluation(layout, *SHAPES[0])
        (kept,) = (file for file in keep.iterdir() if file.is_file())
        kept.unlink()
        jax.clear_caches()
        compile_evaluation(layout, *SHAPES[0])
    assert [file.name for file in keep.iterdir()] == ["jax"]


OTHER_PROCESS = """
import dataclasses, sys
from pathlib import Path
from lobra_jax.compilation import CompilationCount
from lobra_jax.config import DevicesConfig
from lobra_jax.devices import configure
configure(DevicesConfig(simulated=2), cache_dir=Path(sys.argv[1]))
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import PRESETS
from lobra_jax.replica import Replica
from planner.plan import ParallelConfig
submesh = make_submesh(ParallelConfig(tp=1, pp=2, remat="dots"), jax.devices())
model = dataclasses.replace(PRESETS["tiny"], num_layers=2)
replica = Replica(index=0, model=model, submesh=submesh, num_tasks=2, max_rank=4, targets=("q", "down"),
                  dropout=False, dtype=jnp.float32)
count = CompilationCount()
for call in replica.compilations([(1, 8)], [(1, 8)])[:2]:
    call()
print(count.total, count.from_cache, len(list((Path(sys.argv[1]) / "xla" / "stages").iterdir())))
"""


def test_another_process_finds_them(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}

    def run():
        command = [sys.executable, "-c", OTHER_PROCESS, tmp_path]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert run() == ["5", "0", "4"]
    for file in (tmp_path / "xla").glob("*-cache"):
        file.unlink()  # JAX's own
    assert run() == ["5", "5", "4"]


LATE = """
import dataclasses, os, sys
from pathlib import Path
early, flags = sys.argv[2] == "early", "--xla_disable_hlo_passes=fusion,cpu-instruction-fusion"
os.environ["JAX_PLATFORMS"] = "cpu"
if early:
    os.environ["XLA_FLAGS"] = flags
import jax, jax.numpy as jnp
jax.block_until_ready(jnp.zeros(3) + 1)
os.environ["XLA_FLAGS"] = flags
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import PRESETS
from lobra_jax.replica import Replica
from planner.plan import ParallelConfig
submesh = make_submesh(ParallelConfig(tp=1, pp=1, remat="dots"), jax.devices()[:1])
model = dataclasses.replace(PRESETS["tiny"], num_layers=1)
replica = Replica(index=0, model=model, submesh=submesh, num_tasks=1, max_rank=2, targets=("q",),
                  dropout=False, dtype=jnp.float32)
replica.compilations([(1, 8)], [])[0]()
print(replica.training_programs((1, 8))[0].fused.as_text().count("fusion("))
"""


def test_flags_that_come_too_late_for_xla_do_not_count(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}

    def fusions(when):
        command = [sys.executable, "-c", LATE, tmp_path, when]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert fusions("late") != fusions("early")
