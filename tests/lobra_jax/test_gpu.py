"""On real accelerators: unlike replicas agree with one, and bf16 with the flash kernel agrees with fp32.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/lobra_jax/test_gpu.py
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.data.batches import MicroBatchArrays, Segments
from lobra_jax.lora import LoraSpec, init_adapters
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import RandomWeights
from planner.packing import max_segments
from planner.plan import REMATS, ParallelConfig, Plan, ReplicaGroup

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
CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_remove_custom_partitioning_ptr_from_cache_key",
)
FIELDS = operator.attrgetter("tokens", "targets", "loss_weights")


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


def packed(padded: MicroBatchArrays) -> MicroBatchArrays:
    """The same sequences, up to their last weight, two to a row; the rest of a row is a segment of its own."""
    num_rows, room, num_segments = ROWS // 2, 2 * LENGTH, max_segments(2 * LENGTH)
    ids, positions = np.zeros((2, num_rows, room), np.int32)
    tokens, targets, weights = (np.zeros((num_rows, room), a.dtype) for a in FIELDS(padded))
    marks = np.zeros((num_rows, num_segments), np.uint32)
    for row in range(num_rows):
        start = 0
        for segment, source in enumerate((2 * row, 2 * row + 1)):
            count = np.count_nonzero(padded.loss_weights[source])
            part = slice(start, start + count)
            for packed_array, array in zip((tokens, targets, weights), FIELDS(padded), strict=True):
                packed_array[row, part] = array[source, :count]
            ids[row, part], positions[row, part] = segment, np.arange(count)
            marks[row, segment] = padded.dropout_ids[source]
            start += count
        ids[row, start:], positions[row, start:] = 2, np.arange(room - start)
    slots = np.zeros((num_rows, num_segments), np.int32)
    slots[:, 1] = 1
    return MicroBatchArrays(
        tokens=tokens,
        targets=targets,
        loss_weights=weights,
        task_ids=padded.task_ids.reshape(num_rows, 2),
        dropout_ids=marks,
        segments=Segments(segment_ids=ids, positions=positions, slots=slots),
    )


class Bfloat16Weights(RandomWeights):
    """A checkpoint in bf16: quantised to the same codes whatever dtype a run has."""

    def read(self, name, index):
        return super().read(name, index).astype(jnp.bfloat16)


def gradients(configs, dtype, as_packed=False, quantization="none"):
    """(losses [T], gradient pytree) of four micro-batches, dealt round the replicas of (tp, pp, remat)."""
    from lobra_jax.engine import Engine
    from lobra_jax.replica import ReplicaRun

    groups = tuple(
        ReplicaGroup(count=1, config=ParallelConfig(tp=tp, pp=pp, remat=remat), capacity_tokens=ROWS * LENGTH)
        for tp, pp, remat in configs
    )
    plan = Plan(model=MODEL.name, num_devices=len(jax.devices()), replicas=groups, buckets=(LENGTH,))
    engine = Engine(plan, MODEL, SPECS, dtype=dtype, quantization=quantization, packed=as_packed)
    engine.load((RandomWeights if quantization == "none" else Bfloat16Weights)(MODEL, seed=0))
    shape = (ROWS // 2, 2 * LENGTH) if as_packed else (ROWS, LENGTH)
    for _ in engine.compile([[shape]] * len(groups), [()] * len(groups), num_threads=4):
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
        mine = [packed(arrays) for arrays in mine] if as_packed else mine
        replica.issue(run, mine, spread[replica.index], engine.tasks[replica.index])
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


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("shapes", [[(1, 1)], [(1, 1), (1, 1)], [(2, 1)], [(1, 2)], [(2, 1), (1, 2)], [(2, 2)]])
def test_unlike_replicas_agree_with_one(reference, shapes, remat):
    if sum(tp * pp for tp, pp in shapes) > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(tp, pp, remat) for tp, pp in shapes], np.float32)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    assert distance(found, reference[1]) < 1e-5


@pytest.fixture
def cache(tmp_path):
    """JAX's compilation cache, which takes every program, in the folder that it returns."""
    from jax.experimental.compilation_cache import compilation_cache

    from lobra_jax.devices import find_programs_again

    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    compilation_cache.reset_cache()
    for name, value in zip(CACHE_SETTINGS, (str(tmp_path), 0.0, False), strict=True):
        jax.config.update(name, value)
    find_programs_again()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_a_second_engine_finds_its_programs_in_the_cache(shape, cache):
    from lobra_jax.compilation import CompilationCount

    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    count = CompilationCount()
    gradients([(*shape, "dots")], jnp.bfloat16)
    first = count.total - count.from_cache
    gradients([(*shape, "dots")], jnp.bfloat16)
    again = count.total - count.from_cache - first
    assert first > 0 and again == 0


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_programs_kept_train_the_same_without_being_traced(shape, cache, monkeypatch):
    """Also those that were kept when they came from JAX's cache."""
    from lobra_jax import kept_programs
    from lobra_jax.stage import StageFunctions

    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    folder = cache / "stages"
    monkeypatch.setattr(kept_programs, "programs_folder", lambda: folder)
    losses, expected = gradients([(*shape, "dots")], jnp.bfloat16)
    num_files = len(list(folder.iterdir()))
    for file in folder.iterdir():
        file.unlink()
    gradients([(*shape, "dots")], jnp.bfloat16)
    assert len(list(folder.iterdir())) == num_files == shape[1]
    for name in ("forward", "backward", "fused"):
        monkeypatch.setattr(StageFunctions, name, lambda *_: pytest.fail("traced"))
    found_losses, found = gradients([(*shape, "dots")], jnp.bfloat16)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    assert distance(found, expected) < 1e-3  # bf16: XLA's kernels may add up in any order


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_bf16_with_the_flash_kernel_agrees_with_fp32(reference, shape):
    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(*shape, "dots")], jax.numpy.bfloat16)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-2)
    assert distance(found, reference[1]) < 5e-2
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("quantization", "error"), [("int8", 5e-2), ("nf4", 5e-2), ("fp8", 0.3)])
def test_a_quantised_base_in_bf16_agrees_with_itself_in_fp32(shape, quantization, error):
    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(*shape, "dots")], jnp.bfloat16, quantization=quantization)
    expected_losses, expected = gradients([(1, 1, "full")], np.float32, quantization=quantization)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-2)
    assert distance(found, expected) < error


