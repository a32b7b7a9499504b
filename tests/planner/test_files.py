"""Files are written as a whole, and what cannot be written is said before work begins."""

import errno
import json
import os
import tempfile

import pytest

from planner.errors import UserError
from planner.files import check_file, check_folder, check_out, write_json, write_whole, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, "old")
    write_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("stopped_in", ["write", "replace"])
def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch, stopped_in):
    path = tmp_path / "a.yaml"
    write_whole(path, "old")
    if stopped_in == "replace":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises((KeyboardInterrupt, UnicodeEncodeError)):
        write_whole(path, "new" if stopped_in == "replace" else "half \ud800")
    assert path.read_text() == "old" and names(tmp_path) == ["a.yaml"]


def test_a_write_that_fails_leaves_nothing_beside_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.yaml"
    write_whole(path, "old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"a\.yaml: cannot write: No space left on device; expected a path"):
        write_whole(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.yaml"]


def test_links_and_devices_are_written_through(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_file(pipe)
    write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


def test_what_is_written_and_the_key_are_named():
    with pytest.raises(UserError, match=r"^there: --out: cannot write the cache: Is a directory; expected") as caught:  # noqa: SIM117
        with writing("there", what="the cache", key="--out"):
            raise IsADirectoryError(21, "Is a directory")
    assert "\n" not in str(caught.value)


def test_places_that_can_be_written_are_let_be_and_left_empty(tmp_path):
    check_folder(tmp_path / "not" / "yet")
    check_file(tmp_path / "not" / "yet" / "a.json")
    check_out(tmp_path / "a.json")
    check_out(None)
    assert names(tmp_path) == []


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: --out: cannot write: Not a directory; expected"):
        check_folder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"file: --html: cannot write: Not a directory"):
        check_file(tmp_path / "file" / "a.html", key="--html")
    with pytest.raises(UserError, match=r"--out: a folder; expected the name of a file"):
        check_out(tmp_path)
    with pytest.raises(UserError, match=r"--out: no such folder \(got '.*gone/a\.json'\); expected a file in an exist"):
        check_out(tmp_path / "gone" / "a.json")


def test_a_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    def refuse(*, dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write everywhere, whatever a folder's mode
    with pytest.raises(UserError, match="--out: cannot write: Permission denied"):
        check_folder(tmp_path / "run")
