"""What tests of `lobra train` share: a folder to train from, and a finished run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lobra_jax.cli import main
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import save_hf
from lobra_jax.models.weights import RandomWeights
from lobra_jax.peft_folder import read_peft_adapter
from lobra_jax.train import Trainer
from planner.config_cost import ConfigCost, PackedCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan, ReplicaGroup

MODEL = LlamaConfig(
    name="base",
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
)
STEPS = 6
CONFIGS = [(1, 1, "none", 128), (1, 2, "none", 128), (2, 1, "full", 128), (1, 1, "full", 128)]


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with base, tokenizer, two tasks' data, config, cost table and three plans; and what tests do with it."""

    folder: Path
    model: LlamaConfig = MODEL
    num_steps: int = STEPS

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @staticmethod
    def lobra(*arguments: object):
        return CliRunner().invoke(main, [str(a) for a in arguments])

    def train(self, out: Path, *arguments: object, plan: str = "one"):
        return self.lobra(
            "train", "--config", self / "config.yaml", "--plan", self / f"{plan}.yaml", "--out", out, *arguments
        )

    def write_plan(self, folder: Path, **changes: object) -> Path:
        raw = yaml.safe_load((self / "one.yaml").read_text()) | changes
        (folder / "plan.yaml").write_text(yaml.safe_dump(raw))
        return folder / "plan.yaml"

    @staticmethod
    def adapter(run: Path, task: str) -> dict[str, np.ndarray]:
        _, layers = read_peft_adapter(run / "adapters" / task)
        return {
            f"{layer}.{target}.{factor}": array
            for layer, targets in layers.items()
            for target, pair in targets.items()
            for factor, array in pair.items()
        }

    @staticmethod
    def kill_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        """Interrupts a run where it would issue step `last`."""
        issue = Trainer._issue

        def killed(self, step, feeder):
            if step == last:
                raise KeyboardInterrupt
            return issue(self, step, feeder)

        monkeypatch.setattr(Trainer, "_issue", killed)

    @staticmethod
    def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
        """|found - expected| / |expected| over a whole adapter."""
        assert found.keys() == expected.keys()
        squares = [(np.sum((found[k] - expected[k]) ** 2), np.sum(expected[k] ** 2)) for k in expected]
        above, below = np.sum(squares, axis=0, dtype=np.float64)
        return float(np.sqrt(above / below))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with base, tokenizer, two tasks' data, config, cost table and two plans."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    words = [f"w{i:02d}" for i in range(40)]

    def text(count):
        return " ".join(rng.choice(words, count))

    short = [{"prompt": text(3) + " ", "completion": text(int(rng.integers(2, 5)))} for _ in range(30)]
    long = [{"text": text(int(rng.integers(8, 16)))} for _ in range(30)]
    for name, records in (("short", short), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    save_hf(folder / "base", MODEL, RandomWeights(MODEL, 0))
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    config = {
        "model": {"path": "base", "dtype": "float32"},
        "data": {"cache_dir": "cache"},
        "devices": {"simulated": 8},
        "planner": {"costs": "costs.json"},
        "training": {"checkpoint_interval": 2, "eval_batch_size": 8},
        # Epsilons above rounding noise: Adam moves an element whose gradient is noise by noise / (noise + epsilon).
        "tasks": [
            {"name": "short", "files": ["short.jsonl"], "batch_size": 5, "steps": STEPS, "rank": 2, "alpha": 4,
             "lr": 3e-3, "dropout": 0.1, "eval_fraction": 0.2, "eval_interval": 4, "epsilon": 1e-5},
            {"name": "long", "files": ["long.jsonl"], "batch_size": 3, "steps": STEPS - 1, "rank": 4, "alpha": 8,
             "targets": ["q", "v", "up"], "lr": 2e-3, "epsilon": 1e-5, "dora": True, "ema_decay": 0.5},
        ],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    costs = tuple(
        ConfigCost(
            config=ParallelConfig(tp=tp, pp=pp, remat=remat),
            capacity_tokens=capacity,
            coefficients=(0.0, 0.0, 1e-5 / tp, 0.0, 0.0, 1e-3),
            packed=PackedCost(capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-5 / tp, 1e-3)),
        )
        for tp, pp, remat, capacity in CONFIGS
    )
    CostTable(model="base", model_fingerprint=MODEL.fingerprint, hardware={"num_devices": 8}, configs=costs).save(
        folder / "costs.json"
    )
    for name, chosen in (("one", [0]), ("many", [0, 1, 2])):
        groups = tuple(
            ReplicaGroup(count=1, config=costs[i].config, capacity_tokens=costs[i].capacity_tokens) for i in chosen
        )
        Plan(model="base", num_devices=8, replicas=groups, buckets=(64,)).save(folder / f"{name}.yaml")
    mixed = ParallelConfig(tp=1, pp=1, remat="none+full")
    group = ReplicaGroup(count=2, config=mixed, capacity_tokens=64, smaller_capacities=(16,))
    Plan(model="base", num_devices=8, replicas=(group,), buckets=(16, 64)).save(folder / "mixed.yaml")
    return World(folder)


@pytest.fixture(scope="session")
def finished(world):
    """An uninterrupted joint run on three unlike replicas."""
    out = world / "finished"
    result = world.train(out, plan="many")
    assert result.exit_code == 0, result.output
    return out
