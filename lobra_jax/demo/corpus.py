"""Makes the demo's six tasks out of the text that Python ships, as JSONL files.

Their lengths are truly unlike: a signature is tens of tokens, a module several thousand, and within each task most
examples are short and few are long. The files depend on the Python installation alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lobra_jax.demo import sources
from lobra_jax.demo.sources import Library
from lobra_jax.demo.tokenizer import strings
from planner.errors import UserError

Example = dict[str, Any]

LONGEST_CHARS = 14_000
"""Documents are cut to at most this many characters: about 4,700 tokens of the demo's tokenizer."""

RARE_ABOVE_CHARS = ((12_500, 3), (3_500, 6))
"""(characters, n): of a task's examples above so many characters, which none of the earlier pairs covers, one in n is
kept. Few are long (above about 1,200 tokens) and very few very long (4,000), as in real fine-tuning data."""

BASE_PIECE_CHARS = 2_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of the corpus: how its examples are made and how many of them are kept."""

    name: str
    description: str
    examples: Callable[[Library], Iterable[Example]]
    max_train: int
    max_eval: int
    min_examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """What was written for one task: JSONL files and their numbers of examples."""

    name: str
    description: str
    train_file: Path
    eval_file: Path
    num_train: int
    num_eval: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files of the demo's corpus. `base_file` holds {"text"} lines for tokenizer and base model only."""

    tasks: tuple[TaskFiles, ...]
    base_file: Path


def write_corpus(folder: str | Path, specs: Sequence[TaskSpec] | None = None) -> Corpus:
    """Writes FOLDER/NAME.train.jsonl and NAME.eval.jsonl of every task (of `TASKS` by default) and FOLDER/base.jsonl.

    Raises UserError when the Python installation lacks something or yields too few examples of a task.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    library = sources.read_library(sources.TASK_MODULES)
    tasks = tuple(_write_task(folder, spec, library) for spec in (TASKS if specs is None else specs))
    base_file = folder / "base.jsonl"
    _write_jsonl(base_file, base_examples())
    return Corpus(tasks=tasks, base_file=base_file)


def _write_task(folder: Path, spec: TaskSpec, library: Library) -> TaskFiles:
    examples = _skewed(_shuffled(spec.examples(library)))
    if len(examples) < spec.min_examples:
        raise UserError(
            f"task {spec.name!r} has too few examples", value=len(examples), expected=f"{spec.min_examples} or more"
        )
    eval_examples = examples[: spec.max_eval]
    train_examples = examples[spec.max_eval : spec.max_eval + spec.max_train]
    train_file, eval_file = folder / f"{spec.name}.train.jsonl", folder / f"{spec.name}.eval.jsonl"
    _write_jsonl(train_file, train_examples)
    _write_jsonl(eval_file, eval_examples)
    return TaskFiles(
        name=spec.name,
        description=spec.description,
        train_file=train_file,
        eval_file=eval_file,
        num_train=len(train_examples),
        num_eval=len(eval_examples),
    )


def _shuffled(examples: Iterable[Example]) -> list[Example]:
    """Distinct examples in the order of their hashes: unrelated to where in the library they came from."""
    lines = {json.dumps(example, sort_keys=True): example for example in examples}
    return [lines[line] for line in sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())]


def _skewed(examples: Sequence[Example]) -> list[Example]:
    """All short examples and the share of long ones that `RARE_ABOVE_CHARS` keeps, in their order."""
    kept, seen = [], dict.fromkeys(RARE_ABOVE_CHARS, 0)
    for example in examples:
        length = sum(map(len, strings(example)))
        rare = next((pair for pair in RARE_ABOVE_CHARS if length > pair[0]), None)
        if rare is not None:
            seen[rare] += 1
        if rare is None or seen[rare] % rare[1] == 1:
            kept.append(example)
    return kept


def _write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_text(text, encoding="utf-8")


def base_examples() -> list[Example]:
    """Text to pre-train the base model on: prose of modules that no task uses, and Python's licence; no code."""
    texts = [text for module in sources.read_modules(sources.BASE_MODULES) for text in sources.prose(module)]
    return _shuffled(
        {"text": piece} for text in [*texts, sources.read_licence()] for piece in sources.pieces(text, BASE_PIECE_CHARS)
    )


