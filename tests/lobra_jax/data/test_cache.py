"""Text to cached tokens: exact ids and masks, reuse, invalidation, errors with file and line."""

import json
import os

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from lobra_jax.data.cache import cached_tokens
from lobra_jax.data.dataset import whole
from lobra_jax.data.tokenizer import load_tokenizer
from planner.errors import UserError

BOS, EOS = 0, 1


@pytest.fixture
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def read(tmp_path, tokenizer):
    def call(*files, **changes):
        settings = {
            "cache_dir": tmp_path / "cache",
            "task": "t",
            "split": "train",
            "template": "auto",
            "context_length": 64,
            "tokenizer": tokenizer,
        }
        return cached_tokens(files, **{**settings, **changes})

    return call


def test_ids_and_mask_of_each_kind_of_record(write_jsonl, read, tokenizer):
    file = write_jsonl(
        "a.jsonl",
        {"text": "the fox"},
        {"prompt": "the dog: ", "completion": "lazy"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "jumps"}]},
    )
    store, _ = read(file)
    dataset = whole("t", store)
    (fox,), (dog, lazy), (user, answer, jumps) = (
        tokenizer.encode(texts)
        for texts in (["the fox"], ["the dog: ", "lazy"], ["<|user|>\nu", "\n<|assistant|>\n", "jumps"])
    )
    expected = [
        ([BOS, *fox, EOS], [False] + [True] * (len(fox) + 1)),
        ([BOS, *dog, *lazy, EOS], [False] * (1 + len(dog)) + [True] * (len(lazy) + 1)),
        ([BOS, *user, *answer, *jumps, EOS], [False] * (1 + len(user + answer)) + [True] * (len(jumps) + 1)),
    ]
    for row, (ids, mask) in enumerate(expected):
        tokens, trainable = dataset.sequence(row)
        assert tokens.tolist() == ids
        assert trainable.tolist() == mask
        assert dataset.lengths[row] == len(ids) - 1
        assert dataset.num_targets[row] == sum(mask)


def test_first_token_is_never_a_target_without_bos(write_jsonl, read, tokenizer_file):
    file = write_jsonl("a.jsonl", {"text": "the fox"})
    bare = load_tokenizer(tokenizer_file, bos_token="")
    store, _ = read(file, tokenizer=bare)
    assert store.tokens.tolist() == [*bare.encode(["the fox"])[0], EOS]
    assert store.trainable.tolist() == [False] + [True] * (len(store.tokens) - 1)


def test_truncation_keeps_context_length_inputs_and_is_counted(write_jsonl, read):
    file = write_jsonl("a.jsonl", {"text": "x" * 50}, {"text": "the"}, {"text": "z" * 500})
    store, summary = read(file, context_length=8)
    assert whole("t", store).lengths.max() == 8
    assert EOS not in store.tokens[:9]
    assert (summary.num_records, summary.num_truncated, summary.num_dropped) == (3, 2, 0)


def test_example_without_target_after_truncation_is_dropped_and_counted(write_jsonl, read):
    file = write_jsonl("a.jsonl", {"prompt": "q" * 40, "completion": "a"}, {"prompt": "q", "completion": "a"})
    store, summary = read(file, context_length=8)
    assert store.sources.tolist() == [1]
    assert (summary.num_records, summary.num_truncated, summary.num_dropped) == (2, 1, 1)


def test_nothing_left_to_train_is_an_error(write_jsonl, read):
    file = write_jsonl("a.jsonl", {"prompt": "q" * 40, "completion": "a"})
    with pytest.raises(UserError, match=r"a\.jsonl: none of 1 examples .* context_length = 8"):
        read(file, context_length=8)