def test_fp8_products_are_the_librarys_both_ways():
    from lobra_jax.models.quantized import frozen_product, quantized

    if tuple(map(int, jax.devices()[0].compute_capability.split("."))) < (8, 9):
        pytest.skip("needs an Ada, Hopper or newer GPU")
    values, scale = quantized(jax.random.normal(jax.random.key(0), (512, 1024)), "fp8", 0)

    def both(x, d_y, values, scale):
        y, vjp = jax.vjp(lambda x: frozen_product(x, values, scale, "fp8", 0), x)
        return y, vjp(d_y)[0]

    x, d_y = jnp.ones((2, 256, 512), jnp.bfloat16), jnp.ones((2, 256, 1024), jnp.bfloat16)
    assert jax.jit(both).lower(x, d_y, values, scale).compile().as_text().count("__cublas$lt$matmul$f8") >= 2


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("dtype", "loss_error", "error"), [(np.float32, 1e-5, 1e-5), (jnp.bfloat16, 1e-2, 5e-2)])
def test_packed_rows_agree_with_padded_ones(reference, shape, dtype, loss_error, error):
    if shape[0] * shape[1] > len(jax.devices()):
        pytest.skip(f"needs more than {len(jax.devices())} devices")
    losses, found = gradients([(*shape, "dots")], dtype, as_packed=True)
    np.testing.assert_allclose(losses, reference[0], rtol=loss_error)
    assert distance(found, reference[1]) < error


