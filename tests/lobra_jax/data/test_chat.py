"""Chat templates: only what assistants say is trained, as `transformers` has it; templates that hide it are refused."""

import json
import sys

import numpy as np
import pytest

from lobra_jax.data.cache import cached_tokens
from lobra_jax.data.chat import ChatTemplate
from lobra_jax.data.dataset import whole
from lobra_jax.data.templates import RecordError
from lobra_jax.data.tokenizer import load_tokenizer
from planner.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '<a> ' }}{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}\n"
    "    {%- elif message.role == 'user' %}\n"
    "        {{- '<u> ' + message.content + '\\n' }}\n"
    "    {%- else %}{{ raise_exception('no role ' + message.role) }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": "what is the quick fox?"},
    {"role": "assistant", "content": "  ä brown dog \U0001f600 "},
    {"role": "user", "content": "and jumps?"},
    {"role": "assistant", "content": "over the lazy"},
]


def template(source):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "t.jinja")


def trained(source, messages=CONVERSATION, **more):
    found = template(source).render({"messages": messages, **more})
    return [found.text[start:end] for start, end in found.spans]


def test_marked_turns_are_trained_and_the_marks_leave_no_trace():
    assert trained(MARKED) == ["ä brown dog \U0001f600</s>", "over the lazy</s>"]
    text = template(MARKED).render({"messages": CONVERSATION}).text
    assert text == (
        "<s><u> what is the quick fox?\n<a> ä brown dog \U0001f600</s>\n<u> and jumps?\n<a> over the lazy</s>\n"
    )


def test_unmarked_turns_are_what_they_add_to_the_prompt():
    assert trained(CHATML) == ["  ä brown dog \U0001f600 <|im_end|>", "over the lazy<|im_end|>"]


