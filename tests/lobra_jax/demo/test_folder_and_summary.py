"""The demo's folder, which only a later demo may replace, and its line about tasks that learned little."""

import math

import pytest

from lobra_jax.demo import DEFAULT_STEPS
from lobra_jax.demo.run import MARKER_FILE, claim_folder
from lobra_jax.demo.summary import weak_falls
from planner.errors import UserError


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_folder_is_marked(tmp_path, said, exists):
    out = tmp_path / "deep" / "demo"
    if exists:
        out.mkdir(parents=True)
    claim_folder(out, said.append)
    assert [path.name for path in out.iterdir()] == [MARKER_FILE]
    assert said == []


def test_an_earlier_demo_is_replaced_and_links_out_of_it_are_not_followed(tmp_path, said):
    out, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    claim_folder(out, said.append)
    (out / "run" / "adapters").mkdir(parents=True)
    (out / "run" / "adapters" / "a.safetensors").write_text("old")
    (out / "plan.yaml").write_text("old")
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("mine")
    (out / "link").symlink_to(elsewhere)

    claim_folder(out, said.append)
    assert [path.name for path in out.iterdir()] == [MARKER_FILE]
    assert (elsewhere / "kept").read_text() == "mine"
    assert len(said) == 1 and "replacing an earlier demo" in said[0] and "\n" not in said[0]


def test_any_other_folder_with_something_in_it_is_refused_untouched(tmp_path, said):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    for path in (out, out / "thesis.tex"):
        with pytest.raises(UserError, match="--out: already exists.*earlier `lobra demo`"):
            claim_folder(path, said.append)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert (out / "thesis.tex").read_text() == "mine"
    assert said == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, said):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/demo: --out: cannot write: Not a directory; expected"):
        claim_folder(tmp_path / "file" / "demo", said.append)


def test_tasks_that_learned_little_are_named():
    falls = {"good": 0.4, "weak": 0.09, "enough": 0.1, "worse": -0.5, "lost": math.nan}
    line = weak_falls(falls, num_steps=DEFAULT_STEPS)
    assert line == "Held-out loss fell by less than 10%: weak, worse, lost."


def test_few_steps_are_given_as_the_reason():
    assert "expected of 2 of the usual" in weak_falls({"weak": 0.01}, num_steps=2)


@pytest.mark.parametrize("num_steps", [2, DEFAULT_STEPS])
def test_nothing_is_said_when_every_task_learned(num_steps):
    assert weak_falls({"good": 0.4, "enough": 0.1}, num_steps=num_steps) == ""
