"""What is kept is there whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from lowrank_utils.comparison import grid
from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.store import Outcome, Store

(SETTINGS,) = grid.expand([{}], grid.notebook_defaults(grid.NOTEBOOK))
DONE = Outcome("{}", '{"runs": []}', "")
FAILED = Outcome("{}", None, "RuntimeError: no")


def names(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files} - {".lock"}


WHOLE = {"runs/a/notebook.ipynb", "runs/a/result.json"}


def test_a_run_that_failed_and_then_did_not(store):
    assert store.state("a") == "to do"
    store.keep("a", SETTINGS, FAILED)
    store.keep("a", SETTINGS, FAILED._replace(error="another"))
    assert store.state("a") == "failed"
    folder = store.folder / "failed" / "a"
    assert (folder / "error.txt").read_text() == "another\n"
    parameters = json.loads((folder / "parameters.json").read_text())
    assert Settings.of(parameters) == SETTINGS
    store.keep("a", SETTINGS, DONE)
    assert store.state("a") == "done"
    assert store.result("a") == {"runs": []}
    assert names(store.folder) == WHOLE


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "call", ["pathlib.Path.open", "os.fsync", "pathlib.Path.rename"]
)
def test_a_full_disk_leaves_nothing_half_written(store, monkeypatch, call):
    store.keep("a", SETTINGS, FAILED)
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(OSError, match="No space left"):
            store.keep("a", SETTINGS, DONE)
    # What was known before is still known.
    assert store.state("a") == "failed"
    assert not list(store.folder.glob(".partial-*"))
    store.keep("a", SETTINGS, DONE)
    assert store.state("a") == "done"


def test_what_a_killed_sweep_left_half_written_is_removed(tmp_path):
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x" / "result.json").write_text('{"ru')
    with Store(tmp_path).locked():
        assert names(tmp_path) == set()


def test_one_at_a_time(store):
    said = r"another sweep is at work in .*; wait for it or choose another --out"
    with pytest.raises(SweepError, match=said), Store(store.folder).locked():
        pytest.fail("both are in")


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0,
    reason="nothing is read-only to root or on Windows",
)
def test_a_read_only_folder_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    said = "can't be written"
    try:
        with pytest.raises(SweepError, match=said), Store(tmp_path).locked():
            pass
    finally:
        tmp_path.chmod(0o700)


def test_an_altered_result_is_named(store):
    store.keep("a", SETTINGS, DONE)
    path = store.folder / "runs" / "a" / "result.json"
    path.write_text('{"runs": [')
    said = r"result\.json can't be read .*; remove its folder"
    with pytest.raises(SweepError, match=said):
        store.result("a")
    shutil.rmtree(path.parent)
    assert store.state("a") == "to do"


@pytest.mark.parametrize("fails_at", ["write_text", "replace"])
def test_a_declaration_is_written_in_one_step(store, monkeypatch, fails_at):
    def stops(self, *_, **__):
        if fails_at == "write_text":
            self.write_bytes(b'{"shi')
        full()

    path, older, newer = (
        store.folder / "declared.json",
        {"steps": [64]},
        {"steps": [128]},
    )
    store.declare(older)
    with monkeypatch.context() as patch:
        patch.setattr(f"pathlib.Path.{fails_at}", stops)
        with pytest.raises(OSError, match="No space left"):
            store.declare(newer)
    assert json.loads(path.read_text()) == older
    store.declare(newer)
    assert json.loads(path.read_text()) == newer


# Killed at the n-th call that changes a file's or folder's name, or removes one, and
# between any two writes.
KILLED = """
import os, pathlib, shutil, sys
from lowrank_utils.comparison.store import Outcome, Store

folder, left = pathlib.Path(sys.argv[1]), int(sys.argv[2])


def killed_before(function):
    def wrapped(*arguments, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return function(*arguments, **options)

    return wrapped


store = Store(folder)
with store.locked():
    of_path = [(pathlib.Path, name) for name in ("rename", "replace", "write_text")]
    for owner, name in [*of_path, (os, "fsync"), (shutil, "rmtree")]:
        setattr(owner, name, killed_before(getattr(owner, name)))
    store.declare({"new": 1})
    store.keep("a", None, Outcome("{}", '{"runs": []}', ""))
    os._exit(0)
"""


@pytest.mark.parametrize("calls", range(7))
def test_whenever_a_sweep_is_killed_a_run_and_a_declaration_are_the_old_or_the_new_one(
    tmp_path, calls
):
    store = Store(tmp_path)
    with store.locked():
        store.declare({"old": 1})
        store.keep("a", SETTINGS, FAILED)
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(calls)]
    run = subprocess.run(words, check=False)
    # Two for the declaration, two files, the rename and the older failure's removal.
    assert run.returncode == (9 if calls < 6 else 0)
    with store.locked():
        declared = json.loads((tmp_path / "declared.json").read_text())
        assert declared == ({"old": 1} if calls < 2 else {"new": 1})
        assert store.state("a") == ("failed" if calls < 5 else "done")
        if store.state("a") == "done":
            assert store.result("a") == {"runs": []}
        assert not list(tmp_path.glob(".partial-*"))
        store.keep("b", SETTINGS, DONE)
    assert names(tmp_path / "runs" / "b") == {"notebook.ipynb", "result.json"}
