"""Records to pieces: what is trained, what each template says, which records are refused."""

import pytest

from lobra_jax.data.templates import TEMPLATES, Piece, RecordError, check_template, render

QA = {"prompt": "2 + 2?", "completion": "4"}


def trained(pieces: tuple[Piece, ...]) -> list[str]:
    return [piece.text for piece in pieces if piece.trainable]


def joined(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text + ("<eos>" if piece.ends_turn else "") for piece in pieces)


def test_text_is_trained_as_a_whole():
    assert render({"text": "abc"}, "auto") == (Piece(text="abc", trainable=True, ends_turn=True),)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if not name.startswith("chat")])
def test_only_the_completion_is_trained_and_it_ends_the_turn(template):
    pieces = render(QA, template)
    assert trained(pieces) == ["4"]
    assert "2 + 2?" in pieces[0].text
    assert joined(pieces).endswith("4<eos>")


def test_plain_adds_nothing():
    assert joined(render(QA, "plain")) == "2 + 2?4<eos>"


def test_alpaca_shows_an_input_if_there_is_one():
    assert "### Input:\nfigures\n\n### Response:\n4" in joined(render({**QA, "input": "figures"}, "alpaca"))
    assert "### Input" not in joined(render({**QA, "input": ""}, "alpaca"))


def test_format_string_takes_any_key_and_the_completion_follows_by_itself():
    record = {**QA, "context": "{sums}"}
    for template in ("{context}|{prompt}>", "{context}|{prompt}>{completion}"):
        assert joined(render(record, template)) == "{sums}|2 + 2?>4<eos>"


def test_chat_trains_what_the_assistant_says():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "B"},
    ]
    pieces = render({"messages": messages}, "auto")
    assert trained(pieces) == ["A", "B"]
    assert joined(pieces) == ("<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA<eos>\n<|user|>\nV\n<|assistant|>\nB<eos>")
    assert pieces == render({"messages": messages}, "chat")


def test_chat_template_makes_two_turns_of_prompt_and_completion():
    assert joined(render(QA, "chat")) == "<|user|>\n2 + 2?\n<|assistant|>\n4<eos>"


@pytest.mark.parametrize(
    ("record", "template", "says"),
    [
        ([1], "auto", "not a JSON object"),
        ({}, "auto", "none of the keys"),
        ({"text": "a", "prompt": "b"}, "auto", "'text' and 'prompt'"),
        ({"text": 3}, "auto", '"text" is 3'),
        ({"text": "\ud800"}, "auto", "surrogate"),
        ({"prompt": "a"}, "auto", 'no "completion"'),
        ({"text": "a"}, "alpaca", "under template 'alpaca'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "plain", "under template 'plain'"),
        ({"messages": []}, "auto", "not a list of messages"),
        ({"messages": [{"content": "a"}]}, "auto", "messages[0] has no role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "auto", "role 'robot'"),
        ({"messages": [{"role": "user", "content": 1}]}, "auto", "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}]}, "auto", "without an assistant"),
        (QA, "{context} {prompt}", 'no "context"'),
    ],
)
def test_unusable_record_is_refused(record, template, says):
    with pytest.raises(RecordError) as caught:
        render(record, template)
    assert says in caught.value.problem


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("alpacca", "did you mean 'alpaca'?"),
        ("{question}", "without {prompt}"),
        ("{prompt", "bad format string"),
        ("{prompt!r}", "bad field"),
        ("{prompt.real}", "bad field"),
        ("{prompt:>9}", "bad field"),
        ("{completion} {prompt}", "not at the end"),
    ],
)
def test_unusable_template_is_refused(template, says):
    assert says in check_template(template).problem


@pytest.mark.parametrize("template", [*TEMPLATES, "Q {prompt} {{x}} A", "{prompt} {completion}"])
def test_usable_template_is_accepted(template):
    assert check_template(template) is None
