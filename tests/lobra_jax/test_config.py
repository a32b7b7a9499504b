"""The run config: both file kinds, overrides, defaults, and one line for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lobra_jax.config import load_config, model_config, save_config, select_tasks
from lobra_jax.models.config import PRESETS, TARGETS
from planner.errors import UserError

YAML = """
model: {preset: tiny, dtype: float32}
tasks:
  - &task {name: a, files: a.jsonl, batch_size: 4, steps: 10, lr: 1e-3, schedule: {warmup_steps: 2}}
  - {<<: *task, name: b.x, files: [b.jsonl], targets: [v_proj, q], clip_norm: null}
devices: {memory_bytes: 40GiB}
planner: {buckets: [64, 128]}
"""

GIN = """
LR = 1e-3
ModelConfig.preset = "tiny"
include "rest.gin"
TaskConfig:
  batch_size = 4
  steps = 10
  lr = %LR
ScheduleConfig.warmup_steps = 2
RunConfig.tasks = ["a", {"name": "b.x", "files": ["b.jsonl"], "targets": ["v_proj", "q"], "clip_norm": None}]
a/TaskConfig.files = "a.jsonl"
DevicesConfig.memory_bytes = "40GiB"
PlannerConfig.buckets = [64, 128]
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text(YAML, encoding="utf-8")
    (tmp_path / "c.gin").write_text(GIN, encoding="utf-8")
    (tmp_path / "rest.gin").write_text('ModelConfig.dtype = "float32"\n', encoding="utf-8")
    return tmp_path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_is_read_with_defaults(folder):
    config = load_config(folder / "c.yaml")
    a, b = config.tasks
    assert (a.name, a.files, a.lr, a.targets) == ("a", (folder / "a.jsonl",), 1e-3, TARGETS)
    assert (b.targets, b.clip_norm, b.schedule.warmup_steps) == (("q", "v"), None, 2)
    assert config.devices.memory_bytes == 40 * 2**30
    assert config.planner.buckets == (64, 128)
    assert config.data.cache_dir == folder / ".lobra_cache"
    assert model_config(config) is PRESETS["tiny"]


def test_gin_says_the_same(folder):
    assert load_config(folder / "c.gin") == load_config(folder / "c.yaml")


def test_gin_tasks_come_in_order_of_their_scopes_without_a_list(folder):
    text = 'ModelConfig.preset = "tiny"\nTaskConfig.batch_size = 1\nTaskConfig.files = ["a.jsonl"]\n'
    text += "z/TaskConfig.steps = 1\ny/TaskConfig.steps = 2\nz/ScheduleConfig.kind = 'linear'\n"
    (folder / "d.gin").write_text(text, encoding="utf-8")
    config = load_config(folder / "d.gin")
    assert [(task.name, task.steps, task.schedule.kind) for task in config.tasks] == [
        ("z", 1, "linear"),
        ("y", 2, "constant"),
    ]


@pytest.mark.parametrize("name", ["c.yaml", "c.gin"])
def test_saved_config_loads_equal_from_elsewhere(folder, tmp_path_factory, name):
    config = load_config(folder / name, ["planner.buckets=static7", "data.tokenizer=t.json"], check_files=False)
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    save_config(config, path)
    assert load_config(path, check_files=False) == config


