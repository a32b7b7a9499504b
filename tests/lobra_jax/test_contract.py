"""The project's central promise: a task's training is the same under any plan, dispatch, buckets and co-tenants."""

import dataclasses

import numpy as np
import pytest

from lobra_jax import replica, stage
from lobra_jax.lora import LoraSpec

TOLERANCE = 1e-5
NUM_STEPS = 20
"""After so many any plan is to have trained the same adapters."""
CONSTANT = {"kind": "constant", "peak": 1e-3, "warmup_steps": 0, "final_fraction": 1.0}

PLANS = {
    "tensor parallel": [(2, 1, "none")],
    "four devices to a layer": [(4, 1, "dots")],
    "eight devices to a layer": [(8, 1, "attention")],
    "two stages": [(1, 2, "attention")],
    "tensor and pipeline, dots": [(2, 2, "dots")],
    "heterogeneous": [(1, 1, "none"), (1, 1, "dots"), (2, 1, "full"), (1, 2, "dots")],
}
DEEP_PLANS = {
    "three stages of four layers, full": [(1, 3, "full")],
    "a stage a layer": [(1, 4, "dots")],
}


def trained_alone(world, model):
    """Gradients of the first step, adapters and losses after all steps, on one device."""
    tasks = list(world.tasks.values())
    engine = world.engine(world.plan((1, 1, "none")), tasks, model)
    gradients = world.gradients(engine, tasks)
    engine.init_adapters([task.seed for task in tasks])
    adapters, losses = world.train(engine, tasks, NUM_STEPS)
    return gradients, adapters, losses


@pytest.fixture(scope="module")
def reference(world):
    return trained_alone(world, world.model)


@pytest.fixture(scope="module")
def deep_model(world):
    """Of layers enough for stages between the first and the last."""
    return dataclasses.replace(world.model, num_layers=4)


@pytest.fixture(scope="module")
def deep_reference(world, deep_model):
    return trained_alone(world, deep_model)


def check_training(world, reference, engine, tasks):
    """Gradients of the first step, adapters and losses after all are the reference's, whichever replica had what."""
    gradients, adapters, losses = reference
    found = world.gradients(engine, tasks, seed=7)
    for task in world.tasks:
        assert world.difference(found[task], gradients[task]) < TOLERANCE
    engine.init_adapters([task.seed for task in tasks])
    found_adapters, found_losses = world.train(engine, tasks, NUM_STEPS, seed=11)
    for task in world.tasks:
        assert world.difference(found_adapters[task], adapters[task]) < TOLERANCE
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    for each in engine.replicas:
        assert each._have_run == set(each.training_shapes), "what no step ran was not tested"


@pytest.mark.parametrize("name", PLANS)
def test_any_plan_trains_the_same_adapters(world, reference, name):
    tasks = list(world.tasks.values())
    engine = world.engine(world.plan(*PLANS[name]), tasks)
    check_training(world, reference, engine, tasks)


@pytest.mark.parametrize("name", DEEP_PLANS)
def test_any_plan_trains_the_same_adapters_of_a_deeper_model(world, deep_model, deep_reference, name):
    tasks = list(world.tasks.values())
    engine = world.engine(world.plan(*DEEP_PLANS[name]), tasks, deep_model)
    check_training(world, deep_reference, engine, tasks)


def test_policies_by_length_train_the_same_adapters(world, reference, monkeypatch):
    tasks = list(world.tasks.values())
    compiled = []

    def compile_training(layout, rows, length, **options):
        compiled.append((layout.functions.sharding.num_devices, length, layout.functions.remat))
        return stage.compile_training(layout, rows, length, **options)

    monkeypatch.setattr(replica, "compile_training", compile_training)
    longest = world.max_length
    plan = world.plan((1, 1, "none+attention+full"), (2, 1, "dots+full"), buckets=(8, 15, longest))
    engine = world.engine(plan, tasks)
    alone = {(1, 8, "none"), (1, 15, "attention"), (1, longest, "full")}
    assert set(compiled) == alone | {(2, 8, "dots"), (2, 15, "full"), (2, longest, "full")}
    check_training(world, reference, engine, tasks)