def test_prompt_and_completion_are_two_turns():
    found = template(CHATML).render({"prompt": "p", "completion": "c"})
    assert found == template(CHATML).render(
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}
    )
    assert found.text[slice(*found.spans[0])] == "c<|im_end|>"


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["unmarked", "marked"])
def test_a_prompt_of_several_turns_is_not_trained(source):
    whole = template(source).render({"messages": CONVERSATION})
    found = template(source).render({"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]})
    assert (found.text, found.spans) == (whole.text, whole.spans[1:])
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    found = template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    with pytest.raises(RecordError, match="marks 4 turns of 2"):
        found.render({"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]})
    assert trained(source, [*empty, *CONVERSATION])[-1] == trained(source)[-1]


def test_the_words_of_sharegpt_are_understood():
    said = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CONVERSATION]
    assert template(CHATML).render({"messages": said}) == template(CHATML).render({"messages": CONVERSATION})


def test_a_template_sees_tools_and_no_clock():
    source = "{{ tools | tojson }}{{ strftime_now is defined }}" + CHATML
    assert (
        template(source)
        .render({"messages": CONVERSATION, "tools": [{"n": "<é>"}]})
        .text.startswith('[{"n": "<é>"}]False')
    )


@pytest.mark.parametrize(
    ("source", "record", "says"),
    [
        (
            FORGETFUL,
            {"messages": CONVERSATION},
            "messages[1]: the chat template of t.jinja marks no turns and rewrites",
        ),
        (MARKED, {"messages": [{"role": "robot", "content": "x"}]}, "refuses the messages: no role robot"),
        ("{% if %}", {"messages": CONVERSATION}, "the chat template of t.jinja is not Jinja: line 1"),
        ("{{ messages.__class__.__mro__ }}", {"messages": CONVERSATION}, "refuses the messages: access to attribute"),
        (CHATML, {"messages": CONVERSATION[:1]}, "no assistant's turn"),
        (CHATML, {"messages": []}, "not a list of messages"),
        (CHATML, {"messages": [{"content": "x"}]}, "messages[0] has no role"),
        (CHATML, {"messages": [{"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        (CHATML, {"messages": [{"role": "assistant", "content": "\ufdd0"}]}, "noncharacter"),
        (CHATML, {"prompt": "p"}, '"completion" is not a string'),
        (CHATML, {"prompt": [], "completion": "c"}, '"prompt" is not a string'),
        (CHATML, [], "not a JSON object"),
    ],
)
def test_what_cannot_be_rendered_is_refused(source, record, says):
    with pytest.raises(RecordError) as caught:
        template(source).render(record)
    assert says in caught.value.problem


@pytest.fixture
def folder(tmp_path, tokenizer_file):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": MARKED}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def tokens_of(folder, write_jsonl, **options):
    file = write_jsonl("chat.jsonl", {"messages": CONVERSATION}, {"prompt": "the", "completion": "fox"})
    store, _ = cached_tokens(
        [file],
        cache_dir=folder / "cache",
        task="t",
        split="train",
        template="chat_template",
        context_length=500,
        tokenizer=load_tokenizer(folder / "tokenizer.json", **options),
    )
    return [whole("t", store).sequence(row) for row in range(2)]


def test_the_template_is_found_in_its_three_places(folder, write_jsonl):
    marked = tokens_of(folder, write_jsonl)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    beside = tokens_of(folder, write_jsonl)
    (folder / "mine.jinja").write_text(MARKED, encoding="utf-8")
    given = tokens_of(folder, write_jsonl, chat_template=folder / "mine.jinja")
    assert len(beside[0][0]) != len(marked[0][0])
    for found, expected in zip(given, marked, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_a_tokenizer_without_a_template_is_named(folder, write_jsonl):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        tokens_of(folder, write_jsonl)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_ids_and_masks_are_those_of_transformers(folder, write_jsonl):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=MARKED
    )
    two = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]
    for (ids, mask), messages in zip(tokens_of(folder, write_jsonl), [CONVERSATION, two], strict=True):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == expected["input_ids"]
        assert mask.astype(int).tolist() == expected["assistant_masks"]
        assert 0 < mask.sum() < len(mask)


def train_sentencepiece(folder, vocab_size, *, byte_fallback):
    library = pytest.importorskip("sentencepiece")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\nwhat is it? nothing at all\n" * 20, encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, model_type="bpe",
        hard_vocab_limit=False, byte_fallback=byte_fallback, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip


@pytest.fixture
def sentencepiece_folder(tmp_path):
    train_sentencepiece(tmp_path, 120, byte_fallback=False)
    settings = {"chat_template": MARKED, "added_tokens_decoder": {"900": {"content": "<a>"}, "0": {"content": "<unk>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


def test_a_sentencepiece_model_gives_its_ids_and_knows_special_tokens(sentencepiece_folder):
    library = pytest.importorskip("sentencepiece")
    tokenizer = load_tokenizer(sentencepiece_folder / "tokenizer.model")
    model = library.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    text = "the lazy fox, what ä"
    assert tokenizer.encode([text, ""]) == [model.encode(text), []]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (model.bos_id(), model.eos_id())
    fingerprints = {tokenizer.fingerprint}
    for legacy, last in ((False, [model.piece_to_id("fox")]), (True, model.encode("fox"))):
        settings = {"legacy": legacy, "added_tokens_decoder": {"900": {"content": "<a>"}}}
        (sentencepiece_folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer = load_tokenizer(sentencepiece_folder / "tokenizer.model")
        assert tokenizer.encode(["the</s><a>fox"]) == [[*model.encode("the"), model.eos_id(), 900, *last]]
        fingerprints.add(tokenizer.fingerprint)
    assert len(fingerprints) == 3
    ((ids, spans),) = tokenizer.encoder.encode_with_offsets(["ä the <s>dog"])
    assert "".join("ä the <s>dog"[start:end] for start, end in spans) == "ä the <s>dog"
    assert spans[ids.index(model.bos_id())] == (6, 9)


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("default")
def test_ids_and_masks_of_a_sentencepiece_model_are_those_of_transformers(tmp_path, write_jsonl, legacy):
    transformers = pytest.importorskip("transformers")
    train_sentencepiece(tmp_path, 360, byte_fallback=True)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": MARKED}), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    for text in ("the lazy fox", " the", "  quick  brown", "the</s>fox </s> dog", "what </s><s>the fox", "", "</s>"):
        (ids, spans) = ours.encoder.encode_with_offsets([text])[0]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert "".join(text[start:end] for start, end in spans) == text
    emoji = [{"role": "user", "content": "ä \U0001f600 fox"}, {"role": "assistant", "content": "\U0001f600 ö dog ß"}]
    file = write_jsonl("chat.jsonl", {"messages": CONVERSATION}, {"messages": emoji})
    settings = {"task": "t", "split": "train", "template": "chat_template", "context_length": 500}
    store, _ = cached_tokens([file], cache_dir=tmp_path / "cache", tokenizer=ours, **settings)
    for row, messages in enumerate((CONVERSATION, emoji)):
        ids, mask = whole("t", store).sequence(row)
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == expected["input_ids"]
        assert mask.astype(int).tolist() == expected["assistant_masks"]


def test_chat_of_a_sentencepiece_model_trains_the_assistant(sentencepiece_folder, write_jsonl):
    file = write_jsonl("chat.jsonl", {"messages": CONVERSATION})
    tokenizer = load_tokenizer(sentencepiece_folder / "tokenizer.model")
    settings = {"task": "t", "split": "train", "template": "chat_template", "context_length": 500}
    store, _ = cached_tokens([file], cache_dir=sentencepiece_folder / "cache", tokenizer=tokenizer, **settings)
    assert np.sum(store.tokens[store.trainable] == tokenizer.eos_id) == 2
    assert 900 not in store.tokens[store.trainable]


def test_a_missing_sentencepiece_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs the library 'sentencepiece'; expected pip install"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