@pytest.mark.parametrize(("length", "rank"), [(256, 16), (200, 8), (130, 32)])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_kernels_of_swiglu_agree_with_plain_jax(length, rank, slots, monkeypatch):
    """In bf16, with what is added by adapters, against fp32; each program goes over several tiles and blocks."""
    from lobra_jax.models import adapted_swiglu as swiglu
    from lobra_jax.models import adapted_swiglu_kernel as kernel

    if jax.devices()[0].compute_capability not in kernel.CAPABILITIES:
        pytest.skip("no kernels for this GPU")
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    rank = min(rank, kernel.MOST_RANK // slots)

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    wide, values, factors = (2, length, 640), (2, length, slots, rank), (2, slots, rank, 640)
    arrays = [normal(i, *shape) for i, shape in enumerate([wide] * 2 + [values] * 2 + [factors] * 3 + [wide, values])]
    exact = [x.astype(jnp.float32) for x in arrays]
    backwards = (functools.partial(f, shared=slots > 1) for f in (kernel.backward, swiglu._backward))
    for by_kernel, plain, count in ((kernel.forward, swiglu._forward, 7), (*backwards, 9)):
        program = jax.jit(by_kernel).lower(*arrays[:count]).compile()
        assert "triton" in program.as_text()
        for found, expected in zip(program(*arrays[:count]), jax.jit(plain)(*exact[:count]), strict=True):
            error = jnp.linalg.norm((found.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel())
            assert error < 8e-3


def test_what_is_not_finite_stays_in_its_slot_in_the_kernels_of_swiglu():
    from lobra_jax.models import adapted_swiglu_kernel as kernel

    if jax.devices()[0].compute_capability not in kernel.CAPABILITIES:
        pytest.skip("no kernels for this GPU")

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    own = jnp.arange(128)[None, :, None, None] // 64 == jnp.arange(2)[None, None, :, None]
    wide, values, factors = (1, 128, 640), (1, 128, 2, 16), (1, 2, 16, 640)
    arrays = [normal(i, *shape) for i, shape in enumerate([wide] * 2 + [values] * 2 + [factors] * 3 + [wide, values])]
    for at in (2, 3, 8):
        arrays[at] = jnp.where(own, arrays[at], 0)
    backward = jax.jit(functools.partial(kernel.backward, shared=True))
    expected = backward(*arrays)
    arrays[7] = arrays[7].at[0, 5].set(jnp.inf)
    found = backward(*arrays)
    assert not np.isfinite(np.asarray(found[2][0, 5], np.float32)).all()
    for ours, theirs in zip(found[4:], expected[4:], strict=True):
        np.testing.assert_array_equal(ours[0, 1], theirs[0, 1])


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_flash_kernel_keeps_segments_apart(kv_heads):
    """Against attention over each segment alone in fp32, forward and gradients; one row is a single segment."""
    from lobra_jax.models.attention import packed_attention
    from lobra_jax.packed import SegmentInputs

    length, cuts = 512, [[100, 317, 450], []]
    rng = np.random.default_rng(0)
    q, weights = rng.normal(size=(2, 2, length, 8, 128)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 128)).astype(np.float32)
    ids = np.array([np.searchsorted(cut, np.arange(length), side="right") for cut in cuts], np.int32)
    segments = SegmentInputs(
        segment_ids=jnp.asarray(ids),
        positions=jnp.zeros_like(ids),
        slots=jnp.zeros((2, max_segments(length)), jnp.int32),
    )

    def run(dtype, q, k, v):
        out = packed_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), segments)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    for dtype, tolerance in ((jnp.bfloat16, 2e-2), (jnp.float32, 1e-5)):
        grad = jax.jit(jax.grad(lambda *x, d=dtype: run(d, *x), argnums=(0, 1, 2), has_aux=True))
        gradients_of, out = grad(q, k, v)
        expected = jax.grad(lambda *x: alone(cuts, length, weights, *x), argnums=(0, 1, 2), has_aux=True)(q, k, v)
        for found, wanted in zip((*gradients_of, out), (*expected[0], expected[1]), strict=True):
            found, wanted = np.asarray(found, np.float32), np.asarray(wanted)
            assert np.isfinite(found).all()
            assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


def alone(cuts, length, weights, q, k, v):
    rows = []
    for row, cut in enumerate(cuts):
        parts = [np.s_[row : row + 1, a:b] for a, b in zip([0, *cut], [*cut, length], strict=True)]
        own = [
            jax.nn.dot_product_attention(q[part], k[part], v[part], is_causal=True, implementation="xla")
            for part in parts
        ]
        rows.append(jnp.concatenate(own, axis=1))
    out = jnp.concatenate(rows)
    return jnp.sum(out * weights), out
