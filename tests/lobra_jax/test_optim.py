"""The vectorised optimiser against optax, one task at a time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lobra_jax import optim
from lobra_jax.optim import TaskOptimizer, TaskState, learning_rates, step_inputs


def task_optimizer(lr, clip=math.inf, **rest):
    values = {"weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8} | rest
    return TaskOptimizer(learning_rates=np.full(9, lr, np.float32), clip_norm=clip, **values)


def state_with(parameters, moments, last_good=None):
    nothing = {layer: {} for layer in parameters}
    return TaskState(adapters=parameters, last_good=last_good or nothing, moments=moments, averages=nothing)


def state_of(parameters, kinds=("adamw",)):
    moments = {layer: optim.init_state(tree, 3, kinds) for layer, tree in parameters.items()}
    return state_with(parameters, moments, None if kinds == ("adamw",) else parameters)


@pytest.fixture
def parameters():
    rng = np.random.default_rng(0)
    return {"0": {"w": jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)}, "1": {"w": jnp.ones((3, 5), jnp.float32)}}


def run(state, gradients, optimizers, task_steps, alive=None):
    alive = jnp.ones(3, bool) if alive is None else alive
    hyper = jax.tree.map(jnp.asarray, step_inputs(optimizers, task_steps))
    return jax.jit(optim.update)(state, gradients, hyper, optim.squared_norms(gradients), alive)


def test_every_task_follows_its_own_adamw(parameters):
    optimizers = [
        task_optimizer(1e-2, weight_decay=0.1),
        task_optimizer(3e-3, clip=0.5, beta1=0.8),
        task_optimizer(1e-1, beta2=0.9, epsilon=1e-3),
    ]
    state, rng = state_of(parameters), np.random.default_rng(1)
    expected = [jax.tree.map(lambda x, t=t: x[t], parameters) for t in range(3)]
    chains = [
        optax.adamw(float(o.learning_rates[0]), b1=o.beta1, b2=o.beta2, eps=o.epsilon, weight_decay=o.weight_decay)
        for o in optimizers
    ]
    states = [chain.init(tree) for chain, tree in zip(chains, expected, strict=True)]
    for step in range(4):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), parameters)
        state, norm, _ = run(state, gradients, optimizers, [step] * 3)
        for t, chain in enumerate(chains):
            own = jax.tree.map(lambda x, t=t: x[t], gradients)
            whole = float(optax.global_norm(own))
            assert float(norm[t]) == pytest.approx(whole, rel=1e-5)
            factor = min(1.0, optimizers[t].clip_norm / whole)
            with jax.numpy_dtype_promotion("standard"):
                updates, states[t] = chain.update(jax.tree.map(lambda g, f=factor: g * f, own), states[t], expected[t])
            expected[t] = optax.apply_updates(expected[t], updates)
    for t in range(3):
        for found, wanted in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(expected[t]), strict=True):
            np.testing.assert_allclose(found[t], wanted, rtol=1e-5, atol=1e-6)


def test_an_inactive_task_keeps_adapters_moments_and_count(parameters):
    gradients = jax.tree.map(jnp.ones_like, parameters)
    rising = dataclasses.replace(task_optimizer(0), learning_rates=np.linspace(1e-2, 2e-2, 9, dtype=np.float32))
    before, _, _ = run(state_of(parameters), gradients, [rising] * 3, [0, 0, 0])
    after, _, alive = run(before, gradients, [rising] * 3, [1, None, 1])
    assert alive.all()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        assert not np.array_equal(old[0], new[0])


@pytest.mark.parametrize("kinds", [("adamw",), ("adamw", "sgd", "lion"), ("lion",)])
def test_a_gradient_that_is_not_finite_stops_that_task_alone_at_its_last_good_adapter(parameters, kinds):
    optimizers = [task_optimizer(1e-2, kind=kinds[task % len(kinds)]) for task in range(3)]
    gradients = jax.tree.map(jnp.ones_like, parameters)
    first, _, _ = run(state_of(parameters, kinds), gradients, optimizers, [0, 0, 0])
    assert bool(jax.tree.leaves(first.last_good)) == (kinds != ("adamw",))
    bad = jax.tree.map(lambda g: g.at[1].set(jnp.nan), gradients)
    second, _, alive = run(first, bad, optimizers, [1, 1, 1])
    assert alive.tolist() == [True, False, True]
    third, _, alive = run(second, gradients, optimizers, [2, 2, 2], alive)
    assert alive.tolist() == [True, False, True]
    for start, stopped, moved in zip(*map(jax.tree.leaves, (parameters, third.adapters, second.adapters)), strict=True):
        # The step from `start` led to the bad gradient.
        np.testing.assert_allclose(stopped[1], start[1], rtol=2e-7 if kinds == ("adamw",) else 0, atol=1e-9)
        assert np.isfinite(stopped).all()
        assert not np.array_equal(stopped[0], moved[0])


def test_adamw_goes_back_to_where_any_step_started_whatever_its_rate_then(parameters):
    """A bad gradient after each of a few steps, in which every task has another rate, decay and ratio of rates."""
    optimizers = [
        TaskOptimizer(
            learning_rates=np.array([1e-3, 0, 3e-3, 1e-4], np.float32) * (1 + task),
            weight_decay=(0.0, 1.0, 10.0)[task],
            beta1=0.9,
            beta2=0.99,
            epsilon=1e-8,
            clip_norm=(math.inf, 0.5, 1e-3)[task],
            b_ratio=1.0 + 9 * (task == 1),
        )
        for task in range(3)
    ]
    assert all(
        optim.goes_back("adamw", float(o.learning_rates.max()), b_ratio=o.b_ratio, weight_decay=o.weight_decay)
        for o in optimizers
    )
    parameters = {
        "0": {"q": {"a": parameters["0"]["w"], "b": jnp.zeros((3, 2, 4)), "m": 1 + parameters["1"]["w"]}},
    }
    rng = np.random.default_rng(3)

    def draw(size):
        return jax.tree.map(lambda x: jnp.asarray(size * rng.normal(size=x.shape), jnp.float32), parameters)

    state, before = state_of(parameters), parameters
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), parameters)
    for step in range(5):
        back, _, alive = run(state, bad, optimizers, [min(step, 3)] * 3)
        assert not alive.any()
        for found, expected in zip(jax.tree.leaves(back.adapters), jax.tree.leaves(before), strict=True):
            np.testing.assert_allclose(found, expected, rtol=5e-7, atol=2e-7)
        if step < 4:
            before = state.adapters
            state, _, _ = run(state, draw(10 ** rng.uniform(-9, 9)), optimizers, [step] * 3)
            state, _, _ = run(state, draw(1.0), optimizers, [None] * 3)  # changes nothing of where the last one began


@pytest.mark.parametrize(
    ("kind", "rate", "b_ratio", "weight_decay", "expected"),
    [
        ("adamw", 1e-3, 16.0, 0.1, True),
        ("adamw", 0.1, 1.0, 1.0, True),
        ("adamw", 0.11, 1.0, 0.0, False),
        ("adamw", 0.01, 16.0, 0.0, False),
        ("adamw", 0.01, 0.5, 0.0, True),
        ("adamw", 0.01, 1.0, 20.0, False),
        ("sgd", 1e-3, 1.0, 0.0, False),
        ("lion", 1e-3, 1.0, 0.0, False),
    ],
)
def test_only_short_steps_of_adamw_are_gone_back_over(kind, rate, b_ratio, weight_decay, expected):
    assert optim.goes_back(kind, rate, b_ratio=b_ratio, weight_decay=weight_decay) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.775, 0.55, 0.325]),
        (
            "cosine",
            [0.5, 1, 1, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 4))],
        ),
    ],
)
def test_schedules_warm_up_and_fall_to_the_final_fraction(kind, expected):
    rates = learning_rates(kind, 1.0, steps=6, warmup_steps=2, final_fraction=0.1)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_a_finished_task_has_no_rate():
    hyper = step_inputs([task_optimizer(1e-2)] * 2, [3, None])
    assert hyper.active.tolist() == [True, False]
    assert hyper.learning_rate.tolist() == [np.float32(1e-2), 0]


def test_wsd_stays_at_the_peak_until_the_last_share_of_the_steps():
    rates = learning_rates("wsd", 1.0, steps=10, warmup_steps=2, final_fraction=0.2, decay_fraction=0.4)
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4], rtol=1e-5)


CHAINS = {
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2, b1=0.9, b2=0.95, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, factored=False),
    "adamw": lambda: optax.adamw(1e-2, b2=0.95, weight_decay=0.1),
}
SETTINGS = {
    "sgd": {"momentum": 0.9},
    "lion": {"beta2": 0.95, "weight_decay": 0.1},
    "adafactor": {},
    "adamw": {"beta2": 0.95, "weight_decay": 0.1},
}


def test_every_task_follows_its_own_optimizer_in_one_program():
    """Task t has rank t + 1 of 4; what the others' ranks pad it with never reaches it."""
    rng = np.random.default_rng(0)

    def draw():
        out = {"a": rng.normal(size=(4, 6, 4)), "b": rng.normal(size=(4, 4, 5))}
        for task in range(4):
            out["a"][task, :, task + 1 :] = 0
            out["b"][task, task + 1 :] = 0
        return {"0": {"q": {name: jnp.asarray(x, jnp.float32) for name, x in out.items()}}}

    def own(tree, task):
        pair = tree["0"]["q"]
        return {"a": pair["a"][task, :, : task + 1], "b": pair["b"][task, : task + 1]}

    parameters = draw()
    kinds = list(CHAINS)
    optimizers = [task_optimizer(1e-2, kind=kind, rank=t + 1, **SETTINGS[kind]) for t, kind in enumerate(kinds)]
    chains = [CHAINS[kind]() for kind in kinds]
    expected = [own(parameters, task) for task in range(4)]
    with jax.numpy_dtype_promotion("standard"):
        states = [chain.init(tree) for chain, tree in zip(chains, expected, strict=True)]
    moments = {"0": optim.init_state(parameters["0"], 4, tuple(kinds))}
    state = state_with(parameters, moments, parameters)
    for step in range(4):
        gradients = draw()
        state, _, _ = run(state, gradients, optimizers, [step] * 4, alive=jnp.ones(4, bool))
        for task, chain in enumerate(chains):
            with jax.numpy_dtype_promotion("standard"):
                updates, states[task] = chain.update(own(gradients, task), states[task], expected[task])
            expected[task] = optax.apply_updates(expected[task], updates)
    for task in range(4):
        found = own(state.adapters, task)
        for name in "ab":
            np.testing.assert_allclose(found[name], expected[task][name], rtol=1e-5, atol=1e-6)
        assert not np.any(state.adapters["0"]["q"]["a"][task, :, task + 1 :])


