"""From one JSONL record to text pieces, each knowing whether the loss counts its tokens.

Records: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}.
Other keys are ignored unless a format string names them. Messages may also be in ShareGPT's words (`from`, `value`,
"human", "gpt").
"""

from __future__ import annotations

import dataclasses
import difflib
import string
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant")
RECORD_KEYS = ("text", "prompt", "completion", "messages")

PROMPT_TEMPLATES: Mapping[str, str] = {
    "plain": "{prompt}",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "summarise": "Summarise the following text.\n\n{prompt}\n\nSummary:\n",
    "question_answer": "Question: {prompt}\n\nAnswer:\n",
}
"""Format of the prompt by template name; the completion follows it."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Used by `alpaca` for records with a non-empty "input"."""

CHAT_TEMPLATE = "chat_template"
TEMPLATES = ("auto", *PROMPT_TEMPLATES, "chat", CHAT_TEMPLATE)
"""Names of the registry; `auto` is `chat` for messages and `plain` for everything else.

`chat_template` is the tokenizer's own, see `chat.py`; all others are rendered here.
"""


class RecordError(Exception):
    """A record that the template cannot use: what is wrong, what was expected. The reader adds file and line."""

    def __init__(self, problem: str, *, expected: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that is tokenised by itself; `ends_turn` puts the EOS token after it, trained like the piece."""

    text: str
    trainable: bool
    ends_turn: bool = False


SHAREGPT_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
LIST_SEPARATOR = "\n\n"
"""Between the strings of a list that a column maps to one string."""


def with_columns(record: Any, columns: Mapping[str, str]) -> Any:
    """The record with our keys filled from its own columns; as it is without any.

    Args:
      record: a JSON object.
      columns: our key -> the record's; dots lead into nested objects ("context.contexts"). Of "text", "prompt",
        "completion" and "messages" only those named here count then. A list of strings becomes one string, except for
        "messages"; a column that is absent leaves its key out.
    """
    if not columns or not isinstance(record, Mapping):
        return record
    out = {key: value for key, value in record.items() if key not in RECORD_KEYS}
    for key, path in columns.items():
        value: Any = record
        for part in [path] if path in record else path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, list) and key != "messages" and all(isinstance(item, str) for item in value):
            value = LIST_SEPARATOR.join(value)
        if value is None and key in RECORD_KEYS:
            raise RecordError(f'has no "{path}"', expected=f'"{path}", the column of "{key}"')
        if value is not None:
            out[key] = value
    return out


def check_template(template: str) -> RecordError | None:
    """What is wrong with a template's name or format string, None if it is usable."""
    if template in TEMPLATES:
        return None
    if "{" not in template:
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        known = f"one of {', '.join(TEMPLATES)}, or a format string with {{prompt}}"
        return RecordError(f"unknown template{hint}", expected=known)
    try:
        parsed = list(string.Formatter().parse(_prompt_part(template)))
    except ValueError as error:
        return RecordError(f"bad format string: {error}", expected="{prompt} and other keys in braces; {{ for a brace")
    fields = [(name, spec, conversion) for _, name, spec, conversion in parsed if name is not None]
    if any(spec or conversion or not name.isidentifier() for name, spec, conversion in fields):
        return RecordError("bad field in the format string", expected="fields such as {prompt}, a key and nothing else")
    names = {name for name, _, _ in fields}
    if "prompt" not in names:
        return RecordError("format string without {prompt}", expected="a format string with {prompt}")
    if "completion" in names:
        return RecordError("{completion} is not at the end", expected="nothing after {completion}, or to leave it out")
    return None


def render(record: Mapping[str, Any], template: str) -> tuple[Piece, ...]:
    """The pieces of one record.

    Args:
      record: a JSON object.
      template: a name of `TEMPLATES` other than `chat_template`, or a format string that `check_template` accepts.

    Raises:
      RecordError: the record has none or several of the three forms, a value of a wrong type, or a form that the
        template does not take.
    """
    kind = _kind(record)
    if kind == "text":
        if template not in ("auto", "plain"):
            raise RecordError(f'a "text" record under template {template!r}', expected='"prompt" and "completion"')
        return (Piece(text=_string(record, "text"), trainable=True, ends_turn=True),)
    if kind == "messages":
        if template not in ("auto", "chat"):
            raise RecordError(f'a "messages" record under template {template!r}', expected="template chat or auto")
        return _chat(record["messages"])
    prompt, completion = _string(record, "prompt"), _string(record, "completion")
    if template == "chat":
        return _chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    return (
        Piece(text=_prompt(record, template), trainable=False),
        Piece(text=completion, trainable=True, ends_turn=True),
    )


def _kind(record: Mapping[str, Any]) -> str:
    """Which of "text", "prompt", "messages" a record is."""
    expected = 'an object with "text", with "prompt" and "completion", or with "messages"'
    if not isinstance(record, Mapping):
        raise RecordError("not a JSON object", expected=expected)
    found = [key for key in ("text", "prompt", "messages") if key in record]
    if len(found) != 1:
        raise RecordError(f"has {' and '.join(map(repr, found)) or 'none of the keys'}", expected=expected)
    return found[0]


def _prompt_part(template: str) -> str:
    """A user's format string up to the completion, which follows by itself."""
    return template.removesuffix("{completion}")


def _prompt(record: Mapping[str, Any], template: str) -> str:
    if template == "auto":
        template = "plain"
    if template == "alpaca" and record.get("input"):
        text = ALPACA_WITH_INPUT
    else:
        text = PROMPT_TEMPLATES.get(template) or _prompt_part(template)
    names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    return text.format_map({name: _string(record, name) for name in names})


def in_our_words(message: Any) -> Any:
    """A message of ShareGPT with "role" and "content"; any other as it is."""
    if not isinstance(message, Mapping) or "from" not in message or "role" in message:
        return message
    speaker = message["from"]
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": message.get("value")}


def _chat(messages: Any) -> tuple[Piece, ...]:
    """Turns as "<|role|>\\ncontent\\n"; what an assistant says, and the EOS after it, is trained."""
    expected = 'a non-empty list of {"role", "content"} with an assistant\'s among them'
    if not isinstance(messages, list) or not messages:
        raise RecordError('"messages" is not a list of messages', expected=expected)
    pieces = []
    for index, message in enumerate(messages):
        message = in_our_words(message)
        if not isinstance(message, Mapping) or "role" not in message:
            raise RecordError(f"messages[{index}] has no role", expected=expected)
        role = message["role"]
        if role not in ROLES:
            raise RecordError(f"messages[{index}] has role {role!r}", expected=f"one of {', '.join(ROLES)}")
        try:
            content = _string(message, "content")
        except RecordError as error:
            raise RecordError(f"messages[{index}]: {error.problem}", expected=error.expected) from error
        separator = "\n" if pieces else ""
        if role == "assistant":
            pieces.append(Piece(text=f"{separator}<|assistant|>\n", trainable=False))
            pieces.append(Piece(text=content, trainable=True, ends_turn=True))
        else:
            pieces.append(Piece(text=f"{separator}<|{role}|>\n{content}", trainable=False))
    if not any(piece.trainable for piece in pieces):
        raise RecordError('"messages" without an assistant', expected=expected)
    return tuple(pieces)


def _string(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise RecordError(f'has no "{key}"', expected=f'"{key}": a string')
    value = record[key]
    if not isinstance(value, str):
        raise RecordError(f'"{key}" is {value!r:.60}', expected="a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f'"{key}" holds half a surrogate pair', expected="Unicode text") from error
    return value
