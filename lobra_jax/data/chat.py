"""A tokenizer's own chat template (Jinja), and which characters of what it renders an assistant said.

Two ways to find these. A template with `{% generation %}` marks them itself, as `transformers` reads them for its
assistant mask. Without marks, a turn is what rendering the conversation up to and with it adds to the prompt before it
(`add_generation_prompt`); white space at its end is not trained. That holds only if rendering more messages does not
change what is there already: a template that drops or rewrites earlier turns is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lobra_jax.data.templates import RecordError, in_our_words

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, which no text may hold, around what `{% generation %}` renders."""
_MARK = re.compile(f"[{_BEGIN}{_END}]")
_HAS_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ROLE, _SPEAKER = "role", "assistant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpannedText:
    """Text that is tokenised as a whole; a token that reaches into one of the spans [start, end) is trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Jinja source, the special tokens that it may name ("bos_token", ...), and the file it is from."""

    source: str
    special_tokens: Mapping[str, str]
    file: str

    @property
    def fingerprint(self) -> str:
        content = json.dumps([self.source, dict(sorted(self.special_tokens.items()))])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    @functools.cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.source)

    def render(self, record: Mapping[str, Any]) -> SpannedText:
        """The conversation of a record: its "messages" (and "tools"), or "prompt" and "completion".

        These two are a turn each, or a list of messages each, of which the completion's are trained.

        Raises:
          RecordError: neither of them, no assistant's turn, or the template refuses or rewrites the messages.
        """
        messages, given = _messages(record)
        tools = record.get("tools")
        if _HAS_MARKS.search(self.source):
            text, spans = _cut_marks(self._text(messages, tools))
        else:
            text, spans = self._by_prefixes(messages, tools)
        spoken = [message[_ROLE] == _SPEAKER for message in messages]
        if any(spoken[:given]):
            if len(spans) != sum(spoken):
                problem = f"the chat template of {self.file} marks {len(spans)} turns of {sum(spoken)}"
                raise RecordError(problem, expected="a mark around each assistant's turn, or none in the prompt")
            spans = spans[sum(spoken[:given]) :]
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            raise RecordError("no assistant's turn", expected='"messages" with an assistant\'s among them')
        return SpannedText(text=text, spans=tuple(spans))

    def _text(self, messages: Sequence[Any], tools: Any, *, prompt: bool = False) -> str:
        import jinja2

        try:
            return self._compiled.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.special_tokens
            )
        except jinja2.TemplateSyntaxError as error:
            problem = f"the chat template of {self.file} is not Jinja: line {error.lineno}: {error.message}"
            raise RecordError(problem, expected="a chat template as in tokenizer_config.json") from error
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            problem = f"the chat template of {self.file} refuses the messages: {error}"
            raise RecordError(problem, expected="messages that it takes") from error

    def _by_prefixes(self, messages: Sequence[Any], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        whole = self._text(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message[_ROLE] != _SPEAKER:
                continue
            before = self._text(messages[:index], tools, prompt=True)
            after = self._text(messages[: index + 1], tools)
            if not (whole.startswith(after) and after.startswith(before)):
                raise RecordError(
                    f"messages[{index}]: the chat template of {self.file} marks no turns and rewrites earlier ones, so "
                    "the assistant's words cannot be told apart",
                    expected="a template with {% generation %}, in data.chat_template",
                )
            spans.append((len(before), len(after.rstrip())))
        return whole, spans


def _messages(record: Any) -> tuple[list[Mapping[str, Any]], int]:
    """(the messages of a record, how many of them are its prompt's and not trained)."""
    expected = '"messages", a non-empty list of objects with "role", or "prompt" and "completion"'
    if not isinstance(record, Mapping):
        raise RecordError("not a JSON object", expected=expected)
    given = 0
    if "messages" in record or "prompt" not in record:
        messages: Any = record.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RecordError('"messages" is not a list of messages', expected=expected)
    else:
        prompt, completion = (_turns(record, key, role) for key, role in (("prompt", "user"), ("completion", _SPEAKER)))
        messages, given = [*prompt, *completion], len(prompt)
    messages = [in_our_words(message) for message in messages]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get(_ROLE), str):
            raise RecordError(f"messages[{index}] has no role", expected=expected)
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError('"messages" holds half a surrogate pair', expected="Unicode text") from error
    if _MARK.search(text):
        raise RecordError('"messages" holds a Unicode noncharacter', expected="Unicode text")
    return messages, given


def _turns(record: Mapping[str, Any], key: str, role: str) -> list[Any]:
    """A text as one turn, or a list of messages as it is."""
    value = record.get(key)
    if isinstance(value, str):
        return [{_ROLE: role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RecordError(f'"{key}" is not a string', expected="a string, or a list of messages")
    return value


def _cut_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """(text without marks, spans that stood between them)."""
    parts, spans = [], []
    length = 0
    for index, part in enumerate(re.split(_MARK, marked)):
        if index % 2:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return "".join(parts), spans


@functools.cache
def _environment() -> Any:
    """The sandbox that templates run in, with what `transformers` offers them; but no clock: tokens depend on data."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
