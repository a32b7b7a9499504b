"""SwiGLU between adapters: its own gradients against JAX's, and the GPU's kernels, interpreted, against plain JAX."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.models import adapted_swiglu as module
from lobra_jax.models import adapted_swiglu_kernel as kernel
from lobra_jax.models.adapted_swiglu import adapted_swiglu

NUM_TASKS = 3
SHAPES = {
    "whole blocks": (2, 64, 128, 1, 16),
    "a block begun, a low rank": (1, 200, 192, 1, 4),
    "shorter than a block": (3, 24, 64, 1, 16),
    "more tiles than parts": (1, 64, 640, 1, 16),
    "slots": (2, 130, 128, 3, 16),
    "a rank that is no power of two": (1, 70, 64, 1, 40),
}
"""Rows, tokens, features, slots, rank."""


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def given(rows, length, num_features, num_slots, rank, *, dtype=jnp.float32):
    """Activations, values of the ranks that are zero but in a token's own slot, factors, task ids."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    own = np.eye(num_slots, dtype=np.float32)[rng.integers(0, num_slots, (rows, length))][..., None]
    activations = [normal(rows, length, num_features).astype(dtype) for _ in range(2)]
    values = [(normal(rows, length, num_slots, rank, scale=0.5) * own).astype(dtype) for _ in range(2)]
    factors = [normal(NUM_TASKS, rank, num_features, scale=0.2) for _ in range(3)]
    ids = jnp.asarray(rng.integers(0, NUM_TASKS, (rows, num_slots)), jnp.int32)
    return *activations, *values, *factors, ids


def cotangents(arrays):
    rng = np.random.default_rng(1)
    gate, h_gate = arrays[0], arrays[2]
    own = np.asarray(h_gate, np.float32).any(axis=-1, keepdims=True)
    d_act = jnp.asarray(rng.normal(size=gate.shape), gate.dtype)
    return d_act, jnp.asarray(rng.normal(size=h_gate.shape) * own, jnp.float32)


def with_gradients(arrays, *, shared):
    @jax.jit  # a new function each time: what it calls may be replaced
    def run(arrays, d_out):
        *inputs, ids = arrays
        out, vjp = jax.vjp(lambda *inputs: adapted_swiglu(*inputs, ids, shared), *inputs)
        return *out, *vjp(d_out)

    return run(arrays, cotangents(arrays))


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernels, interpreted, in place of plain JAX."""
    monkeypatch.setattr(module, "_forward", functools.partial(kernel.forward, interpret=True))
    monkeypatch.setattr(module, "_backward", functools.partial(kernel.backward, interpret=True))


@pytest.mark.parametrize("shape", [SHAPES["whole blocks"], SHAPES["slots"]], ids=["one slot", "slots"])
def test_gradients_are_those_of_what_it_says(shape):
    def written_out(gate, up, h_gate, h_up, b_gate, b_up, a_down):
        own = functools.partial(jnp.einsum, "blkr,bkrf->blf")
        act = jax.nn.silu(gate + own(h_gate, b_gate[ids])) * (up + own(h_up, b_up[ids]))
        return act, jnp.einsum("blf,bkrf->blkr", act, a_down[ids])

    arrays = given(*shape)
    *inputs, ids = arrays
    out, vjp = jax.vjp(written_out, *inputs)
    expected = *out, *vjp(cotangents(arrays))
    for ours, theirs in zip(with_gradients(arrays, shared=False), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernels_do_what_plain_jax_does(shape, request):
    arrays = given(*shape)
    expected = with_gradients(arrays, shared=True)
    request.getfixturevalue("by_kernel")
    for ours, theirs in zip(with_gradients(arrays, shared=True), expected, strict=True):
        assert distance(ours, theirs) < 1e-6


def test_the_kernels_in_bf16_are_off_by_its_rounding(request):
    shape = SHAPES["a block begun, a low rank"]
    arrays = given(*shape, dtype=jnp.bfloat16)
    expected = with_gradients([x.astype(jnp.float32) for x in arrays[:-1]] + [arrays[-1]], shared=False)
    request.getfixturevalue("by_kernel")
    found = with_gradients(arrays, shared=False)
    assert [x.dtype for x in found[4:6]] == [jnp.bfloat16, jnp.bfloat16]
    assert all(x.dtype == jnp.float32 for x in (found[1], *found[6:]))
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 8e-3


def test_a_row_s_tokens_are_shared_by_programs_where_rows_are_few(monkeypatch, request):
    """The parts of their sums add up to the same."""
    arrays = given(1, 300, 64, 1, 16)
    request.getfixturevalue("by_kernel")
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    expected = with_gradients(arrays, shared=False)
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    for ours, theirs in zip(with_gradients(arrays, shared=False), expected, strict=True):
        assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_what_is_not_finite_stays_in_its_slot(kernels, request):
    """A gradient of one task's token that is infinite reaches no sum of the other's."""
    arrays = given(1, 64, 64, 2, 16)
    *inputs, _ = arrays
    inputs[2:4] = [h.at[:, :32, 1].set(0.0).at[:, 32:, 0].set(0.0) for h in inputs[2:4]]
    ids = jnp.asarray([[0, 2]], jnp.int32)
    d_act, d_h_down = cotangents((*inputs, ids))
    d_h_down = d_h_down.at[:, :32, 1].set(0.0).at[:, 32:, 0].set(0.0)
    if kernels:
        request.getfixturevalue("by_kernel")
    _, vjp = jax.vjp(lambda *inputs: adapted_swiglu(*inputs, ids, True), *inputs)
    found = vjp((d_act.at[:, 5].set(jnp.inf), d_h_down))
    expected = vjp((d_act, d_h_down))
    assert not np.isfinite(found[2][:, 5]).all()
    for ours, theirs in zip(found[4:], expected[4:], strict=True):
        np.testing.assert_array_equal(ours[2], theirs[2])


def test_only_what_has_tiles_goes_to_the_kernels():
    assert kernel.has_tiles(11008, 16, jnp.dtype(jnp.bfloat16))
    assert not kernel.has_tiles(11008, 16, jnp.dtype(jnp.float32))
    assert not kernel.has_tiles(11000, 16, jnp.dtype(jnp.bfloat16))
    assert not kernel.has_tiles(11008, 33, jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize(("capability", "has"), [("9.0", True), ("8.0", True), ("8.9", False)])
def test_only_gpus_with_room_in_shared_memory_have_tiles(capability, has, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert kernel.has_tiles(11008, 16, jnp.dtype(jnp.bfloat16)) == has
