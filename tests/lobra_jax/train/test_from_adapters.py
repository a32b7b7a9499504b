"""Training that goes on from a PEFT adapter."""

from __future__ import annotations

import pytest
import yaml

from lobra_jax.peft_folder import read_peft_adapter, write_peft_adapter


def go_on(world, out, given, *changes, task="long"):
    """Trains `task` alone from an adapter, at a rate so small that nothing moves."""
    stated = [part for change in changes for part in ("--set", change)]
    start = ["--set", f"tasks.{task}.adapter={given}", "--set", f"tasks.{task}.lr=1e-12"]
    return world.train(out, "--tasks", task, *start, *stated)


def test_training_goes_on_from_a_peft_adapter(world, finished, tmp_path):
    given = finished / "adapters" / "long"
    done = go_on(world, tmp_path / "on", given)
    assert done.exit_code == 0, done.output
    assert world.difference(world.adapter(tmp_path / "on", "long"), world.adapter(finished, "long")) < 1e-6
    fresh = world.train(tmp_path / "fresh", "--tasks", "long", "--set", "tasks.long.lr=1e-12")
    assert fresh.exit_code == 0, fresh.output
    assert world.difference(world.adapter(tmp_path / "fresh", "long"), world.adapter(finished, "long")) > 0.01


def test_rank_alpha_and_targets_are_taken_from_the_adapter(world, finished):
    from lobra_jax.config import load_config

    given = finished / "adapters" / "long"
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw["tasks"] = [{k: v for k, v in raw["tasks"][1].items() if k not in ("rank", "alpha", "targets")}]
    (world / "from_adapter.yaml").write_text(yaml.safe_dump(raw))
    (task,) = load_config(world / "from_adapter.yaml", [f"tasks.long.adapter={given}"]).tasks
    assert (task.rank, task.alpha, task.rslora, task.targets) == (4, 8.0, False, ("q", "v", "up"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("tasks.long.rank=8", "tasks.long: rank = 8 beside an adapter of another; expected 4 as in "),
        ("tasks.long.targets=[q]", "tasks.long: targets = ('q',) beside an adapter of another"),
        ("tasks.long.alpha=1", "tasks.long: alpha = 1.0 beside an adapter of another; expected 8"),
        ("tasks.long.adapter=nowhere", "cannot read the adapter's config: No such file"),
    ],
)
def test_an_adapter_unlike_the_config_is_refused(world, finished, tmp_path, change, complaint):
    done = go_on(world, tmp_path / "out", finished / "adapters" / "long", change)
    assert done.exit_code == 2
    assert complaint in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(world, finished, tmp_path):
    spec, layers = read_peft_adapter(finished / "adapters" / "long")
    write_peft_adapter(tmp_path / "shallow", spec, {"0": layers["0"]}, "base")
    done = go_on(world, tmp_path / "out", tmp_path / "shallow")
    assert "an adapter of other layers than the model's (got '1 layers'); expected 2 of base" in done.output
    narrow = {layer: {t: {**p, "a": p["a"][1:]} for t, p in pairs.items()} for layer, pairs in layers.items()}
    write_peft_adapter(tmp_path / "narrow", spec, narrow, "base")
    done = go_on(world, tmp_path / "out", tmp_path / "narrow")
    assert "_proj has the wrong shape (got (15, " in done.output
