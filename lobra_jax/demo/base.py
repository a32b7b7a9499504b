"""Pre-trains the demo's small Llama base on generic standard-library text: all parameters, AdamW, fp32.

python -m lobra_jax.demo.base --corpus OUT/data/base.jsonl --tokenizer OUT/tokenizer.json --out OUT/base
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from lobra_jax.config import DevicesConfig
from lobra_jax.demo.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE
from lobra_jax.devices import configure
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import save_hf
from lobra_jax.models.llama import AbstractStage, abstract_stage
from lobra_jax.models.weights import EMBEDDING_STD, ArrayWeights, RandomWeights, whole
from lobra_jax.sharding import UNSHARDED

BASE = LlamaConfig(
    name="demo-base",
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=352,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    rope_theta=100_000.0,
)
"""0.9 million parameters. Two layers, as a demo spends most of its time compiling; heads divide by tp up to 4."""

PHASES = ((0.94, 8, 128), (0.06, 2, 768))
"""(share of the steps, rows, length): short windows first, as they train fastest; the last see far positions."""

NUM_SHARDS = 2
"""Devices that a batch's rows are split over: XLA runs so small a model on one core a device."""

DEFAULT_STEPS = 400
PEAK_LR = 4e-3
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
EMBED_STD = 0.5
"""Of the initial embedding: AdamW's few hundred steps would be spent on growing a smaller one."""

MAX_POSITIONS = 8192
CONFIG_JSON = {
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "max_position_embeddings": MAX_POSITIONS,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "model_max_length": MAX_POSITIONS,
}
"""What a model folder says beside shapes and weights."""

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Result of `pretrain`: fp32 weights by flat name and what it took."""

    params: dict[str, np.ndarray]
    num_steps: int
    num_tokens: int
    loss: float
    seconds: float


def pretrain(
    config: LlamaConfig,
    tokens: np.ndarray,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Pretrained:
    """Next-token training on windows of one token stream [n].

    The learning rate warms up and falls to zero over `steps`. `loss` is the mean of the last tenth of the steps, nats a
    token.
    """
    started = time.perf_counter()
    stage = abstract_stage(config, range(config.num_layers), jnp.float32)
    rng = np.random.default_rng(seed)
    initial = RandomWeights(config, seed)
    params = {name: jnp.asarray(initial.read(name, whole(weight.shape))) for name, weight in stage.weights.items()}
    params["embed"] *= EMBED_STD / EMBEDDING_STD
    mesh = Mesh(np.asarray(jax.devices()[:NUM_SHARDS]), "batch", axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    by_row = NamedSharding(mesh, PartitionSpec("batch"))
    optimiser = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(WEIGHT_DECAY)
    )
    state = optimiser.init(params)
    update = jax.jit(functools.partial(_update, stage, optimiser), donate_argnums=(0, 1))
    losses: list[jax.Array] = []
    num_tokens = 0
    for step, (rows, length) in enumerate(window_shapes(steps)):
        progress = step / steps
        starts = rng.integers(0, len(tokens) - length - 1, rows)
        batch = tokens[starts[:, None] + np.arange(length + 1)]
        params, state, loss = update(params, state, jax.device_put(batch, by_row), np.float32(learning_rate(progress)))
        losses.append(loss)
        num_tokens += rows * length
        if on_step is not None:
            on_step(step, float(loss))
    tail = losses[-max(1, len(losses) // 10) :]
    return Pretrained(
        params={name: np.asarray(value) for name, value in params.items()},
        num_steps=len(losses),
        num_tokens=num_tokens,
        loss=float(np.mean([float(loss) for loss in tail])),
        seconds=time.perf_counter() - started,
    )


def window_shapes(steps: int) -> Iterator[tuple[int, int]]:
    """(rows, length) of each step."""
    ends = np.cumsum([share for share, _, _ in PHASES]) * steps
    for step in range(steps):
        _, rows, length = PHASES[min(int(np.searchsorted(ends, step, side="right")), len(PHASES) - 1)]
        yield rows, length


def learning_rate(progress: float) -> float:
    """Linear warm-up, then cosine to zero; `progress` in [0, 1)."""
    if progress < WARMUP_SHARE:
        return PEAK_LR * (progress + 0.1 * WARMUP_SHARE) / (1.1 * WARMUP_SHARE)
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


def mean_loss(stage: AbstractStage, params: Mapping[str, jax.Array], batch: jax.Array) -> jax.Array:
    """Mean next-token loss of windows [rows, length + 1], nats."""
    model = stage.merge(params)
    hidden = model(batch[:, :-1], {}, None, remat="none", shard=UNSHARDED)
    logits = jnp.einsum("bld,dv->blv", hidden, model.unembedding)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def _update(
    stage: AbstractStage,
    optimiser: optax.GradientTransformation,
    params: Params,
    state: Any,
    batch: jax.Array,
    lr: jax.Array,
) -> tuple[Params, Any, jax.Array]:
    loss, grads = jax.value_and_grad(functools.partial(mean_loss, stage))(params, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the integer power of its step count
        direction, state = optimiser.update(grads, state, params)
    return jax.tree.map(lambda p, d: p - lr * d, params, direction), state, loss


def token_stream(corpus: str | Path, tokenizer: str | Path) -> np.ndarray:
    """All texts of a JSONL file of {"text"} as one int32 stream, each between `BOS` and `EOS`."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    with Path(corpus).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    bos, eos = encoder.token_to_id(BOS), encoder.token_to_id(EOS)
    stream = [[bos, *encoding.ids, eos] for encoding in encoder.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate([np.asarray(ids, np.int32) for ids in stream])


def write_base(
    corpus: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    steps: int = DEFAULT_STEPS,
    on_step: Callable[[int, float], None] | None = None,
) -> Pretrained:
    """Pre-trains `BASE` and writes the folder OUT as `transformers` loads it: config, weights, tokenizer."""
    tokens = token_stream(corpus, tokenizer)
    result = pretrain(BASE, tokens, steps=steps, on_step=on_step)
    save_hf(out, BASE, ArrayWeights(result.params), extra=CONFIG_JSON)
    shutil.copyfile(tokenizer, Path(out) / "tokenizer.json")
    settings = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    (Path(out) / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return result


@click.command()
@click.option("--corpus", required=True, type=click.Path(exists=True, dir_okay=False), help="JSONL file of texts.")
@click.option("--tokenizer", required=True, type=click.Path(exists=True, dir_okay=False), help="tokenizer.json.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the model.")
@click.option("--steps", default=DEFAULT_STEPS, show_default=True, type=click.IntRange(min=1))
def main(corpus: str, tokenizer: str, out: str, steps: int) -> None:
    """Pre-trains the demo's small Llama base and writes it as a Hugging Face folder."""
    configure(DevicesConfig(simulated=NUM_SHARDS), cache_dir=Path(out).parent / "cache")
    with tqdm(total=steps, unit="step", disable=None) as bar:

        def show(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

        result = write_base(corpus, tokenizer, out, steps=steps, on_step=show)
    spent = f"{result.num_steps} steps, {result.num_tokens:,} tokens, {result.seconds:.0f} s"
    click.echo(f"{spent}, loss {result.loss:.3f} -> {out}")


if __name__ == "__main__":
    main()
