"""Stage programs that are kept: had again without tracing, the same, and never in place of others."""

import contextlib
import dataclasses
import os
import subprocess
import sys

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
    assert not usual & other


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
    monkeypatch.setattr(kept_programs, "_sources", kept_programs._sources.__wrapped__)  # remembers what it read
    assert usual == files_of(replica)
    for name in ("SOURCES", "LIBRARIES"):
        with monkeypatch.context() as patch:
            patch.setattr(kept_programs, name, getattr(kept_programs, name)[:1])
            assert not usual & files_of(replica)


def test_what_cannot_be_read_or_written_is_said_and_compiled(world, keep, monkeypatch):
    layout = make(world.model).layouts[0]
    compile_evaluation(layout, *SHAPES[0])
    (file,) = keep.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=f"{file.name} cannot be read: .*; compiled anew"):
        compile_evaluation(layout, *SHAPES[0])
    assert len(file.read_bytes()) > len(whole) // 2
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: file)  # a file is no folder
    unread = pytest.warns(UserWarning, match="Not a directory; compiled anew")
    with unread, pytest.warns(UserWarning, match="programs are not kept in .*exists"):
        compile_evaluation(layout, *SHAPES[0])


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
import sys
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
replica = Replica(index=0, model=PRESETS["tiny"], submesh=submesh, num_tasks=2, max_rank=4, targets=("q", "down"),
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
