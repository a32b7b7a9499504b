"""`lobra bench peers`: the same step with Hugging Face transformers and PEFT, on the device present, for comparison.

One adapter over a frozen Llama of the same shape with random weights: forward, backward, AdamW on the adapter. With
Liger's kernels as well where `liger_kernel` is installed. It runs PyTorch alone, so that no memory is held beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax.models.config import PRESETS, TARGETS, LlamaConfig
from planner.errors import UserError
from planner.files import check_out, write_json
from profiling.bench.ceiling import floor_flops
from profiling.bench.options import command_line, parse_shapes
from profiling.bench.provenance import provenance

if TYPE_CHECKING:
    import torch

STACKS = ("peft", "peft+liger")
NUM_WARM_UPS = 2
LEARNING_RATE = 1e-4
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to run the step: which kernels, and whether layers are recomputed in the backward."""

    stack: str
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.stack}, checkpointing {'on' if self.checkpointing else 'off'}"


@click.command(epilog="\b\nExample:\n  lobra bench peers --model llama2-7b --shapes 8x2048 --out peers.json")
@click.option("--model", "preset", type=click.Choice(list(PRESETS)), default="llama2-7b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the preset has.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--shapes", default="8x2048", show_default=True, metavar="RxL,...", help="Micro-batches, ROWSxLENGTH.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapter.")
@click.option("--checkpointing", type=click.Choice(["on", "off", "both"]), default="both", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Timed steps.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(out: Path | None, **options: Any) -> None:
    """Time the same step with transformers and PEFT, and with Liger's kernels where they are installed."""
    shapes = parse_shapes("--shapes", options["shapes"])
    check_out(out)
    missing = [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed", expected='pip install "lobra-jax[parity]"')
    import torch

    model = PRESETS[options["preset"]]
    model = dataclasses.replace(model, num_layers=options["layers"] or model.num_layers)
    on_gpu = torch.cuda.is_available()
    with_liger = on_gpu and find_spec("liger_kernel") is not None
    choices = {"on": (True,), "off": (False,), "both": (True, False)}[options["checkpointing"]]
    libraries = ["torch", "transformers", "peft", *(["liger_kernel"] if with_liger else [])]
    record = {
        "what": "forward, backward and AdamW of one adapter on all seven linears; medians over steps",
        "command": command_line("lobra bench peers", {"model": options["preset"], **options, "preset": None}),
        **provenance(libraries),
        "devices": f"1 x {torch.cuda.get_device_name() if on_gpu else 'cpu'}",
        "rows": [],
    }
    for stack, checkpointing in itertools.product(STACKS if with_liger else STACKS[:1], choices):
        peer = Peer(stack=stack, checkpointing=checkpointing)
        for row in _rows(peer, model, shapes, options):
            record["rows"].append(row)
            click.echo(_line(row))
            if out is not None:
                write_json(out, record)


def _rows(peer: Peer, model: LlamaConfig, shapes: list[tuple[int, int]], options: dict[str, Any]) -> Iterator[dict]:
    import torch

    network, optimizer = _network(peer, model, options["dtype"], options["rank"])
    for rows, length in shapes:
        row = {"peer": str(peer), "model": model.name, "num_layers": model.num_layers, "rows": rows, "length": length}
        try:
            times, loss, peak = _steps(network, optimizer, (rows, length), model.vocab_size, options["steps"])
        except torch.OutOfMemoryError as error:
            yield {**row, "out_of_memory": str(error).splitlines()[0]}
            continue
        step_s = statistics.median(times)
        flops = floor_flops(model, rows, length)
        yield {
            **row,
            "step_s": step_s,
            "all_step_s": times,
            "tokens_per_s_per_device": rows * length / step_s,
            "floor_flop_rate": flops / step_s,
            "peak_bytes": peak,
            "loss": loss,
        }
    del network, optimizer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _network(peer: Peer, model: LlamaConfig, dtype: str, rank: int) -> tuple[Any, torch.optim.Optimizer]:
    """(The model with its adapter on the device, the adapter's AdamW.)"""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        attention_bias=model.qkv_bias,
        tie_word_embeddings=model.tie_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        use_cache=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader: Any = transformers.AutoModelForCausalLM
    if peer.stack == "peft+liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
    torch.manual_seed(0)
    with torch.device(device):
        network = loader.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[f"{t}_proj" for t in TARGETS], lora_dropout=0.0)
    network = peft.get_peft_model(network, lora, autocast_adapter_dtype=False)
    if peer.checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        network.enable_input_require_grads()
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    return network, torch.optim.AdamW(trained, lr=LEARNING_RATE)


def _steps(
    network: Any, optimizer: torch.optim.Optimizer, shape: tuple[int, int], vocab_size: int, steps: int
) -> tuple[list[float], float, int | None]:
    """(Seconds of each timed step, the last loss, peak bytes on a GPU.)"""
    import torch

    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, shape, generator=generator).to(device)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else contextlib.nullcontext
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(NUM_WARM_UPS + steps):
        wait()
        start = time.perf_counter()
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - start)
    return times[NUM_WARM_UPS:], loss.item(), torch.cuda.max_memory_allocated() if on_gpu else None


def _line(row: dict[str, Any]) -> str:
    case = f"{row['peer']}, {row['rows']}x{row['length']}"
    if "out_of_memory" in row:
        return f"{case}: {row['out_of_memory']}"
    peak = "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.1f} GiB"
    return (
        f"{case}: step {row['step_s'] * 1e3:.1f} ms, {row['tokens_per_s_per_device']:,.0f} tokens/s, "
        f"{row['floor_flop_rate'] / 1e12:.0f} TFLOP/s, peak {peak}"
    )


if __name__ == "__main__":
    main()
