"""Rematerialisation: what each policy keeps for the backward, and that none of them changes a number."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from lobra_jax.lora import TaskInputs
from lobra_jax.mesh import make_submesh
from lobra_jax.models import attention, llama
from lobra_jax.models import remat as remat_module
from lobra_jax.models.config import TARGETS as ALL_TARGETS
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import RandomWeights
from lobra_jax.stage import BatchInputs, Residuals, StageFunctions, StageLayout, stage_layout
from planner.plan import REMATS, ParallelConfig

MODEL = LlamaConfig(
    name="remat",
    vocab_size=64,
    hidden_size=128,
    intermediate_size=192,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
)
LAYERS = 2
"""Of the first of two stages."""
ROWS, LENGTH = 2, 128
RANK, TARGETS = 4, ("q", "o", "up")


def layout_of(
    remat: str, layers: range, dtype, *, model: LlamaConfig = MODEL, tp: int = 1, targets: tuple[str, ...] = TARGETS
) -> StageLayout:
    submesh = make_submesh(ParallelConfig(tp=tp, pp=1, remat=remat), jax.devices()[:tp])
    functions = StageFunctions(
        abstract=llama.abstract_stage(model, layers, dtype),
        sharding=submesh.stages[0],
        remat=remat,
        dropout=False,
        dora=False,
        num_tasks=2,
    )
    return stage_layout(functions, RANK, targets)


def arguments(layout: StageLayout) -> tuple:
    """Parameters, adapters, tasks, token ids and batch of a whole model."""
    rng = np.random.default_rng(0)
    weights = RandomWeights(MODEL, 0)
    params = {
        name: jnp.asarray(weights.read(name, tuple(slice(n) for n in spec.shape)))
        for name, spec in layout.params.items()
    }
    adapters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), layout.adapters)
    tasks = TaskInputs(scales=jnp.ones(2), dropout_rates=jnp.zeros(2))
    tokens, targets = rng.integers(0, MODEL.vocab_size, (2, ROWS, LENGTH), dtype=np.int32)
    batch = BatchInputs(
        task_ids=jnp.arange(ROWS, dtype=jnp.int32),
        dropout_ids=jnp.zeros(ROWS, jnp.uint32),
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(targets),
        loss_weights=jnp.full((ROWS, LENGTH), 1 / LENGTH),
    )
    return params, adapters, tasks, batch.tokens, batch


def gradients(remat: str, targets: tuple[str, ...] = TARGETS):
    layout = layout_of(remat, range(MODEL.num_layers), jnp.float32, targets=targets)
    given = arguments(layout)
    zeros = jax.tree.map(jnp.zeros_like, given[1])
    return jax.jit(layout.functions.fused)(zeros, *given)


@pytest.fixture(scope="module")
def unremat():
    return gradients("none")


@pytest.mark.parametrize("remat", [remat for remat in REMATS if remat != "none"])
def test_no_policy_changes_a_loss_or_a_gradient(world, unremat, monkeypatch, remat):
    """Nor does a feed-forward in chunks, where a policy has it."""
    monkeypatch.setattr(remat_module, "MLP_CHUNK_TOKENS", ROWS * LENGTH // 4)
    found, _, losses = gradients(remat)
    np.testing.assert_allclose(losses, unremat[2], rtol=1e-5)
    assert world.difference(found, unremat[0]) < 1e-5


@pytest.fixture(scope="module")
def all_adapted():
    return gradients("none", ALL_TARGETS)


@pytest.mark.parametrize("remat", REMATS)
def test_the_form_for_a_gpus_kernels_changes_no_loss_and_no_gradient(world, all_adapted, monkeypatch, remat):
    """What adapters do between gate, up and down as one function, here of plain JAX; in chunks too."""
    monkeypatch.setattr(remat_module, "MLP_CHUNK_TOKENS", ROWS * LENGTH // 4)
    monkeypatch.setattr(llama, "has_kernels", lambda *_: True)
    found, _, losses = gradients(remat, ALL_TARGETS)
    np.testing.assert_allclose(losses, all_adapted[2], rtol=1e-5)
    assert world.difference(found, all_adapted[0]) < 1e-5


def test_only_plain_low_rank_adapters_of_all_three_linears_have_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(llama, "has_kernels", lambda *given: asked.append(given) is None)
    for targets in (ALL_TARGETS, ("q", "gate", "up")):
        kept_by(layout_of("none", range(1), jnp.float32, targets=targets))
    assert asked == [(MODEL.intermediate_size, RANK, jnp.float32)]


def kept_by(layout: StageLayout) -> list[jax.ShapeDtypeStruct]:
    """What a first stage's forward hands to its backward."""
    batch = layout.batch(ROWS, LENGTH)
    forward = functools.partial(layout.functions.forward, Residuals())
    _, kept, _ = jax.eval_shape(forward, layout.params, layout.adapters, layout.tasks, batch.tokens, batch)
    return kept