@pytest.mark.parametrize(("tied", "config"), [(False, (4, 1, "dots")), (True, (2, 2, "full"))])
def test_a_vocabulary_that_does_not_divide_is_no_hindrance(world, tied, config):
    model = dataclasses.replace(world.model, vocab_size=67, tie_embeddings=tied)
    tasks = [world.tasks["b"]]
    alone, wide = (world.engine(world.plan(own), tasks, model) for own in ((1, 1, "none"), config))
    assert world.difference(world.gradients(wide, tasks), world.gradients(alone, tasks)) < TOLERANCE


def test_other_buckets_and_an_idle_replica_train_the_same_adapters(world, reference):
    _, adapters, _ = reference
    tasks = list(world.tasks.values())
    plan = world.plan((1, 1, "none"), (1, 1, "none"), buckets=(11, world.max_length + 6))
    found, _ = world.train(world.engine(plan, tasks, idle=(1,)), tasks, NUM_STEPS, seed=3, idle=(1,))
    for task in world.tasks:
        assert world.difference(found[task], adapters[task]) < TOLERANCE


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_task_alone_trains_the_adapter_it_trains_among_others(world, reference, name):
    _, adapters, losses = reference
    task = world.tasks[name]
    engine = world.engine(world.plan((1, 1, "none")), [task])
    found, found_losses = world.train(engine, [task], task.steps, seed=5)
    assert world.difference(found[name], adapters[name]) < TOLERANCE
    np.testing.assert_allclose(found_losses[:, 0], losses[: task.steps, list(world.tasks).index(name)], rtol=1e-5)


def test_the_contract_is_about_training_that_moves(world, reference):
    """Guards the tests above: the adapters leave their start by far more than the tolerance."""
    _, adapters, losses = reference
    for name, task in world.tasks.items():
        pairs = [pair for targets in adapters[name].values() for pair in targets.values()]
        assert all(np.abs(pair["b"]).max() > 1e-3 for pair in pairs)
        index = list(world.tasks).index(name)
        assert losses[task.steps - 1, index] != losses[0, index]


def test_rank_padding_and_untargeted_linears_have_no_gradient(world, reference):
    gradients = reference[0]["stacked"]
    for index, task in enumerate(world.tasks.values()):
        for targets in gradients.values():
            for target, pair in targets.items():
                rank = task.spec.rank if target in task.spec.targets else 0
                assert not pair["a"][index, rank:].any()
                assert not pair["b"][index, rank:].any()
                assert rank == 0 or pair["a"][index, :rank].any()


def test_thirty_two_tasks_of_mixed_ranks_share_a_step(world):
    """Each has the gradient it has alone."""
    tasks = [
        dataclasses.replace(
            world.make_task(f"t{i}", batch_size=1, steps=1, seed=i, clip=1.0, **CONSTANT),
            spec=LoraSpec(rank=1 + i % 5, alpha=4.0, targets=("q", "down") if i % 3 else ("v",)),
        )
        for i in range(32)
    ]
    together = world.gradients(world.engine(world.plan((1, 1, "none")), tasks), tasks)
    for task in (tasks[0], tasks[31]):
        alone = world.gradients(world.engine(world.plan((1, 1, "none")), [task]), [task])
        assert world.difference(together[task.data.name], alone[task.data.name]) < TOLERANCE


OPTIMIZERS = {
    "adamw": {"b_ratio": 4.0},
    "sgd": {"momentum": 0.8},
    "adafactor": {},
    "lion": {"beta2": 0.95},
}
FEW_STEPS = 6
MAX_SHARE_OF_FLIPS = 3e-3
"""These optimisers divide a gradient by its own size or take its sign: where it cancels to rounding noise, a step is
noise too. That may be so of one of an adapter's 352 numbers."""


def one_task_an_optimizer(world):
    """All but the first share a shape, so that their solo runs share programs; the first pads them."""
    tasks = []
    for seed, (kind, rest) in enumerate(OPTIMIZERS.items(), start=1):
        spec = LoraSpec(rank=5 if seed == 1 else 2, alpha=4.0, targets=("q", "down"))
        peak = 0.3 if kind == "sgd" else 3e-3
        task = world.make_task(
            kind, batch_size=3, steps=FEW_STEPS, seed=seed, clip=1.0, spec=spec, **{**CONSTANT, "peak": peak}
        )
        optimizer = dataclasses.replace(task.optimizer, kind=kind, rank=spec.rank, **rest)
        tasks.append(dataclasses.replace(task, optimizer=optimizer))
    return tasks


