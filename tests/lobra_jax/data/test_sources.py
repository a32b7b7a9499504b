"""Every kind of file gives the same records; what cannot be read is one line with its place."""

import csv
import gzip
import json
import sys
import tracemalloc

import numpy as np
import pytest

from lobra_jax.data.batches import TaskSampler, task_key
from lobra_jax.data.cache import cached_tokens
from lobra_jax.data.sources import BLOCK_BYTES, HubDataset, digest, expand, records, size
from lobra_jax.data.templates import RecordError, render, with_columns
from lobra_jax.data.tokenizer import load_tokenizer
from planner.errors import UserError

GZIP = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)
RECORDS = [
    {"prompt": 'a "quoted", comma', "completion": "b\nsecond line"},
    {"prompt": "ä ö \U0001f600", "completion": "] } , ["},
    {"prompt": "x" * 3000, "completion": "y", "note": "n"},
]


def write(path, rows):
    kind = path.name.partition(".")[2]
    if kind.removesuffix(".gz") in ("jsonl", "json"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        text = lines if kind.startswith("jsonl") else json.dumps(rows, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion", "note"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow")
        table = arrow.Table.from_pylist(rows, schema=arrow.schema([(k, "string") for k in rows[-1]]))
        if kind == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        elif kind == "feather":
            with arrow.ipc.new_file(str(path), table.schema) as sink:
                sink.write_table(table)
        else:
            with arrow.ipc.new_stream(str(path), table.schema) as sink:
                sink.write_table(table)
    return path


KINDS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "tsv", "parquet", "arrow", "feather"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind):
    file = write(tmp_path / f"a.{kind}", RECORDS)
    found = list(records(file))
    assert [record.value for record in found] == RECORDS
    assert sum(record.size for record in found) <= size(file) + 1e-6