def test_cache_is_reused_when_nothing_changed(write_jsonl, read, tmp_path):
    file = write_jsonl("a.jsonl", {"text": "the fox"}, {"text": "the dog"})
    built, first = read(file)
    os.utime(file, (1, 1))
    reused, second = read(file)
    assert (first.origin, second.origin) == ("built", "reused")
    assert np.array_equal(built.tokens, reused.tokens)
    assert {**vars(first), "origin": ""} == {**vars(second), "origin": ""}
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("change", ["data", "order", "template", "context_length", "tokenizer"])
def test_cache_is_rebuilt_when_something_changed(write_jsonl, read, tokenizer_file, change):
    files = [
        write_jsonl("a.jsonl", {"prompt": "the", "completion": "fox"}),
        write_jsonl("b.jsonl", {"prompt": "a", "completion": "dog"}),
    ]
    read(*files)
    changes = {}
    if change == "data":  # of the same size
        files[0].write_text(files[0].read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    elif change == "order":
        files.reverse()
    else:
        changes = {
            "template": {"template": "question_answer"},
            "context_length": {"context_length": 63},
            "tokenizer": {"tokenizer": load_tokenizer(tokenizer_file, bos_token="")},
        }[change]
    assert read(*files, **changes)[1].origin == "built"
    assert read(*files, **changes)[1].origin == "reused"


@pytest.mark.parametrize("part", ["manifest.json", "tokens.npy"])
def test_damaged_cache_is_built_anew(write_jsonl, read, tmp_path, part):
    file = write_jsonl("a.jsonl", {"text": "the fox"})
    tokens = read(file)[0].tokens.tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / part).unlink()
    store, summary = read(file)
    assert summary.origin == "built"
    assert store.tokens.tolist() == tokens


def test_failed_build_leaves_no_cache(write_jsonl, read, tmp_path):
    file = write_jsonl("a.jsonl", {"text": "the fox"}, {"txt": "a"})
    with pytest.raises(UserError):
        read(file)
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (b'\n\n{"texts": "a"}\n', r"a\.jsonl:3: has none of the keys; expected .*\"text\""),
        (b'{"text": "a"}\n"b"\n', r"a\.jsonl:2: not a JSON object"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        (b"", r"a\.jsonl: an empty data file"),
        (b"\n \n", r"a\.jsonl: an empty data file"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, read, content, says):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_empty_second_file_is_named(write_jsonl, read):
    with pytest.raises(UserError, match=r"b\.jsonl: an empty data file"):
        read(write_jsonl("a.jsonl", {"text": "a"}), write_jsonl("b.jsonl"))


def test_missing_file_is_named(tmp_path, read):
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot read the data: No such file"):
        read(tmp_path / "gone.jsonl")


def test_byte_order_mark_and_windows_line_ends_are_taken(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "the"}\r\n\r\n{"text": "fox"}')
    assert read(file)[1].num_records == 2


@pytest.mark.parametrize(
    ("settings", "processed", "bos_id"),
    [
        (None, False, 0),  # a bare file: a usual name
        (None, True, 1),
        ({"bos_token": "<s>"}, False, None),  # named, but nothing puts it there
        ({"bos_token": "<s>"}, True, 1),
        ({"bos_token": "<s>", "add_bos_token": True}, False, 0),
        ({"bos_token": "<s>", "add_bos_token": False}, True, None),
    ],
)
@pytest.mark.filterwarnings("default")
def test_texts_begin_as_transformers_begins_them(tokenizer_file, tmp_path, settings, processed, bos_id):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    if processed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A <s>", special_tokens=[("</s>", 1), ("<s>", 0)]
        )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == bos_id


def test_special_tokens_come_from_the_tokenizer_config(tokenizer_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_file.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<s>"}}), encoding="utf-8")
    found = load_tokenizer(path)
    assert (found.bos_id, found.eos_id) == (None, 0)
    settings.write_text(json.dumps({"bos_token": "<s>", "add_bos_token": False}), encoding="utf-8")
    found = load_tokenizer(path)
    assert (found.bos_id, found.eos_id) == (None, 1)
    assert load_tokenizer(path, bos_token="</s>").bos_id == 1
    with pytest.raises(UserError, match=r"data\.eos_token: not in the vocabulary \(got '<end>'\)"):
        load_tokenizer(path, eos_token="<end>")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(path, eos_token="")


def test_not_a_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(path)
