"""On real accelerators: unlike replicas agree with one, and bf16 with the flash kernel agrees with fp32.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/lobra_jax/test_gpu.py
"""

import jax
import numpy as np
import pytest

from lobra_jax.data.batches import MicroBatchArrays
from lobra_jax.lora import LoraSpec, init_adapters
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import RandomWeights
from planner.plan import ParallelConfig, Plan, ReplicaGroup

pytestmark = pytest.mark.gpu

MODEL = LlamaConfig(
    name="gpu-test",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
SPECS = [LoraSpec(rank=8, alpha=16), LoraSpec(rank=16, alpha=16, targets=("q", "v", "down"))]
ROWS, LENGTH = 4, 256


def micro_batch(seed: int) -> MicroBatchArrays:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row, length in enumerate(rng.integers(LENGTH // 2, LENGTH, ROWS)):
        weights[row, :length] = 1 / (4 * ROWS * LENGTH)
    return MicroBatchArrays(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=weights,
        task_ids=rng.integers(0, len(SPECS), ROWS).astype(np.int32),
        dropout_ids=np.arange(ROWS, dtype=np.uint32),
    )


def gradients(configs, dtype):
    """(losses [T], gradient pytree) of four micro-batches, dealt round the replicas of (tp, pp, remat)."""
    from lobra_jax.engine import Engine
    from lobra_jax.replica import ReplicaRun

    groups = tuple(
        ReplicaGroup(count=1, config=ParallelConfig(tp=tp, pp=pp, remat=remat), capacity_tokens=ROWS * LENGTH)
        for tp, pp, remat in configs
    )
    plan = Plan(model=MODEL.name, num_devices=len(jax.devices()), replicas=groups, buckets=(LENGTH,))
    engine = Engine(plan, MODEL, SPECS, dtype=dtype)
    engine.load(RandomWeights(MODEL, seed=0))
    for _ in engine.compile([[(ROWS, LENGTH)]] * len(groups), [()] * len(groups), num_threads=4):
        pass
    adapters = init_adapters(MODEL, SPECS, [1, 2])
    rng = np.random.default_rng(0)
    for targets in adapters.values():
        for target, pair in targets.items():
            for task, spec in enumerate(SPECS):
                if target in spec.targets:
                    b = pair["b"][task, : spec.rank]
                    b[:] = rng.normal(0, 0.02, b.shape)
    engine.set_state(engine.gradient_sum.init(adapters))
    spread = engine.gradient_sum.spread(engine.state.adapters)
    losses, total = np.zeros(len(SPECS)), None
    for replica in engine.replicas:
        run = ReplicaRun(gradients=replica.zero_gradients())
        mine = [micro_batch(seed) for seed in range(4) if seed % len(groups) == replica.index]
        for _ in replica.issue(run, mine, spread[replica.index], engine.tasks[replica.index]):
            pass
        losses += sum(np.asarray(x, np.float64) for x in run.losses)
        own = {layer: jax.tree.map(np.asarray, pairs) for stage in run.gradients for layer, pairs in stage.items()}
        total = own if total is None else jax.tree.map(np.add, total, own)
    return losses, total


def distance(found, expected):
    above = sum(
        np.sum((x - y) ** 2, dtype=np.float64) for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    )
    return float(np.sqrt(above / sum(np.sum(y**2, dtype=np.float64) for y in jax.tree.leaves(expected))))


@pytest.fixture(scope="module", autouse=True)
def no_tf32():
    """For all threads, the compiling ones too: the context manager of the same name binds its own thread only."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="module")
def reference(no_tf32):
    return gradients([(1, 1, "none")], np.float32)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("shapes", [[(1, 1)], [(1, 1), (1, 1)], [(2, 1)], [(1, 2)], [(2, 1), (1, 2)], [(2, 2)]])
def test_unlike_replicas_agree_with_one(reference, shapes, remat):
    if sum(tp * pp for tp, pp in shapes) > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(tp, pp, remat) for tp, pp in shapes], np.float32)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert distance(found, reference[1]) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_bf16_with_the_flash_kernel_agrees_with_fp32(reference, shape):
    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(*shape, "dots")], jax.numpy.bfloat16)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-2)
    assert distance(found, reference[1]) < 5e-2
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