def test_a_json_array_is_read_across_blocks(tmp_path):
    rows = [{"text": str(i) * (i % 700)} for i in range(5000)]
    file = write(tmp_path / "a.json", rows)
    assert file.stat().st_size > 1.5 * BLOCK_BYTES
    assert [record.value for record in records(file)] == rows
    assert list(records(write(tmp_path / "b.json", []))) == []


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [record.value["text"] for record in records(tmp_path / "a.json")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"text": "a"} {', "a.json: record 1: neither , nor ]"),
        ("a.json", b'[{"text": "a"}, {"text"', "a.json: record 2: not JSON"),
        ("a.json", b'[{"text": "a"}] x', "a.json: text after the array"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: not UTF-8"),
        ("a.csv", b"prompt,completion\na,b\na,b,c\n", "a.csv:3: 3 cells under 2 columns"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: a column without a name, or two of one"),
        ("a.csv", b'prompt\n"a\n', "a.csv:2: not CSV"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not a gzip file"),
        ("a.jsonl.gz", GZIP[:10] + b"\xff\xff\xff" + GZIP[13:], "a.jsonl.gz: not a gzip file"),
        ("a.json.gz", GZIP[:10] + b"\xff\xff\xff" + GZIP[13:], "a.json.gz: not a gzip file"),
        ("a.csv.gz", GZIP[:-9], "a.csv.gz: not a gzip file"),
        ("a.txt", b"a", "a.txt: unknown kind of data file '.txt'; expected a .jsonl"),
        ("a.parquet.gz", b"a", "unknown kind of data file '.parquet.gz'"),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(records(tmp_path / name))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_table_is_named(tmp_path, kind):
    pytest.importorskip("pyarrow")
    (tmp_path / f"a.{kind}").write_bytes(b"no table at all")
    with pytest.raises(UserError, match=rf"a\.{kind}: cannot read the data"):
        list(records(tmp_path / f"a.{kind}"))


@pytest.mark.parametrize(
    ("library", "extra", "source"),
    [
        ("pyarrow", "data", "a.parquet"),
        ("datasets", "datasets", HubDataset(name="o/n", path=None, config=None, split="train", revision=None)),
    ],
)
def test_a_missing_library_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, library, extra, source):
    for name in [library, f"{library}.parquet"]:
        monkeypatch.setitem(sys.modules, name, None)
    if isinstance(source, str):
        source = tmp_path / source
        source.write_bytes(b"a")
    with pytest.raises(
        UserError, match=rf"needs the library '{library}'; expected pip install \"lobra-jax\[{extra}\]\""
    ):
        list(records(source))


def test_globs_give_files_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert [p.name for p in expand(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in expand(tmp_path / "**" / "*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert expand(tmp_path / "*.none") == ()
    (tmp_path / "[odd].jsonl").write_text("{}", encoding="utf-8")
    assert expand(tmp_path / "[odd].jsonl") == (tmp_path / "[odd].jsonl",)


@pytest.fixture
def saved_dataset(tmp_path):
    """What `DatasetDict.save_to_disk` leaves, written by hand: an Arrow stream a split, and what it says of itself."""
    pytest.importorskip("datasets")
    state = {"_fingerprint": "0", "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    for split, texts in {"train": ["0", "1", "2"], "test": ["1"]}.items():
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        write(folder / "data.arrow", [{"prompt": "p", "completion": text} for text in texts])
        own = {**state, "_data_files": [{"filename": "data.arrow"}], "_output_all_columns": False, "_split": split}
        (folder / "state.json").write_text(json.dumps(own), encoding="utf-8")
        (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    return tmp_path / "saved"


@pytest.mark.filterwarnings("default")
def test_a_datasets_folder_is_read_by_split(saved_dataset):
    def split(name):
        return HubDataset(name=None, path=saved_dataset, config=None, split=name, revision=None)

    assert [record.value["completion"] for record in records(split("train"))] == ["0", "1", "2"]
    assert [record.value["completion"] for record in records(split("test"))] == ["1"]
    assert size(split("train")) == 3
    assert digest(split("train")) != digest(split("test"))
    with pytest.raises(UserError, match=r"saved: no such split \(got 'dev'\); expected one of train, test"):
        digest(split("dev"))


@pytest.mark.filterwarnings("default")
def test_a_hub_name_that_cannot_be_reached_is_one_line():
    pytest.importorskip("datasets")
    source = HubDataset(name="nobody/nothing", path=None, config=None, split="train", revision=None)
    with pytest.raises(UserError, match=r"^nobody/nothing\[train\]: cannot load the data set: ") as caught:
        digest(source)
    assert "\n" not in str(caught.value)


def test_columns_fill_our_keys():
    record = {"question": "Q", "text": "ignored", "context": {"contexts": ["one", "two"]}, "a.b": "dotted"}
    columns = {"prompt": "question", "completion": "context.contexts", "more": "a.b", "input": "absent"}
    assert with_columns(record, columns) == {
        "question": "Q", "context": record["context"], "a.b": "dotted", "prompt": "Q", "completion": "one\n\ntwo",
        "more": "dotted",
    }  # fmt: skip
    with pytest.raises(RecordError) as caught:
        with_columns(record, {"prompt": "context.nothing"})
    assert caught.value.problem == 'has no "context.nothing"'


def test_messages_in_sharegpt_words_are_chat():
    ours = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    theirs = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert render({"messages": theirs}, "chat") == render({"messages": ours}, "chat")


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr("lobra_jax.data.cache.RECORDS_PER_BATCH", 32)
    tokenizer = load_tokenizer(tokenizer_file)

    def peak(count):
        file = tmp_path / f"{count}.jsonl"
        line = json.dumps({"prompt": "the quick brown fox " * 5, "completion": "jumps " * 5}) + "\n"
        file.write_text(line * count, encoding="utf-8")
        tracemalloc.start()
        settings = {"task": "t", "split": "train", "template": "auto", "context_length": 64}
        cached_tokens([file], cache_dir=tmp_path / "cache", tokenizer=tokenizer, **settings)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    assert peak(1600) < 1.3 * peak(400)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (0.5, 1.0), (2.25, 0.1)])
def test_weights_say_how_often_an_epoch_shows_each_example(weights):
    from lobra_jax.data.dataset import TokenStore, whole

    count = 40
    store = TokenStore(
        tokens=np.zeros(2 * 2 * count, np.int32),
        trainable=np.tile([False, True], 2 * count),
        offsets=np.arange(0, 2 * 2 * count + 1, 2),
        sources=np.arange(2 * count),
    )
    by_row = np.repeat(weights, count)
    key = task_key(seed=0, task_seed=0, name="t", purpose="batches")
    sampler = TaskSampler(whole("t", store), key, 7, by_row)
    assert sampler.epoch_size == sum(round(count * weight) for weight in weights)
    epochs = np.array([np.bincount(sampler.epoch(e), minlength=2 * count) for e in range(60)])
    assert (epochs >= np.floor(by_row)).all()
    assert (epochs <= np.ceil(by_row)).all()
    np.testing.assert_allclose(epochs.mean(axis=0), by_row, atol=0.25)
    stepwise = np.concatenate([sampler.indices(step) for step in range(sampler.epoch_size)])[: sampler.epoch_size]
    assert (stepwise == sampler.epoch(0)).all()