def test_a_kill_while_a_config_is_saved_leaves_the_old_one(folder, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    config = load_config(folder / "c.yaml")
    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save_config(config, folder / "c.yaml")
    assert (folder / "c.yaml").read_text(encoding="utf-8") == YAML


def test_overrides_address_tasks_by_name_number_and_all(folder):
    overrides = ["tasks.*.steps=7", "tasks.b.x.lr=1e-2", "tasks.0.schedule.kind=cosine", "training.seed=3"]
    config = load_config(folder / "c.yaml", overrides)
    a, b = config.tasks
    assert (a.steps, b.steps, a.lr, b.lr) == (7, 7, 1e-3, 1e-2)
    assert (a.schedule.kind, b.schedule.kind) == ("cosine", "constant")
    assert config.training.seed == 3


@pytest.mark.parametrize(
    ("text", "value"), [("1024", 1024), ("40GiB", 40 * 2**30), ("1.5 MB", 1_500_000), ("512 kib", 512 * 1024)]
)
def test_byte_sizes(folder, text, value):
    assert load_config(folder / "c.yaml", [f"devices.memory_bytes={text}"]).devices.memory_bytes == value


def test_tasks_can_be_selected(folder):
    config = load_config(folder / "c.yaml")
    assert [task.name for task in select_tasks(config, ["b.x"]).tasks] == ["b.x"]
    with pytest.raises(UserError, match=r"--tasks: unknown task 'bx', did you mean 'b\.x'\?"):
        select_tasks(config, ["bx"])
    with pytest.raises(UserError, match="no task named"):
        select_tasks(config, [])


def test_files_may_be_absent_where_they_are_not_needed(folder):
    (folder / "a.jsonl").unlink()
    assert "tasks.a.files: not found" in message(folder / "c.yaml")
    assert load_config(folder / "c.yaml", check_files=False).tasks[0].files == (folder / "a.jsonl",)


def test_model_shape_comes_from_the_folder(folder):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = folder / "base"
    model.mkdir()
    text = yaml.safe_dump({**sizes, "model_type": "llama", "vocab_size": 32, "num_key_value_heads": 1})
    (model / "config.json").write_text(str(yaml.safe_load(text)).replace("'", '"'), encoding="utf-8")
    config = load_config(folder / "c.yaml", ["model.preset=null", "model.path=base"])
    assert model_config(config).num_layers == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.a.lrr=1", "tasks.a.lrr: unknown key 'lrr', did you mean 'lr'?; expected one of name, files"),
        ("tasks.a.schedule.knd=1", "tasks.a.schedule.knd: unknown key 'knd', did you mean 'kind'?"),
        (
            "model.preset=tinny",
            "model.preset: unknown preset, did you mean 'tiny'? (got 'tinny'); expected one of tiny, ",
        ),
        ("modle.preset=tiny", "modle: unknown key 'modle', did you mean 'model'?"),
        ("tasks.a.rank=0", "tasks.a.rank: bad value (got 0); expected greater than or equal to 1"),
        ("tasks.1.batch_size=0", "tasks.b.x.batch_size: bad value (got 0)"),
        ("tasks.a.steps=0", "tasks.a.steps: bad value (got 0)"),
        ("tasks.a.steps=true", "tasks.a.steps: a truth value (got True)"),
        ("tasks.a.steps=ten", "tasks.a.steps: bad value (got 'ten')"),
        ("tasks.a.lr=0", "tasks.a.lr: bad value (got 0); expected greater than 0"),
        ("tasks.a.lr=.inf", "tasks.a.lr: bad value (got inf); expected a finite number"),
        ("tasks.a.eval_fraction=1", "tasks.a.eval_fraction: bad value (got 1); expected less than 1"),
        (
            "tasks.a.targets=[q, gat_proj]",
            "tasks.a.targets.1: unknown target module, did you mean 'gate'? (got 'gat_proj')",
        ),
        ("tasks.a.targets=[q, q_proj]", "tasks.a.targets: a target module twice"),
        ("tasks.a.targets=[]", "tasks.a.targets: no target modules"),
        ("tasks.a.template=chatt", "tasks.a.template: unknown template, did you mean 'chat'? (got 'chatt')"),
        ("tasks.a.name=../a", "tasks.0.name: not usable as a folder name (got '../a')"),
        ("devices.memory_bytes=40GX", "devices.memory_bytes: not a size (got '40GX')"),
        ("planner.buckets=[128, 64]", "planner.buckets: not buckets (got [128, 64]); expected ascending"),
        ("planner.buckets=static8", "planner.buckets: unknown bucket preset, did you mean 'static7'? (got 'static8')"),
        (
            "planner.planner=best",
            "planner.planner: bad value (got 'best'); expected 'exact', 'minlp', 'prune' or 'group'",
        ),
        ("planner.remats=[]", "planner.remats: empty"),
        ("tasks.a.optimizer=adam", "tasks.a.optimizer: bad value (got 'adam'); expected 'adamw', 'sgd', 'adafactor'"),
        ("tasks.a.schedule.kind=wds", "tasks.a.schedule.kind: bad value (got 'wds'); expected 'constant', 'linear'"),
        ("tasks.a.lora_plus_ratio=0", "tasks.a.lora_plus_ratio: bad value (got 0); expected greater than 0"),
        ("tasks=[]", "tasks: empty; expected at least one item"),
        ("tasks=5", "tasks: bad value (got 5); expected a list"),
        ("planner.remats=none", "planner.remats: bad value (got 'none'); expected a list"),
        ("model=tiny", "model: not a mapping (got 'tiny')"),
        ("tasks.c.lr=1", "unknown task 'c'; expected one of a, b.x, a number below 2 or *"),
        ("tasks.a=1", "no key of a task; expected tasks.NAME.key=value"),
        ("model.preset.x=1", "'preset' is not a section"),
        ("training.seed", "bad override; expected key=value"),
        ("training.seed=[", "training.seed: not YAML"),
        ("training.seed=2024-13-45", "training.seed: not YAML: bad timestamp '2024-13-45'; expected a YAML value"),
        ("training.seed=&x [*x]", "training.seed: not YAML: a value that holds itself, or too many levels"),
    ],
)
def test_bad_override_is_named_with_key_value_and_expectation(folder, override, says):
    assert message(folder / "c.yaml", override).startswith(f"--set {override}: {says}")