def test_the_average_weighs_steps_by_the_decay_and_a_task_without_one_has_its_last_adapter(parameters):
    optimizers = [task_optimizer(1e-2, ema_decay=0.8), task_optimizer(1e-2), task_optimizer(1e-2, ema_decay=0.5)]
    state = dataclasses.replace(state_of(parameters), averages=parameters)
    rng, seen = np.random.default_rng(1), []
    for step in range(4):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), parameters)
        state, _, _ = run(state, gradients, optimizers, [step, step, step if step < 3 else None])
        seen.append(jax.tree.map(np.asarray, state.adapters))
    for task, weights in ((0, [0.512, 0.64, 0.8, 1.0]), (1, [0, 0, 0, 1.0]), (2, [0.25, 0.5, 1.0, 0])):
        for layer in parameters:
            expected = np.average([adapters[layer]["w"][task] for adapters in seen], axis=0, weights=weights)
            np.testing.assert_allclose(state.averaged[layer]["w"][task], expected, rtol=1e-6)
    assert state_of(parameters).averaged is parameters


def test_a_task_that_fails_falls_back_in_its_average_too(parameters):
    optimizers = [task_optimizer(1e-2, ema_decay=0.9)] * 3
    state = dataclasses.replace(state_of(parameters), averages=parameters)
    good = jax.tree.map(jnp.ones_like, parameters)
    state, _, alive = run(state, good, optimizers, [0] * 3)
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), good)
    state, _, alive = run(state, bad, optimizers, [1] * 3, alive=alive)
    assert alive.tolist() == [True, False, True]
    for layer in parameters:
        np.testing.assert_array_equal(state.averaged[layer]["w"][1], state.adapters[layer]["w"][1])
        assert not np.array_equal(state.averaged[layer]["w"][0], state.adapters[layer]["w"][0])


def test_lora_plus_is_another_rate_for_b_alone():
    parameters = {"0": {"q": {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 2, 4))}}}
    gradients = jax.tree.map(jnp.ones_like, parameters)
    optimizers = [task_optimizer(1e-3, b_ratio=ratio) for ratio in (1.0, 16.0, 0.5)]
    after, _, _ = run(state_of(parameters), gradients, optimizers, [0] * 3)
    moved = jax.tree.map(lambda new, old: np.asarray(old - new), after.adapters, parameters)["0"]["q"]
    np.testing.assert_allclose(moved["a"], np.full((3, 4, 2), 1e-3), rtol=1e-3)
    for task, ratio in enumerate((1.0, 16.0, 0.5)):
        np.testing.assert_allclose(moved["b"][task], np.full((2, 4), ratio * 1e-3), rtol=1e-3)


def test_state_is_kept_only_for_the_optimizers_in_use():
    parameters = {"w": jnp.ones((3, 4))}
    sgd = sum(leaf.size for leaf in jax.tree.leaves(optim.init_state(parameters, 3, ("sgd",))))
    assert sgd == 12  # the momentum alone
    assert set(optim.init_state(parameters, 3, ("adamw", "lion"))) == {"adamw", "lion"}
