"""A device that runs out of memory in the middle of training: what was done stays done, and the rest is done again.

The errors are real: each failing program first asks for more memory than a machine can address.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lobra_jax import engine as engine_module
from lobra_jax import free_memory, memory, reduce, replica
from lobra_jax.config import RunConfig
from lobra_jax.data.batches import global_batch
from lobra_jax.engine import Engine
from lobra_jax.lora import LoraSpec
from lobra_jax.metrics import read_metrics
from lobra_jax.optim import step_inputs
from lobra_jax.out_of_memory import Failure, OutOfMemoryError
from lobra_jax.train import Inputs, train
from planner import lower
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup

TOO_MANY = 1 << 46
"""Floats of 256 TiB, beyond what a process can address."""


def run_out_now() -> None:
    jax.jit(lambda x: jnp.broadcast_to(x, (TOO_MANY,)))(jnp.float32(1))
    raise AssertionError("there was room for it")


def run_out_later(outputs):
    """The outputs as they are after a program that found no room while it ran: none can be read."""
    nothing = jax.jit(lambda x: jax.lax.sort(jax.lax.iota(jnp.float32, TOO_MANY) * x)[0])(jnp.float32(1))

    def spoil(leaf):
        (device,) = leaf.devices()
        return leaf + jax.device_put(nothing, device).astype(leaf.dtype)

    return jax.tree.map(spoil, outputs)


class Once:
    """Wraps a function so that one of its calls fails, after `calls` good ones."""

    LAST = -1

    def __init__(self, function, fail, *, calls: int = 0):
        self.function, self.fail, self.left = function, fail, calls

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.LAST <= self.left < 0:
            return self.fail(lambda: self.function(*arguments, **options))
        return self.function(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.function, name)


class Always(Once):
    """Wraps a function so that all of its calls fail."""

    LAST = -(10**9)


def now(_):
    run_out_now()


def later(call):
    return run_out_later(call())


def fail_in(engine: Engine, index: int, stage: int, phase: str, fail) -> None:
    """From now on one program of a replica fails."""
    programs = engine.replicas[index]._training
    for shape, stages in programs.items():
        spoiled = dataclasses.replace(stages[stage], **{phase: Always(getattr(stages[stage], phase), fail)})
        programs[shape] = tuple(spoiled if i == stage else p for i, p in enumerate(stages))


@pytest.fixture(scope="module")
def ready(world):
    """An engine of a whole replica and a pipeline, with the arguments of three steps and the state after each."""
    spec = LoraSpec(rank=2, alpha=2, targets=("q",))
    task = world.make_task("b", batch_size=12, steps=3, seed=2, clip=1.0, spec=spec, kind="constant", peak=1e-3,
                           warmup_steps=0, final_fraction=1.0)  # fmt: skip
    tasks = [task]
    model = dataclasses.replace(world.model, num_layers=2)
    engine = world.engine(world.plan((1, 1, "none"), (1, 2, "full")), tasks, model)
    start = engine.state
    steps, states = [], []
    for step in range(3):
        task_steps = {task.data.name: step for task in tasks}
        batch = global_batch([task.data for task in tasks], task_steps)
        hyper = step_inputs([task.optimizer for task in tasks], list(task_steps.values()))
        steps.append((world.dispatch(batch, engine.plan, step + 1), hyper))
        assert all(len(own) for own in steps[-1][0]), "a replica without work cannot fail"
        engine.finish(engine.issue(*steps[-1]))
        states.append(jax.tree.map(np.asarray, engine.state.tasks))
    return engine, start, steps, states


def assert_same(state, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.tasks), expected)


@pytest.mark.parametrize(
    ("index", "stage", "phase", "fail"),
    [(0, 0, "fused", later), (1, 0, "forward", later), (1, 0, "backward", now), (1, 1, "fused", now)],
)
def test_a_step_without_room_leaves_the_engine_as_it_was(ready, index, stage, phase, fail):
    engine, start, steps, states = ready
    engine.set_state(start)
    first = engine.issue(*steps[0])
    programs = dict(engine.replicas[index]._training)
    fail_in(engine, index, stage, phase, fail)
    shape = steps[1][0][index][0].tokens.shape
    with pytest.raises(OutOfMemoryError) as raised:
        engine.finish(engine.issue(*steps[1]))
    assert raised.value.failures == (Failure(replica=index, shape=shape),)
    engine.finish(first)
    assert_same(engine.state, states[0])
    engine.replicas[index]._training = programs
    engine.finish(engine.issue(*steps[1]))
    engine.finish(engine.issue(*steps[2]))
    assert_same(engine.state, states[2])


def test_a_step_found_to_have_failed_while_the_next_is_issued_takes_that_one_with_it(ready):
    engine, start, steps, states = ready
    engine.set_state(start)
    engine.finish(engine.issue(*steps[0]))
    programs = dict(engine.replicas[0]._training)
    fail_in(engine, 0, 0, "fused", later)
    second = engine.issue(*steps[1])
    for attempt in (lambda: engine.issue(*steps[2]), lambda: engine.finish(second)):
        with pytest.raises(OutOfMemoryError) as raised:
            attempt()
    assert [failure.replica for failure in raised.value.failures] == [0]
    assert_same(engine.state, states[0])
    engine.replicas[0]._training = programs


def test_a_sum_without_room_is_nobodys_fault(ready, monkeypatch):
    engine, start, steps, states = ready
    engine.set_state(start)
    engine.finish(engine.issue(*steps[0]))
    for fail in (now, later):
        with monkeypatch.context() as patch:
            patch.setattr(reduce, "_add_up", Once(reduce._add_up, fail))
            with pytest.raises(OutOfMemoryError) as raised:
                engine.finish(engine.issue(*steps[1]))
        assert raised.value.failures == ()
        assert_same(engine.state, states[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine.gradient_sum, "spread", Once(engine.gradient_sum.spread, now))
        with pytest.raises(OutOfMemoryError):
            engine.issue(*steps[1])
    engine.finish(engine.issue(*steps[1]))
    assert_same(engine.state, states[1])


def test_an_update_found_to_have_failed_under_a_further_step_ends_the_run(ready, monkeypatch):
    """The state before it has made room by then."""
    engine, start, steps, _ = ready
    engine.set_state(start)
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "_update", Once(reduce._update, later))
        first = engine.issue(*steps[0])
    second = engine.issue(*steps[1])
    with pytest.raises(UserError, match="out of device memory at the update of adapters"):
        engine.finish(first)
    with pytest.raises(OutOfMemoryError):
        engine.finish(second)


def test_other_errors_are_not_taken_for_it(ready, monkeypatch):
    engine, start, steps, _ = ready
    engine.set_state(start)

    def other(_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: something else")

    with monkeypatch.context() as patch:
        patch.setattr(reduce, "_add_up", Once(reduce._add_up, other))
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            engine.issue(*steps[0])


RUN_PLAN = Plan(
    model="test",
    num_devices=1,
    replicas=(
        ReplicaGroup(count=1, config=ParallelConfig(tp=1, pp=1, remat="none"), capacity_tokens=96),
    ),
    buckets=(12, 24),
    row_options=1,
)  # fmt: skip


def train_run(world, out: Path, *, steps: int = 4, resume: bool = False) -> list[str]:
    """A run of one task with held-out examples on one replica; what it said."""
    task = world.make_task("b", batch_size=12, steps=steps, seed=2, clip=1.0, kind="constant", peak=1e-3,
                           warmup_steps=0, final_fraction=1.0)  # fmt: skip
    section = {"name": "b", "files": ["b.jsonl"], "batch_size": 12, "steps": steps, "rank": 2, "targets": ["q", "up"],
               "eval_fraction": 0.5, "lr": 1e-3, "epsilon": 1e-6}  # fmt: skip
    config = RunConfig.model_validate(
        {
            "model": {"preset": "llama2-7b", "dtype": "float32"},
            "training": {"checkpoint_interval": 2, "eval_batch_size": 23},
            "tasks": [section],
        }
    )
    plan = Plan.load(out / "plan.yaml") if resume else RUN_PLAN
    (group,) = RUN_PLAN.replicas
    cost = ConfigCost(config=group.config, capacity_tokens=96, coefficients=(0.0, 0.0, 1e-5, 0.0, 0.0, 1e-3))
    inputs = Inputs(
        config=config,
        model=dataclasses.replace(world.model, num_layers=1),
        tasks=(dataclasses.replace(task.data, evaluation=task.data.train),),
        plan=plan,
        costs=CostTable(model="test", model_fingerprint="", hardware={}, configs=(cost,)),
        devices=tuple(jax.devices()[:1]),
    )
    said: list[str] = []
    out.mkdir(exist_ok=True)
    train(inputs, out, resume=resume, say=said.append)
    return said


def adapter(run: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(run / "adapters" / "b" / "adapter_model.safetensors")


def spoil_programs(patch, name: str, fail, *, calls: int) -> None:
    """Of all programs that this function of `replica` compiles, one call fails, after so many good ones."""
    compile_ = getattr(replica, name)
    run = Once(lambda program, *arguments: program(*arguments), fail, calls=calls)

    def compiled(*shape, **options):
        program = compile_(*shape, **options)
        if name == "compile_training":
            return dataclasses.replace(program, fused=functools.partial(run, program.fused))
        return functools.partial(run, program)

    patch.setattr(replica, name, compiled)


def test_a_run_without_room_goes_on_with_smaller_capacities(world, tmp_path, monkeypatch):
    """In compiling, in warm-up, in an evaluation and in a step; the adapter is that of a run that had room."""
    assert not [line for line in train_run(world, tmp_path / "whole") if "memory" in line]
    with monkeypatch.context() as patch:
        spoil_programs(patch, "compile_training", later, calls=4)
        patch.setattr(replica, "compile_training", Once(replica.compile_training, now))
        spoil_programs(patch, "compile_evaluation", later, calls=1)
        patch.setattr(reduce, "_add_up", Once(reduce._add_up, later))
        said = train_run(world, tmp_path / "tight")
    lines = [line for line in said if "memory" in line]
    starts = ("compiling, replica 0 with ", "warm-up: ", "evaluation, replica 0 with ", "step 2, replica 0 with ")
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"out of device memory in {start}") and "(tp1,pp1,none) from " in line
    (group,) = Plan.load(tmp_path / "tight" / "plan.yaml").replicas
    assert lines[-1].endswith(f"to {group.capacity_tokens} tokens; done again") and group.capacity_tokens < 72
    whole, tight = (adapter(tmp_path / name) for name in ("whole", "tight"))
    assert world.difference(tight, whole) < 1e-5
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "tight")]
    assert [r["message"] for r in records[1] if r.get("event") == "out_of_memory"] == lines[2:]
    for kind in ("task", "eval"):
        found, expected = ([(r["step"], r["loss"]) for r in own if r["kind"] == kind] for own in reversed(records))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    # Resumed, it keeps what it was lowered to; and where less is not enough either, it says so and keeps what it has.
    with monkeypatch.context() as patch:
        spoil_programs(patch, "compile_training", now, calls=0)
        patch.setattr(replica, "compile_training", Once(replica.compile_training, now, calls=len(RUN_PLAN.buckets)))
        patch.setattr(lower, "SHRINK", 0.01)
        with pytest.raises(UserError, match=r"no smaller capacity takes the longest sequence \(24 tokens\)"):
            train_run(world, tmp_path / "tight", steps=5, resume=True)
    (lowest,) = Plan.load(tmp_path / "tight" / "plan.yaml").replicas
    assert lowest.capacity_tokens == 24
    assert world.difference(adapter(tmp_path / "tight"), whole) < 1e-5


def test_there_is_room_where_a_step_fits_beside_what_devices_hold_and_shall_hold(ready, monkeypatch):
    engine = ready[0]
    for replica_ in engine.replicas:
        shapes = replica_.training_shapes
        stages = [list(stage.mesh.devices.flat) for stage in replica_.submesh.stages]
        enough = max(memory.memory_bytes(replica_, shape) for shape in shapes)
        needed = [
            max(memory.stage_bytes(replica_, shape)[stage] for shape in shapes)
            - memory.leaf_bytes(layout.params)
            - 2 * memory.leaf_bytes(layout.adapters)
            for stage, layout in enumerate(replica_.layouts)
        ]
        for free, beside, expected in (
            (lambda stage, enough=enough: enough, 0, True),
            (lambda stage, needed=needed: needed[stage], 0, True),
            (lambda stage, needed=needed: needed[stage], 1, False),
            (lambda stage, needed=needed: needed[stage] - (stage == 0), 0, False),
            (lambda stage: math.inf, 10**18, True),
        ):
            by_device = {device: free(stage) for stage, devices in enumerate(stages) for device in devices}
            with monkeypatch.context() as patch:
                patch.setattr(free_memory, "free_bytes", lambda device, limit, by_device=by_device: by_device[device])
                assert free_memory.has_room(replica_, shapes, beside=dict.fromkeys(by_device, beside)) == expected
    held = free_memory.bytes_by_device(engine.state.tasks)
    assert sum(held.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.state.tasks))


def test_a_second_state_leaves_room_for_gaps(ready, monkeypatch):
    engine = ready[0]
    before = dict(engine._second_state)
    asked = []
    monkeypatch.setattr(engine_module, "cut_up_bytes", lambda platform, number: asked.append((platform, number)) or 7)
    monkeypatch.delitem(engine.__dict__, "_second_state")
    try:
        assert engine._second_state == {device: size + 7 for device, size in before.items()}
    finally:
        engine.__dict__["_second_state"] = before
    assert set(asked) == {("cpu", len(before))}


@pytest.fixture(scope="module")
def wide(world):
    """An engine of a replica on two devices and one on a single."""
    model = dataclasses.replace(world.model, num_layers=2)
    return world.engine(world.plan((2, 1, "none"), (1, 1, "none")), [world.tasks["b"]], model)


def test_devices_that_would_wait_for_one_without_room_are_asked_first(wide, monkeypatch):
    wide.warm_up()  # devices that do not tell what they hold are not asked
    monkeypatch.setattr(free_memory, "free_bytes", lambda *_: 1)
    wide.warm_up()
    monkeypatch.setattr(free_memory, "HEAP_BYTES", 4 * TOO_MANY)
    monkeypatch.setattr(free_memory, "_temporary_bytes", lambda *_: 4 * TOO_MANY)
    (shape,) = wide.replicas[0].training_shapes
    with pytest.raises(OutOfMemoryError) as raised:
        wide.warm_up()
    assert raised.value.failures == (Failure(replica=0, shape=shape),)
    groups = [dataclasses.replace(group, capacity_tokens=math.prod(shape) - 1) for group in wide.plan.replicas]
    monkeypatch.setattr(wide, "plan", dataclasses.replace(wide.plan, replicas=tuple(groups)))
    wide.warm_up()  # what the plan has no capacity for any more is not asked for


def test_room_is_asked_for_in_pieces_on_each_device_of_a_stage():
    devices = jax.devices()[2:5]
    row = free_memory.ROW_BYTES
    made = free_memory.on_each_device(jax.sharding.Mesh(devices, "tensor"), 4 * row + 1, piece_bytes=2 * row)
    expected = [dict.fromkeys(devices, size) for size in (2 * row, 2 * row, row)]
    assert [free_memory.bytes_by_device(piece) for piece in made] == expected


def test_what_travels_to_several_devices_of_a_stage_counts_beside_a_second_state(wide):
    replica_ = wide.replicas[0]
    (layout,) = replica_.layouts
    travel = wide.gradient_sum.travel_bytes()
    whole = memory.whole_bytes(layout.adapters)
    assert set(travel) == set(replica_.submesh.devices)
    assert set(travel.values()) == {2 * whole + memory.leaf_bytes(layout.adapters)}
    assert whole == sum(leaf.nbytes for leaf in jax.tree.leaves(wide.state.adapters))
    state = free_memory.bytes_by_device((wide.state.tasks, wide.state.alive))
    assert wide._second_state == {device: state[device] + travel.get(device, 0) for device in state}


def test_micro_batches_go_ahead_of_the_step_before_where_there_is_room_for_both_states(ready, monkeypatch):
    """Elsewhere a step waits for its own micro-batches, updates in place, and gives the same."""
    engine, start, steps, states = ready
    order: list[str] = []

    def noted(name):
        method = getattr(engine, name)
        return lambda *arguments, **options: (order.append(name), method(*arguments, **options))[1]

    names = issuing, awaiting, updating = "_issue_micro_batches", "_await_micro_batches", "_update"
    for has_room in (True, False):
        engine.set_state(copy_of(start))
        before = engine.state
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "has_room", lambda *_, has_room=has_room, **__: has_room)
            first = engine.issue(*steps[0])
            assert all(leaf.is_deleted() != has_room for leaf in jax.tree.leaves(before.tasks))
            order.clear()
            for name in names:
                patch.setattr(engine, name, noted(name))
            second = engine.issue(*steps[1])
        assert order == ([issuing, awaiting, updating] if has_room else [awaiting, issuing, updating])
        engine.finish(first)
        engine.finish(second)
        assert_same(engine.state, states[1])


def test_a_step_without_room_leaves_the_engine_as_it_was_where_updates_are_in_place(ready, monkeypatch):
    engine, start, steps, states = ready
    engine.set_state(copy_of(start))
    monkeypatch.setattr(engine_module, "has_room", lambda *_, **__: False)
    first = engine.issue(*steps[0])
    programs = dict(engine.replicas[0]._training)
    fail_in(engine, 0, 0, "fused", later)
    with pytest.raises(OutOfMemoryError) as raised:
        engine.issue(*steps[1])
    assert [failure.replica for failure in raised.value.failures] == [0]
    engine.replicas[0]._training = programs
    engine.finish(first)
    assert_same(engine.state, states[0])
    engine.finish(engine.issue(*steps[1]))
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "_update_in_place", Once(reduce._update_in_place, now))
        with pytest.raises(UserError, match="out of device memory at the update of adapters"):
            engine.issue(*steps[2])


def test_an_update_in_place_waits_for_those_who_look_at_the_adapters_before(ready, monkeypatch):
    engine, start, steps, states = ready
    engine.set_state(copy_of(start))
    monkeypatch.setattr(engine_module, "has_room", lambda *_, **__: False)
    await_all = engine_module._await_all
    monkeypatch.setattr(engine_module, "_await_all", lambda *arguments: (time.sleep(0.3), await_all(*arguments))[1])
    for issued in [engine.issue(*arguments) for arguments in steps]:
        engine.finish(issued)
    assert_same(engine.state, states[-1])


def copy_of(state):
    """Whose arrays may be given up: `start` is used by other tests."""
    copies = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), state.tasks)
    return dataclasses.replace(state, tasks=copies)


def test_a_step_that_finds_no_room_ahead_waits_for_the_one_before(ready, monkeypatch):
    engine, start, steps, states = ready
    engine.set_state(start)
    first = engine.issue(*steps[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_issue_micro_batches", Once(engine._issue_micro_batches, no_room))
        second = engine.issue(*steps[1])
    engine.finish(first)
    engine.finish(second)
    assert_same(engine.state, states[1])


def no_room(_):
    raise OutOfMemoryError([])