def share_of_unlike(found, expected):
    """Share of an adapter's elements that differ by more than the tolerance, relative to their array's largest."""
    unlike = total = 0
    for layer, targets in expected.items():
        for target, pair in targets.items():
            for factor, wanted in pair.items():
                assert np.abs(wanted).max() > 0
                unlike += np.sum(np.abs(found[layer][target][factor] - wanted) > TOLERANCE * np.abs(wanted).max())
                total += wanted.size
    return unlike / total


@pytest.fixture(scope="module")
def jointly_by_optimizer(world):
    tasks = one_task_an_optimizer(world)
    return world.train(world.engine(world.plan((1, 1, "none")), tasks), tasks, FEW_STEPS)[0]


@pytest.mark.parametrize("kind", ["sgd", "adafactor", "lion"])
def test_with_any_optimizer_a_task_alone_trains_as_among_others(world, jointly_by_optimizer, kind):
    (task,) = [task for task in one_task_an_optimizer(world) if task.data.name == kind]
    found, _ = world.train(world.engine(world.plan((1, 1, "none")), [task]), [task], FEW_STEPS, seed=5)
    assert share_of_unlike(found[kind], jointly_by_optimizer[kind]) <= MAX_SHARE_OF_FLIPS


def test_any_plan_trains_the_same_adapters_with_any_optimizer(world, jointly_by_optimizer):
    tasks = one_task_an_optimizer(world)
    plan = world.plan((1, 1, "none"), (2, 1, "full"))
    found, _ = world.train(world.engine(plan, tasks), tasks, FEW_STEPS, seed=9)
    for kind in OPTIMIZERS:
        assert share_of_unlike(found[kind], jointly_by_optimizer[kind]) <= MAX_SHARE_OF_FLIPS


def tasks_with_dora(world):
    """One without, one with, one with dropout as well; all on one column-parallel and one row-parallel linear."""
    specs = {
        "plain": LoraSpec(rank=2, alpha=4.0, targets=("q", "down")),
        "dora": LoraSpec(rank=3, alpha=4.0, targets=("q", "down"), dora=True),
        "dropped": LoraSpec(rank=2, alpha=4.0, targets=("down",), dropout=0.2, dora=True),
    }
    tasks = [
        world.make_task(name, batch_size=6, steps=FEW_STEPS, seed=seed, clip=1.0, spec=spec, **CONSTANT)
        for seed, (name, spec) in enumerate(specs.items(), start=1)
    ]
    # Gradients that cancel to rounding noise are more here, and Adam would turn each into a step of its own.
    return [dataclasses.replace(task, optimizer=dataclasses.replace(task.optimizer, epsilon=1e-4)) for task in tasks]


@pytest.fixture(scope="module")
def jointly_with_dora(world):
    tasks = tasks_with_dora(world)
    return world.train(world.engine(world.plan((1, 1, "none")), tasks), tasks, FEW_STEPS)


@pytest.mark.parametrize(
    "configs", [[(2, 1, "full"), (1, 1, "dots")], [(1, 2, "none"), (2, 1, "none")]], ids=["sharded", "pipelined"]
)
def test_any_plan_trains_the_same_magnitudes(world, jointly_with_dora, configs):
    tasks = tasks_with_dora(world)
    adapters, losses = jointly_with_dora
    found, found_losses = world.train(world.engine(world.plan(*configs), tasks), tasks, FEW_STEPS, seed=9)
    for task in tasks:
        assert world.difference(found[task.data.name], adapters[task.data.name]) < TOLERANCE
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)


def test_a_task_with_dora_alone_trains_as_among_others(world, jointly_with_dora):
    task = tasks_with_dora(world)[1]
    found, _ = world.train(world.engine(world.plan((1, 1, "none")), [task]), [task], FEW_STEPS, seed=5)
    assert world.difference(found["dora"], jointly_with_dora[0]["dora"]) < TOLERANCE
    start = world.engine(world.plan((1, 1, "none")), [task]).state.adapters
    for layer, targets in found["dora"].items():
        for target, pair in targets.items():
            assert np.abs(pair["m"] - np.asarray(start[layer][target]["m"])[0]).max() > 1e-4


def test_a_task_without_a_magnitude_does_not_feel_those_of_others(world, jointly_with_dora):
    task = tasks_with_dora(world)[0]
    found, _ = world.train(world.engine(world.plan((1, 1, "none")), [task]), [task], FEW_STEPS, seed=5)
    assert world.difference(found["plain"], jointly_with_dora[0]["plain"]) < TOLERANCE
