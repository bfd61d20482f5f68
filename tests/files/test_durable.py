"""A directory is whole or not there, whatever an earlier attempt left, and all of it is on the disk."""

from __future__ import annotations

import hashlib
import os
import signal

import pytest

from distilbert_fast.files import durable


def killed(work):
    """Do it in a forked process, which must not come to its end."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def begin(path, name, resume):
    with durable.building(path, resume) as partial:
        (partial / name).write_text(name)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("resume", "left"), [(False, ["new"]), (True, ["new", "old"])])
def test_what_a_killed_attempt_left(tmp_path, resume, left):
    path = tmp_path / "made"
    killed(lambda: begin(path, "old", resume))
    assert [file.name for file in tmp_path.iterdir()] == [".made.partial"]
    with durable.building(path, resume) as partial:
        assert not path.exists()
        (partial / "new").touch()
    assert sorted(os.listdir(path)) == left and os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize(("resume", "left"), [(False, []), (True, [".made.partial"])])
def test_an_attempt_that_fails(tmp_path, resume, left):
    with pytest.raises(KeyboardInterrupt), durable.building(tmp_path / "made", resume) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == left


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_is_there_is_not_written_over(tmp_path, resume):
    path = tmp_path / "made"
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(OSError), durable.building(path, resume) as partial:
        (partial / "new").touch()
    assert os.listdir(path) == ["mine"]


def test_all_that_a_directory_holds_is_flushed_and_listed(tmp_path, monkeypatch):
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    (tmp_path / "deep" / "file").write_bytes(b"abc")
    (tmp_path / "top").write_bytes(b"")
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    assert durable.flush(tmp_path) == {
        "deep/file": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        "top": {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    }
    assert set(synced) == {tmp_path, *tmp_path.rglob("*")}


def test_a_lock_is_held_by_one(tmp_path):
    filelock = pytest.importorskip("filelock")
    path = tmp_path / "new" / "made"
    with durable.lock(path), pytest.raises(filelock.Timeout):
        durable.lock(path).acquire(timeout=0)
    assert os.listdir(tmp_path / "new") == [".made.lock"]


def test_the_first_free_number(tmp_path):
    assert durable.numbered(tmp_path / "x") == tmp_path / "x-1"
    (tmp_path / "x-1").mkdir()
    (tmp_path / "x-2").symlink_to(tmp_path / "nowhere")
    assert durable.numbered(tmp_path / "x") == tmp_path / "x-3"


@pytest.mark.parametrize(
    ("names", "said"), [(["a"], "a"), (list("abc"), "a, b, c"), (list("abcde"), "a, b, c and 2 more")]
)
def test_few_names_of_many(names, said):
    assert durable.few(names) == said
