import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from lobra_jax.cli import main
from lobra_jax.config import RunConfig, load_config, save_config
from lobra_jax.export import MergedWeights, new_folder
from lobra_jax.lora import LoraSpec, init_adapters, task_adapter
from lobra_jax.models.config import PRESETS, LlamaConfig
from lobra_jax.models.hf import HFWeights, save_hf
from lobra_jax.models.hf_config import load_llama_config
from lobra_jax.models.weights import RandomWeights, weight_shapes, whole
from lobra_jax.peft_folder import check_fits, read_peft_adapter, write_peft_adapter
from planner.errors import UserError

CONFIG = LlamaConfig(
    name="base",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
SPECS = {
    "answers": LoraSpec(rank=3, alpha=6.0, targets=("q", "v", "down"), dropout=0.1),
    "summaries": LoraSpec(rank=8, alpha=4.0, rslora=True),
    "titles": LoraSpec(rank=2, alpha=3.0, targets=("k", "up"), dora=True),
}


def make_adapters(config: LlamaConfig, specs: dict[str, LoraSpec]) -> dict[str, Any]:
    """Each task's own arrays, with b filled in: an untrained one is zero and would hide a wrong layout."""
    stacked = init_adapters(config, list(specs.values()), seeds=list(range(len(specs))))
    rng = np.random.default_rng(0)
    for targets in stacked.values():
        for pair in targets.values():
            pair["b"] = rng.standard_normal(pair["b"].shape, np.float32) * pair["a"].any(axis=2)[:, :, None]
            if "m" in pair:
                pair["m"] = rng.uniform(1, 2, pair["m"].shape).astype(np.float32)
    return {name: task_adapter(stacked, index, spec) for index, (name, spec) in enumerate(specs.items())}


def assert_same_adapter(actual: Any, expected: Any) -> None:
    assert list(actual) == list(expected)
    for layer, targets in expected.items():
        assert set(actual[layer]) == set(targets)
        for target, pair in targets.items():
            for letter, array in pair.items():
                np.testing.assert_array_equal(actual[layer][target][letter], array)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of two tasks over a model folder with a tokenizer, as `lobra train` leaves it."""
    base = tmp_path / "base"
    save_hf(base, CONFIG, RandomWeights(CONFIG, seed=5), extra={"eos_token_id": 3})
    (base / "tokenizer.json").write_text("{}")
    (base / "added_tokens.json").write_text("{}")
    (base / "generation_config.json").write_text('{"temperature": 0.7}')
    run = tmp_path / "run"
    run.mkdir()
    tasks = [
        {
            "name": name,
            "files": ["none.jsonl"],
            "batch_size": 1,
            "steps": 1,
            **dataclasses.asdict(spec),
            "targets": list(spec.targets),
        }
        for name, spec in SPECS.items()
    ]
    raw = {"model": {"path": str(base), "dtype": "float32"}, "tasks": tasks}
    save_config(RunConfig.model_validate(raw, context={"folder": tmp_path}), run / "config.yaml")
    for name, adapter in make_adapters(CONFIG, SPECS).items():
        write_peft_adapter(run / "adapters" / name, SPECS[name], adapter, str(base))
    return run


def export(run: Path, task: str, out: Path, *flags: str) -> Result:
    return CliRunner().invoke(main, ["export", "--run", str(run), "--task", task, "--out", str(out), *flags])


@pytest.mark.parametrize("task", SPECS)
def test_a_written_adapter_reads_back_bitwise(tmp_path: Path, task: str) -> None:
    adapter = make_adapters(CONFIG, SPECS)[task]
    write_peft_adapter(tmp_path, SPECS[task], adapter, "base")
    spec, restored = read_peft_adapter(tmp_path)
    assert spec == SPECS[task]
    assert_same_adapter(restored, adapter)


def test_the_files_hold_what_peft_expects(tmp_path: Path) -> None:
    adapter = make_adapters(CONFIG, SPECS)["answers"]
    write_peft_adapter(tmp_path, SPECS["answers"], adapter, "some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3  # layers x (A, B) x targets: nothing for what the task does not adapt
    a = tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    np.testing.assert_array_equal(a, adapter["1"]["v"]["a"].T)
    np.testing.assert_array_equal(b, adapter["1"]["down"]["b"].T)
    assert a.shape == (3, 16) and b.shape == (16, 3)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 6.0, 0.1)
    assert settings["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert settings["base_model_name_or_path"] == "some/base"


def test_writing_an_adapter_again_replaces_it_and_leaves_nothing_else(tmp_path: Path) -> None:
    adapters = make_adapters(CONFIG, SPECS)
    write_peft_adapter(tmp_path, SPECS["summaries"], adapters["summaries"], "base")
    write_peft_adapter(tmp_path, SPECS["answers"], adapters["answers"], "base")
    spec, restored = read_peft_adapter(tmp_path)
    assert spec == SPECS["answers"]
    assert_same_adapter(restored, adapters["answers"])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "lora_magnitude_vector' is missing"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
        ({"target_modules": "all-linear"}, "k_proj.lora_A.weight' is missing"),
        ({"target_modules": [".*_proj"]}, "target_modules"),
        ({"target_modules": "(q_proj"}, "target_modules: not a regular expression"),
        ({"target_modules": "q_proj"}, "target_modules"),
        ({"exclude_modules": ["v_proj"]}, "unexpected tensor"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new"),
        ({"r": 0}, "LoraSpec.rank = 0"),
        ({"r": 4}, "wrong rank"),
        ({"target_modules": ["q_proj", "v_proj"]}, "unexpected tensor"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}, "up_proj.lora_A.weight' is missing"),
    ],
)
def test_an_adapter_that_is_not_plain_or_not_whole_is_refused(
    tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    write_peft_adapter(tmp_path, SPECS["answers"], make_adapters(CONFIG, SPECS)["answers"], "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        read_peft_adapter(tmp_path)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("name", ["k_proj.lora_A.weight", "up_proj.lora_magnitude_vector"])
def test_an_adapters_tensor_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    write_peft_adapter(tmp_path, SPECS["titles"], make_adapters(CONFIG, SPECS)["titles"], "base")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith(name))
    save_file({**tensors, key: np.ones(5, np.float32)}, weights)
    with pytest.raises(UserError, match="has the wrong shape"):
        check_fits(tmp_path, read_peft_adapter(tmp_path)[1], CONFIG)
    save_file({**tensors, key: np.full_like(tensors[key], np.nan)}, weights)
    with pytest.raises(UserError, match=f"{name}' holds values that are not finite"):
        read_peft_adapter(tmp_path)


def test_half_a_pair_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_config.json: cannot read"):
        read_peft_adapter(tmp_path)
    write_peft_adapter(tmp_path, SPECS["answers"], make_adapters(CONFIG, SPECS)["answers"], "base")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.lora_B.weight' is missing"):
        read_peft_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot read the adapter"):
        read_peft_adapter(tmp_path)


@pytest.mark.parametrize("task", SPECS)
def test_merged_weights_are_what_the_adapter_makes_of_the_base_whatever_the_slice(task: str) -> None:
    base, adapter = RandomWeights(CONFIG, seed=5), make_adapters(CONFIG, SPECS)[task]
    merged = MergedWeights(base=base, spec=SPECS[task], adapter=adapter)
    scale = {"answers": 6.0 / 3, "summaries": 4.0 / 8**0.5, "titles": 3.0 / 2}[task]
    for name, shape in weight_shapes(CONFIG).items():
        expected = base.read(name, whole(shape)).astype(np.float64)
        layer, _, target = name.removeprefix("layers.").partition(".")
        if target in SPECS[task].targets:
            pair = adapter[layer][target]
            expected += scale * pair["a"].astype(np.float64) @ pair["b"].astype(np.float64)
            if SPECS[task].dora:
                expected *= pair["m"] / np.linalg.norm(expected, axis=0)
        index = tuple(slice(size // 3, None) for size in shape)
        np.testing.assert_allclose(merged.read(name, index), expected[index], rtol=1e-5, atol=1e-6, err_msg=name)


def test_export_writes_the_tasks_adapter(run_folder: Path, tmp_path: Path) -> None:
    result = export(run_folder, "answers", tmp_path / "made" / "out")
    assert result.exit_code == 0, result.output
    spec, adapter = read_peft_adapter(tmp_path / "made" / "out")
    assert len({file.stat().st_mode for file in (tmp_path / "made" / "out").iterdir()}) == 1, "servers read both"
    assert spec == SPECS["answers"]
    assert_same_adapter(adapter, make_adapters(CONFIG, SPECS)["answers"])


def test_export_merged_writes_a_whole_model_with_its_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = export(run_folder, "summaries", out, "--merged")
    assert result.exit_code == 0, result.output
    assert (out / "added_tokens.json").exists() and (out / "generation_config.json").exists()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 3
    config = load_llama_config(out)
    assert config == dataclasses.replace(CONFIG, name="merged")
    expected = MergedWeights(
        base=RandomWeights(CONFIG, seed=5), spec=SPECS["summaries"], adapter=make_adapters(CONFIG, SPECS)["summaries"]
    )
    stored = HFWeights(out, config)
    for name, shape in weight_shapes(CONFIG).items():
        np.testing.assert_array_equal(stored.read(name, whole(shape)), expected.read(name, whole(shape)), err_msg=name)


def test_a_tokenizer_from_elsewhere_comes_with_what_lies_beside_it(run_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    for name in ("mine.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (place / name).write_text(f'"{name}"')
    config = load_config(run_folder / "config.yaml", [f"data.tokenizer={place / 'mine.json'}"], check_files=False)
    save_config(config, run_folder / "config.yaml")
    assert export(run_folder, "answers", tmp_path / "merged", "--merged").exit_code == 0
    copied = {file.name for file in (tmp_path / "merged").iterdir()} - {"config.json", "model.safetensors"}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '"mine.json"'


def test_export_merged_over_a_preset_uses_its_seed(tmp_path: Path) -> None:
    tiny, specs = PRESETS["tiny"], {"only": LoraSpec(rank=2, alpha=2.0, targets=("o",))}
    raw = {
        "model": {"preset": "tiny", "init_seed": 9, "dtype": "float32"},
        "tasks": [{"name": "only", "files": ["none.jsonl"], "batch_size": 1, "steps": 1}],
    }
    (tmp_path / "run").mkdir()
    save_config(RunConfig.model_validate(raw, context={"folder": tmp_path}), tmp_path / "run" / "config.yaml")
    adapter = make_adapters(tiny, specs)["only"]
    write_peft_adapter(tmp_path / "run" / "adapters" / "only", specs["only"], adapter, "tiny")
    result = export(tmp_path / "run", "only", tmp_path / "out", "--merged")
    assert result.exit_code == 0, result.output
    stored = HFWeights(tmp_path / "out", tiny)
    everything = (slice(None), slice(None))
    base = RandomWeights(tiny, seed=9)
    np.testing.assert_array_equal(stored.read("layers.0.q", everything), base.read("layers.0.q", everything))
    assert not np.array_equal(stored.read("layers.0.o", everything), base.read("layers.0.o", everything))


@pytest.mark.parametrize("flags", [(), ("--merged",)])
def test_export_never_writes_into_a_folder_with_content(
    run_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    result = export(run_folder, "answers", out, *flags)
    assert result.exit_code == 2
    assert result.stderr == f"error: {out}: --out: already exists; expected a new or empty folder\n"
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("flags", [(), ("--merged",)])
def test_an_export_to_a_place_that_cannot_be_written_is_one_line(
    run_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    result = export(run_folder, "answers", out, *flags)
    assert result.exit_code == 2
    line = f"error: {out}: --out: cannot write: {out.parent} is no folder; expected a path that can be written\n"
    assert result.stderr == line


@pytest.mark.parametrize("left", ["nothing", "a folder"])
def test_a_tokenizer_that_is_gone_is_said_before_anything_is_merged(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    tokenizer = tmp_path / "moved.json"
    if left == "a folder":
        tokenizer.mkdir()
    config = load_config(run_folder / "config.yaml", [f"data.tokenizer={tokenizer}"], check_files=False)
    save_config(config, run_folder / "config.yaml")
    merged = []
    monkeypatch.setattr("lobra_jax.export.save_hf", lambda *args, **kwargs: merged.append(args))
    result = export(run_folder, "answers", tmp_path / "out", "--merged")
    assert result.exit_code == 2 and merged == []
    assert f"{tokenizer}: data.tokenizer: cannot read the tokenizer: " in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_export_of_an_unknown_task_names_the_tasks_there_are(run_folder: Path, tmp_path: Path) -> None:
    result = export(run_folder, "answer", tmp_path / "out")
    assert result.exit_code == 2
    assert "--task: no adapter of this task (got 'answer'); expected one of answers, summaries" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_export_of_a_folder_that_is_no_run_is_a_user_error(tmp_path: Path) -> None:
    result = export(tmp_path, "answers", tmp_path / "out")
    assert result.exit_code == 2
    assert "a run folder of `lobra train`" in result.stderr


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("written")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
