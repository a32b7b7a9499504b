"""What a step costs beside its micro-batches: gradient sum, update, and new adapters on every replica."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lobra_jax.lora import Adapters
from lobra_jax.optim import HyperInputs, TaskOptimizer, step_inputs
from lobra_jax.reduce import GradientSum
from lobra_jax.replica import Replica
from planner.plan import ParallelConfig
from profiling.measure import Setup, make_replica

NUM_WARM_UPS = 2
"""Updates before the timed ones: the first runs on the state as it was made, the second as updates leave it."""
BUSY_FACTOR = 3
"""Devices work this many times as long on the gradients as the host takes to issue what follows them."""
FIRST_TURNS, MOST_TURNS = 16, 2**15
MOST_BUSY_S = 0.5
"""Longer than any issuing takes where it does not itself wait for the devices, as on simulated ones."""
SPUN = 256
"""Rows of the matrix that devices are kept busy with."""


def measure_step_overhead(setup: Setup, config: ParallelConfig) -> float:
    """Median seconds from the last gradients to the new adapters, with replicas of `config` on all devices.

    As in a run, the host issues it while devices still work on the gradients.
    """
    g = config.num_devices
    replicas = [
        make_replica(setup, config, index, setup.devices[index * g : (index + 1) * g])
        for index in range(len(setup.devices) // g)
    ]
    gradient_sum = GradientSum(
        replicas,
        setup.model.num_layers,
        setup.num_tasks,
        setup.optimizers,
        averages=setup.averages,
        last_good=setup.last_good,
    )
    adapters: Adapters = {}
    for layout in replicas[0].layouts:
        adapters.update(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), layout.adapters))
    state, hyper = gradient_sum.init(adapters), _hyper_inputs(setup)
    make = [_late_gradients(replica) for replica in replicas]
    turns, readings = FIRST_TURNS, []
    while len(readings) < NUM_WARM_UPS + setup.repeats:
        start = time.perf_counter()
        gradients = [late(turns) for late in make]
        state, norms = gradient_sum.step(state, gradients, hyper, in_place=True)
        new = (norms, gradient_sum.spread(state.adapters))
        issued = time.perf_counter()
        jax.block_until_ready(gradients)
        ready = time.perf_counter()
        jax.block_until_ready(new)
        done = time.perf_counter()
        del gradients, new
        if ready - start < min(BUSY_FACTOR * (issued - start), MOST_BUSY_S) and turns < MOST_TURNS:
            # The first time compiles; after it, until the devices work long enough.
            turns *= 2
        else:
            readings.append(done - ready)
    return statistics.median(readings[NUM_WARM_UPS:])


def _hyper_inputs(setup: Setup) -> HyperInputs:
    tasks = [
        TaskOptimizer(
            learning_rates=np.full(1, 1e-4, np.float32),
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=1.0,
            kind=setup.optimizers[task % len(setup.optimizers)],
            rank=setup.rank,
        )
        for task in range(setup.num_tasks)
    ]
    return step_inputs(tasks, [0] * setup.num_tasks)


def _late_gradients(replica: Replica) -> Callable[[int], list[Adapters]]:
    """Gradients of a replica, by stage, which its devices have after so many turns of other work."""
    programs = [
        jax.jit(
            functools.partial(_gradients_after, layout.adapters),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, layout.adapters),
        )
        for layout in replica.layouts
    ]
    return lambda turns: [program(np.int32(turns)) for program in programs]


def _gradients_after(like: Any, turns: Array) -> Adapters:
    matrix = jnp.full((SPUN, SPUN), 1 / SPUN, jnp.float32)
    spun = jax.lax.fori_loop(0, turns, lambda _, x: x @ matrix, matrix)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, spun[0, 0], leaf.dtype), like)