def kept_bytes(remat: str, dtype) -> float:
    """For a token and layer."""
    kept = kept_by(layout_of(remat, range(LAYERS), dtype))
    of_tokens = [leaf for leaf in kept if leaf.size >= ROWS * LENGTH and leaf.shape[0] == ROWS]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in of_tokens) / (ROWS * LENGTH * LAYERS)


@pytest.fixture
def flash(monkeypatch):
    """Programs are traced as for a GPU; nothing is run."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_, **__: True)
    monkeypatch.setattr(attention, "has_flash_kernel", lambda q: True)


def test_each_policy_keeps_what_it_says(flash):
    """Of a layer and token: its input, what the flash kernel's backward needs, and what the policy names."""
    hidden, kv, mlp = MODEL.hidden_size, MODEL.num_kv_heads * MODEL.head_dim, MODEL.intermediate_size
    flash_out, low_rank = 2 * hidden + 4 * MODEL.num_heads, 2 * RANK * len(TARGETS)
    assert kept_bytes("full", jnp.bfloat16) == 2 * hidden
    assert kept_bytes("attention", jnp.bfloat16) == 2 * 2 * hidden + flash_out + low_rank
    assert kept_bytes("dots", jnp.bfloat16) == 2 * (3 * hidden + 2 * kv + 2 * mlp) + flash_out + low_rank
    norms = 2 * 2 * hidden  # their outputs; what is inside norms and SwiGLU is made anew under any policy
    assert 0 <= kept_bytes("none", jnp.bfloat16) - kept_bytes("dots", jnp.bfloat16) - norms <= 2 * hidden


@pytest.mark.parametrize(("remat", "calls"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_the_flash_kernel_is_run_again_by_full_alone(flash, remat, calls):
    layout = layout_of(remat, range(MODEL.num_layers), jnp.bfloat16)
    batch = layout.batch(ROWS, LENGTH)
    jaxpr = jax.make_jaxpr(layout.functions.fused)(
        layout.adapters, layout.params, layout.adapters, layout.tasks, batch.tokens, batch
    )
    assert count(jaxpr.jaxpr, attention.FLASH_FORWARD) == calls * MODEL.num_layers


def count(jaxpr, name: str) -> int:
    """Equations of a primitive in a program, those inside others included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("remat", REMATS)
def test_layers_take_turns_in_the_backward_on_several_devices_where_memory_is_spared(remat):
    """A barrier for each layer, of its input's gradient and of every adapter's: XLA drops what is not used after it."""
    model = dataclasses.replace(MODEL, num_kv_heads=2)

    def barriers(tp: int) -> list[set[int]]:
        """Which results of each barrier are used."""
        layout = layout_of(remat, range(model.num_layers), jnp.float32, model=model, tp=tp)
        batch = layout.batch(ROWS, LENGTH)
        given = (layout.adapters, layout.params, layout.adapters, layout.tasks, batch.tokens, batch)
        text = jax.jit(layout.functions.fused).lower(*given).as_text()
        used = []
        for function in text.split("func.func"):
            for name, number in re.findall(r"(%\w+):(\d+) = stablehlo.optimization_barrier", function):
                if int(number) == 1 + len(jax.tree.leaves(layout.adapters["0"])):
                    used.append({int(result) for result in re.findall(rf"{name}#(\d+)", function)})
        return used

    assert barriers(1) == []
    found = barriers(2)
    assert len(found) == (model.num_layers if remat in ("attention", "full") else 0)
    every = set(range(1 + len(jax.tree.leaves(layout_of(remat, range(1), jnp.float32).adapters["0"]))))
    assert all(used >= every - {0} for used in found)
    # Nothing needs the gradient of the first layer's input.
    assert sum(used == every for used in found) == max(len(found) - 1, 0)