def signature_examples(library: Library) -> Iterator[Example]:
    """Function name -> its `def` line: tens of tokens."""
    for function in library.functions:
        yield {"prompt": f"Signature of {function.name}:\n", "completion": function.signature}


def name_examples(library: Library) -> Iterator[Example]:
    """First paragraph of a docstring -> which function it describes: tens of tokens."""
    for function in library.functions:
        if function.doc:
            summary = " ".join(function.doc.split("\n\n")[0].split())
            yield {"prompt": f"Which function? {summary}\n", "completion": function.name}


def error_examples(library: Library) -> Iterator[Example]:
    """Chat: when something goes wrong in a function, what does it raise?"""
    for function in library.functions:
        for condition, statement in sources.error_messages(function):
            yield {
                "messages": [
                    {"role": "system", "content": "You know which errors Python's library raises."},
                    {"role": "user", "content": f"In {function.name}, if {condition}?"},
                    {"role": "assistant", "content": statement},
                ]
            }


def body_examples(library: Library) -> Iterator[Example]:
    """`def` line and docstring -> the function's body: hundreds of tokens, a few beyond a thousand."""
    for function in library.functions:
        if function.doc and function.body:
            prompt = f'Implement\n{function.signature}\n"""{function.doc}"""\n'
            if len(prompt) + len(function.body) <= LONGEST_CHARS:
                yield {"prompt": prompt, "completion": function.body}


def class_examples(library: Library) -> Iterator[Example]:
    """Chat of several turns about one class: what it derives from, its methods, what it is, what each method does."""
    for found in library.classes:
        if not found.doc:
            continue
        turns = []
        if found.bases:
            turns += [("user", f"What does {found.name} derive from?"), ("assistant", ", ".join(found.bases))]
        if found.methods:
            signatures = "\n".join(method.signature for method in found.methods)
            turns += [("user", f"Which methods does {found.name} have?"), ("assistant", signatures)]
        turns += [("user", f"What is {found.name}?"), ("assistant", found.doc)]
        for method in found.methods:
            if method.doc:
                turns += [("user", f"And {method.node.name}?"), ("assistant", method.doc)]
        if sum(len(text) for _, text in turns) <= LONGEST_CHARS:
            yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def module_examples(library: Library) -> Iterator[Example]:
    """Whole modules, and the classes of modules that are longer than `LONGEST_CHARS`: to beyond 4,000 tokens."""
    for module in library.modules:
        if len(module.text) <= LONGEST_CHARS:
            yield {"text": f"# {module.name}\n{module.text}"}
    for found in library.classes:
        if len(found.module.text) > LONGEST_CHARS and len(found.source) <= LONGEST_CHARS:
            yield {"text": f"# {found.module.name}\n{found.source}"}


TASKS = (
    TaskSpec(
        name="signatures",
        description="function name -> its def line",
        examples=signature_examples,
        max_train=1200,
        max_eval=48,
        min_examples=800,
    ),
    TaskSpec(
        name="names",
        description="what a function does -> its name",
        examples=name_examples,
        max_train=1200,
        max_eval=48,
        min_examples=800,
    ),
    TaskSpec(
        name="errors",
        description="chat: condition -> raise statement",
        examples=error_examples,
        max_train=600,
        max_eval=32,
        min_examples=400,
    ),
    TaskSpec(
        name="bodies",
        description="docstring -> function body",
        examples=body_examples,
        max_train=800,
        max_eval=24,
        min_examples=600,
    ),
    TaskSpec(
        name="classes",
        description="chat about a class and its methods",
        examples=class_examples,
        max_train=400,
        max_eval=16,
        min_examples=250,
    ),
    TaskSpec(
        name="modules",
        description="whole modules and long classes",
        examples=module_examples,
        max_train=300,
        max_eval=10,
        min_examples=150,
    ),
)
