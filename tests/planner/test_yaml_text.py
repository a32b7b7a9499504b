"""YAML that is not what it looks like is one line, in whatever file or flag it stands."""

import pytest

from planner.errors import UserError
from planner.inputs import load_plan
from planner.lobra_files import read_strategy
from planner.plan import Plan
from planner.yaml_text import parse_yaml

BAD = [
    ("a: 1\nname: 2024-13-45", ":2", "bad timestamp '2024-13-45'"),
    ("a: !!int foo", ":1", "bad int 'foo'"),
    ("a: !!bool maybe", ":1", "bad bool 'maybe'"),
    ("a: !!float ''", ":1", "bad float ''"),
    ("a: !!timestamp foo", ":1", "bad timestamp 'foo'"),
    ("a: " + "9" * 5000, ":1", "bad int '999"),
    ("a: !!map foo", ":1", "expected a mapping node"),
    ("a: &x [*x]", "", "a value that holds itself, or too many levels"),
    ("a: &x {b: *x}", "", "a value that holds itself, or too many levels"),
    ("a: " + "[" * 3000, "", "a value that holds itself, or too many levels"),
    ("a: 1\na: 2", ":2", "key 'a' is given twice"),
    ("a: [", ":1", "expected the node content"),
    ("a: \x00", "", "unacceptable character"),
]
TEXTS = [text for text, _, _ in BAD]


@pytest.mark.parametrize(("text", "line", "problem"), BAD)
def test_bad_yaml_is_one_line_with_its_place(text, line, problem):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, file="f.yaml", expected="a plan")
    said = str(caught.value)
    assert f"f.yaml{line}: not YAML: " in said and problem in said and said.endswith("; expected a plan")
    assert "\n" not in said and len(said) < 300


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "load", [Plan.load, read_strategy, lambda path: load_plan(path, None, costs=None, workload=None)]
)
def test_every_reader_of_a_plan_says_so(tmp_path, text, load):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"plan\.yaml(:\d)?: not YAML"):
        load(path)


def test_a_plan_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match=r"plan\.yaml: not UTF-8 text; expected a plan\.yaml"):
        Plan.load(path)


def test_aliases_come_apart():
    both = parse_yaml("[&x {a: [1]}, *x]", file="f", expected="a list")
    both[0]["a"].append(2)
    assert both == [{"a": [1, 2]}, {"a": [1]}]