@pytest.mark.parametrize("override", ["tasks.a.files={}", "planner.remats={a: 1}", "planner.remats=3"])
def test_lists_are_not_called_tuples(folder, override):
    line = message(folder / "c.yaml", override)
    assert line.endswith("expected a list") and "tuple" not in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.path=base", "model: both preset and path; expected exactly one of them"),
        ("model.preset=null", "model: neither preset nor path"),
        ("tasks.a.name=B.X", "duplicate task name 'b.x' (beside 'B.X')"),
        ("tasks.a.eval_interval=2", "tasks.a: eval_interval without evaluation data"),
        ("tasks.a.schedule.warmup_steps=11", "tasks.a: schedule.warmup_steps = 11 exceeds steps = 10"),
        ("tasks.a.momentum=0.9", "tasks.a: momentum with optimizer adamw; expected momentum with optimizer: sgd"),
        ("tasks.a.patience=2", "tasks.a: patience without eval_interval"),
        ("tasks.a.files=[]", "tasks.a.files: no data"),
        ("tasks.a.files=gone.jsonl", "tasks.a.files: not found (got '"),
        ("tasks.a.eval_files=gone.jsonl", "tasks.a.eval_files: not found (got '"),
        ("data.tokenizer=gone.json", "data.tokenizer: not found (got '"),
        ("data.source=synthetic", "data: source: synthetic without lengths"),
    ],
)
def test_mistake_of_several_keys_names_the_file(folder, override, says):
    assert message(folder / "c.yaml", override).startswith(f"{folder / 'c.yaml'}: {says}")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.yaml", "model: [", r"x.yaml:1: not YAML"),
        ("x.yaml", "", "x.yaml: an empty config"),
        ("x.yaml", "[1]", "x.yaml: not a mapping"),
        (
            "x.yaml",
            "tasks:\n- name: 2024-13-45",
            "x.yaml:2: not YAML: bad timestamp '2024-13-45'; expected",
        ),
        ("x.yaml", "tasks: &x [*x]", "x.yaml: not YAML: a value that holds itself, or too many levels"),
        ("x.yaml", "model: {}\nmodel: {}", "x.yaml:2: not YAML: key 'model' is given twice"),
        ("x.yaml", "model: {preset: tiny}", "x.yaml: tasks: missing; expected a value for 'tasks'"),
        ("x.yaml", "model: {preset: tiny}\ntask: []", "x.yaml: task: unknown key 'task', did you mean 'tasks'?"),
        ("x.json", "{}", "x.json: unknown kind of config '.json'"),
        ("x.gin", "ModelConfig.preset = ", "x.gin:1: not gin"),
        ("x.gin", 'ModelConfig.preset = "tiny', "x.gin:1: not gin"),
        ("x.gin", "a\nModelConf.preset = 1", "x.gin:1: not gin"),
        ("x.gin", "\nModelConf.preset = 1", "x.gin:2: unknown class 'ModelConf', did you mean 'ModelConfig'?"),
        ("x.gin", "ModelConfig.preset = %NAME", "x.gin:1: unknown macro (got '%NAME')"),
        ("x.gin", "A = [%B]\nB = %A\nModelConfig.preset = %A", "x.gin:3: a macro that refers to itself"),
        ("x.gin", "ModelConfig.preset = @tiny", "x.gin:1: a reference (got '@tiny')"),
        ("x.gin", "import os", "x.gin:1: an import"),
        ("x.gin", 'include "x.gin"', "x.gin:1: a file includes itself"),
        ("x.gin", 'include "y.gin"', "x.gin:1: cannot read the included file"),
        ("x.gin", "s/ModelConfig.preset = 'tiny'", "x.gin:1: a scope before ModelConfig (got 's')"),
        ("x.gin", "RunConfig.tasks = 'a'", "x.gin:1: RunConfig.tasks: bad value"),
        (
            "x.gin",
            "ModelConfig.preset = 'tiny'\nRunConfig.tasks = [{'name': ['a']}]",
            "x.gin: tasks.0.name: bad value (got ['a'])",
        ),
        ("x.gin", "RunConfig.tasks = [{['a']: 1}]", "x.gin: not gin: unhashable type"),
        ("x.gin", "TaskConfig.rank = " + "[" * 3000, "x.gin"),  # which of them it is depends on the Python
        ("x.gin", "RunConfig.tasks = ['ab']\nac/TaskConfig.rank = 1", "x.gin: task 'ac' is not in RunConfig.tasks"),
        ("x.gin", "ModelConfig.preset = 'tiny'", "x.gin: tasks: empty"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert message(tmp_path / name).startswith(f"{tmp_path}/{says}")


def test_an_included_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "x.gin").write_text('\ninclude "y.gin"', encoding="utf-8")
    (tmp_path / "y.gin").write_bytes(b"LR = '\xff'")
    assert f"{tmp_path}/x.gin:2: the included file is not UTF-8 text (got 'y.gin')" in message(tmp_path / "x.gin")


def test_missing_config_is_named(tmp_path):
    assert "cannot read the config: No such file" in message(tmp_path / "x.yaml")


def test_config_and_data_load_without_jax():
    code = "import sys, lobra_jax.config, lobra_jax.data.load, lobra_jax.commands.tokenize; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
