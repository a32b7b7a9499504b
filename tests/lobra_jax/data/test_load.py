"""A config's tasks: splits, cache use, synthetic lengths, the workload that the planner sees, `lobra tokenize`."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from lobra_jax.cli import main
from lobra_jax.config import load_config, select_tasks
from lobra_jax.data.batches import global_batch
from lobra_jax.data.load import load_tasks, split, synthetic_store, task_lengths, tokenizer_path
from lobra_jax.data.statistics import length_statistics
from planner.errors import UserError
from planner.workload import TaskLengths, Workload

WORDS = "the quick brown fox jumps over the lazy dog".split()


@pytest.fixture
def config_file(tmp_path, write_jsonl, tokenizer_file):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 40, 60)]
    write_jsonl("a.jsonl", *({"text": text} for text in texts))
    write_jsonl("b.jsonl", *({"prompt": text, "completion": "yes"} for text in texts[:30]))
    write_jsonl("b-eval.jsonl", *({"prompt": text, "completion": "no"} for text in texts[30:]))
    shared = {"batch_size": 8, "steps": 5, "context_length": 32}
    path = tmp_path / "run.yaml"
    content = {
        "model": {"preset": "tiny"},
        "data": {"tokenizer": str(tokenizer_file)},
        "tasks": [
            {"name": "a", "files": "a.jsonl", "eval_fraction": 0.2, **shared},
            {"name": "b", "files": "b.jsonl", "eval_files": "b-eval.jsonl", **shared},
        ],
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def histogram(tmp_path):
    lengths = {"a": {5: 0.5, 17: 0.495, 90: 0.005}, "b": {3: 1.0}}
    tasks = tuple(TaskLengths(name=name, batch_size=1, lengths=shares) for name, shares in lengths.items())
    path = tmp_path / "hist.json"
    Workload(tasks=tasks).save(path)
    return path


def records(dataset):
    return set(dataset.store.sources[dataset.rows].tolist())


def test_evaluation_split_is_disjoint_complete_and_stable(config_file):
    a = load_tasks(load_config(config_file))[0]
    assert len(a.evaluation) == 12
    assert records(a.train).isdisjoint(records(a.evaluation))
    assert records(a.train) | records(a.evaluation) == set(range(60))
    again = load_tasks(load_config(config_file, ["tasks.a.context_length=16", "tasks.a.batch_size=2"]))[0]
    assert records(again.evaluation) == records(a.evaluation)
    other = load_tasks(load_config(config_file, ["training.seed=1"]))[0]
    assert records(other.evaluation) != records(a.evaluation)


def test_split_leaves_both_sides_an_example(config_file):
    every = load_tasks(load_config(config_file, ["tasks.a.eval_fraction=0"]))[0].train
    for fraction, expected in ((1e-6, 1), (0.5, 30), (0.9999, 59)):
        train, evaluation = split(every, fraction, key=1)
        assert (len(train), len(evaluation)) == (60 - expected, expected)


def test_single_example_cannot_be_split(config_file, write_jsonl):
    write_jsonl("a.jsonl", {"text": "the fox"})
    with pytest.raises(UserError, match=r"tasks\.a\.eval_fraction: task 'a' has one example"):
        load_tasks(load_config(config_file))


def test_cache_is_built_once_and_for_what_changed(config_file):
    def origins(*overrides):
        return [source.origin for task in load_tasks(load_config(config_file, overrides)) for source in task.sources]

    assert origins() == ["built"] * 3
    assert origins() == ["reused"] * 3
    assert origins("tasks.a.eval_fraction=0.5", "training.seed=4", "tasks.*.lr=1") == ["reused"] * 3
    assert origins("tasks.b.context_length=20") == ["reused", "built", "built"]


def test_task_alone_has_the_batches_it_has_jointly(config_file):
    config = load_config(config_file)
    joint = global_batch(load_tasks(config), {"a": 3, "b": 6})
    solo = global_batch(load_tasks(select_tasks(config, ["b"])), {"b": 6})
    mine = np.flatnonzero(joint.task_ids == 1)
    for index, place in enumerate(mine):
        for left, right in zip(joint.sequence(place), solo.sequence(index), strict=True):
            assert np.array_equal(left, right)
    assert np.array_equal(joint.dropout_ids[mine], solo.dropout_ids)


def test_workload_is_that_of_the_training_examples(config_file):
    config = load_config(config_file)
    a, b = task_lengths(config).tasks
    train = load_tasks(config)[0].train.lengths
    assert (a.name, a.batch_size, b.name) == ("a", 8, "b")
    assert a.lengths == {int(v): pytest.approx(np.mean(train == v)) for v in np.unique(train)}
    assert max(a.lengths) == 32


def test_token_outside_the_vocabulary_of_the_model_is_named(config_file, tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600, "content": "<far>"})
    for index in range(len(content["model"]["vocab"]), 600):
        content["model"]["vocab"][f"unused{index}"] = index
    content["model"]["vocab"]["<far>"] = 600
    (tmp_path / "large.json").write_text(json.dumps(content), encoding="utf-8")
    overrides = ["data.tokenizer=large.json", 'data.eos_token="<far>"']
    with pytest.raises(UserError, match=r"large\.json: .*token 600 in task 'a'; expected ids below the model's 512"):
        load_tasks(load_config(config_file, overrides))


def test_tokenizer_of_a_preset_must_be_named(config_file):
    with pytest.raises(UserError, match=r"data\.tokenizer: missing"):
        tokenizer_path(load_config(config_file, ["data.tokenizer=null"]))


def test_synthetic_source_follows_the_histogram_and_reads_no_text(config_file, histogram):
    (config_file.parent / "a.jsonl").unlink()
    overrides = [
        "data.source=synthetic",
        f"data.lengths={histogram}",
        "data.num_examples=200",
        "tasks.a.eval_fraction=0",
    ]
    a, b = load_tasks(load_config(config_file, overrides))
    values, counts = np.unique(a.train.lengths, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {5: 100, 17: 99, 32: 1}
    assert (a.sources[0].origin, a.sources[0].num_truncated) == ("synthetic", 1)
    assert set(b.train.lengths) == {3}
    assert b.evaluation is None
    assert (a.train.num_targets == a.train.lengths).all()
    assert a.train.store.tokens.min() >= 0
    assert a.train.store.tokens.max() < 512
    again = load_tasks(load_config(config_file, overrides))[0]
    assert np.array_equal(a.train.store.tokens, again.train.store.tokens)


def test_task_without_a_histogram_is_named(config_file, histogram):
    overrides = ["data.source=synthetic", f"data.lengths={histogram}", "tasks.a.name=aa"]
    with pytest.raises(UserError, match=r"hist\.json: no task 'aa', did you mean 'a'\?; expected one of a, b"):
        load_tasks(load_config(config_file, overrides))


def test_synthetic_shares_are_kept_to_within_one_example():
    shares = {1: 0.123, 4: 0.3, 9: 0.5, 30: 0.077}
    lengths = TaskLengths(name="a", batch_size=1, lengths=shares)
    store, _ = synthetic_store(lengths, num_examples=50, context_length=99, vocab_size=7, key=3)
    drawn = np.diff(store.offsets) - 1
    for length, share in shares.items():
        assert abs(np.sum(drawn == length) - 50 * share) <= 1


def test_statistics_of_known_lengths():
    found = length_statistics(np.array([1, 2, 3, 4, 10]))
    assert (found.count, found.total, found.mean, found.max, found.p50) == (5, 20, 4.0, 10, 3.0)
    assert found.p95 == pytest.approx(8.8)
    assert found.skewness == pytest.approx(1.1384, abs=1e-4)
    assert found.kurtosis == pytest.approx(-0.2120, abs=1e-4)
    assert length_statistics(np.array([3, 3])).skewness == 0


def test_tokenize_prints_statistics_and_writes_lengths(config_file, tmp_path):
    out = tmp_path / "hist.json"
    command = ["tokenize", "--config", str(config_file), "--lengths-out", str(out)]
    first = CliRunner().invoke(main, command, env={"COLUMNS": "120"})
    assert first.exit_code == 0, first.output
    assert "a (train+eval): built, 60 records, " in first.output
    assert "skewness" in first.output
    assert Workload.load(out) == task_lengths(load_config(config_file))
    second = CliRunner().invoke(main, command)
    assert "b (eval): reused, 30 records, " in second.output


@pytest.mark.parametrize("option", ["--lengths-out", "--picture"])
def test_tokenize_says_what_it_cannot_write_before_it_begins(config_file, tmp_path, option):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "lengths.png"
    done = CliRunner().invoke(main, ["tokenize", "--config", str(config_file), option, str(out)])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {out.parent}: {option}: cannot write: Not a directory")
    assert done.output.count("\n") == 1


def test_tokenize_ends_with_one_line_for_a_malformed_record(config_file, tmp_path):
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n")
    done = CliRunner().invoke(main, ["tokenize", "--config", str(config_file)])
    assert done.exit_code == 2
    assert "a.jsonl:61: not JSON" in done.output
    assert done.output.count("\n") == 1


def test_globs_weights_and_columns_of_a_config(config_file, write_jsonl):
    for name in ("c-1.jsonl", "c-2.jsonl"):
        write_jsonl(name, *({"q": f"{name} {i}", "a": "yes"} for i in range(4)))
    write_jsonl("d.jsonl", *({"q": f"d {i}", "a": "no"} for i in range(6)))
    overrides = [
        "tasks.a.files=['c-*.jsonl', d.jsonl]",
        "tasks.a.weights=[2, 0.5]",
        "tasks.a.columns={prompt: q, completion: a}",
        "tasks.a.eval_fraction=0",
    ]
    a = load_tasks(load_config(config_file, overrides))[0]
    assert a.sources[0].records_by_source == (4, 4, 6)
    seen = np.bincount(a.train.store.sources[a.sampler.epoch(0)], minlength=14)
    assert (seen[:8] == 2).all()
    assert seen[8:].sum() == 3
    workload = task_lengths(load_config(config_file, overrides))
    shares = np.bincount(a.train.lengths[a.sampler.epoch(0)])
    assert workload.tasks[0].lengths == {n: s / 19 for n, s in enumerate(shares.tolist()) if s}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.a.weights=[1, 2]", "tasks.a: 2 weights for 1 entries of files"),
        ("tasks.a.weights=[0]", "tasks.a.weights.0: bad value (got 0); expected greater than 0"),
        ("tasks.a.files='*.none'", "tasks.a.files: not found (got '"),
        ("tasks.a.dataset={name: o/n}", "tasks.a: both files and dataset"),
        ("tasks.a.dataset={}", "tasks.a.dataset: neither name nor path"),
        ("tasks.a.dataset={nam: x}", "tasks.a.dataset.nam: unknown key 'nam', did you mean 'name'?"),
        ("tasks.a.columns={a b: x}", "not a key"),
        ("tasks.a.use=gone.yaml", "tasks.a.use: unknown key 'use'"),
    ],
)
def test_bad_data_keys_are_one_line(config_file, override, says):
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_leave_nothing_are_named(config_file):
    with pytest.raises(UserError, match=r"tasks\.a\.weights: an epoch without examples"):
        load_tasks(load_config(config_file, ["tasks.a.weights=[1e-6]"]))


def test_a_task_can_be_a_file_of_its_own(config_file, tmp_path):
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "t.yaml").write_text(
        "{name: ready, files: ../b.jsonl, batch_size: 3, steps: 9, rank: 2}", encoding="utf-8"
    )
    content = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    content["tasks"].append({"use": "ready/t.yaml", "steps": 4, "name": "mine"})
    config_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    task = load_config(config_file, ["tasks.mine.rank=8"]).tasks[-1]
    assert (task.name, task.files, task.steps, task.rank) == ("mine", (tmp_path / "b.jsonl",), 4, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "tasks.2.use: cannot read the task's file: No such file"),
        ("[1]", "t.yaml: not a mapping"),
        ("a: [", "t.yaml:1: not YAML"),
        ("{nam: x}", "t.yaml: unknown key 'nam'"),
    ],
)
def test_a_bad_task_file_is_one_line(config_file, tmp_path, text, says):
    if text is not None:
        (tmp_path / "t.yaml").write_text(text, encoding="utf-8")
    content = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    content["tasks"].append({"use": "t.yaml"})
    config_file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(config_file)
    assert says in str(caught.value)


def test_tokenize_draws_a_picture(config_file, tmp_path):
    picture = tmp_path / "lengths.png"
    command = ["tokenize", "--config", str(config_file), "--picture"]
    done = CliRunner().invoke(main, [*command, str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    bad = CliRunner().invoke(main, [*command, str(tmp_path / "lengths.jpeg2")])
    assert bad.exit_code == 2
    assert "--picture: unknown kind of picture" in bad.output
