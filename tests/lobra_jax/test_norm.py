"""RMSNorm with its residual: the plain formula's gradient, and its kernel's against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.mesh import one_stage
from lobra_jax.models import norm

EPS = 1e-3


def check(tp: int, length: int, features: int) -> None:
    """Values and gradients, over tp devices, against differentiating the formula."""
    rng = np.random.default_rng(0)
    x, d_norm, d_residual = (jnp.asarray(rng.normal(size=(2, length, features)), jnp.float32) for _ in range(3))
    scale = jnp.asarray(rng.normal(size=features), jnp.float32)

    @jax.jit
    def found(x, *cotangents):
        out, vjp = jax.vjp(lambda x: norm.norm_and_residual(x, scale, EPS, one_stage(jax.devices()[:tp])), x)
        return out, vjp(cotangents)

    out, vjp = jax.vjp(lambda x: (norm.rms_norm(x, scale, EPS), x), x)
    expected = out, vjp((d_norm, d_residual))
    for one, other in zip(jax.tree.leaves(found(x, d_norm, d_residual)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_it_is_the_plain_formula():
    check(1, 6, 48)


@pytest.mark.parametrize(("tp", "length", "rows"), [(1, 6, 12), (2, 6, 6), (2, 7, 14)])
@pytest.mark.parametrize("features", [32, 48])
def test_its_kernel_is_the_plain_formula(monkeypatch, tp, length, rows, features):
    """Also where a device has some positions only, and where the positions do not divide."""
    seen = []

    def interpreted(x, *given, eps):
        seen.append(x.shape[0] * x.shape[1])
        return kernel(x, *given, eps=eps, interpret=True)

    kernel = norm.gradient
    monkeypatch.setattr(norm, "has_kernel", lambda _: True)
    monkeypatch.setattr(norm, "gradient", interpreted)
    check(tp, length, features)
    assert seen == [rows]


def test_only_the_input_is_kept_for_the_backward():
    x = jnp.ones((2, 6, 48))
    _, vjp = jax.vjp(lambda x: norm.norm_and_residual(x, jnp.ones(48), EPS, one_stage(jax.devices()[:1])), x)
    assert [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.ndim == 3] == [x.shape]


def test_rows_too_wide_or_in_fp32_have_no_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert norm.has_kernel(jax.ShapeDtypeStruct((2, 48, 5120), jnp.bfloat16))
    assert not norm.has_kernel(jax.ShapeDtypeStruct((2, 48, 5120), jnp.float32))
    assert not norm.has_kernel(jax.ShapeDtypeStruct((2, 48, 2 * norm.WIDEST), jnp.bfloat16))
    assert not norm.has_kernel(jax.ShapeDtypeStruct((2**9, 2**11, 2**11), jnp.bfloat16))
