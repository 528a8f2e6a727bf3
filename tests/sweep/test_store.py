"""What is kept is there whole or not at all."""

import errno
import json
import os
import shutil

import pytest

from lowrank_utils.grid import NOTEBOOK, SweepError, expand, notebook_defaults
from lowrank_utils.settings import Settings
from lowrank_utils.store import Outcome, Store

(SETTINGS,) = expand([{}], notebook_defaults(NOTEBOOK))
DONE = Outcome("{}", '{"runs": []}', "")
FAILED = Outcome("{}", None, "RuntimeError: no")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.locked():
        yield store


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}


def test_a_run_that_is_done(store):
    assert store.state("a") == "to do"
    store.keep("a", SETTINGS, DONE)
    assert store.state("a") == "done"
    assert store.result("a") == {"runs": []}
    assert names(store.folder) == {"runs/a/notebook.ipynb", "runs/a/result.json"}


def test_a_run_that_failed_and_then_did_not(store):
    store.keep("a", SETTINGS, FAILED)
    store.keep("a", SETTINGS, FAILED._replace(error="another"))
    assert store.state("a") == "failed"
    assert (store.folder / "failed" / "a" / "error.txt").read_text() == "another\n"
    assert (
        Settings.of(json.loads((store.folder / "failed" / "a" / "parameters.json").read_text())) == SETTINGS
    )
    store.keep("a", SETTINGS, DONE)
    assert store.state("a") == "done"
    assert names(store.folder) == {"runs/a/notebook.ipynb", "runs/a/result.json"}


@pytest.mark.parametrize("fails_at", ["open", "fsync", "rename"])
def test_a_full_disk_leaves_nothing_half_written(store, monkeypatch, fails_at):
    store.keep("a", SETTINGS, FAILED)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails_at == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(f"pathlib.Path.{fails_at}", full)
        with pytest.raises(OSError, match="No space left"):
            store.keep("a", SETTINGS, DONE)
    # What was known before is still known.
    assert store.state("a") == "failed"
    assert not list(store.folder.glob(".partial-*"))
    store.keep("a", SETTINGS, DONE)
    assert store.state("a") == "done"


def test_what_a_killed_sweep_left_half_written_is_removed(tmp_path):
    store = Store(tmp_path)
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x" / "result.json").write_text('{"ru')
    with store.locked():
        assert names(tmp_path) == set()


def test_one_at_a_time(store):
    with (
        pytest.raises(
            SweepError, match=r"another sweep is at work in .*; wait for it or choose another --out"
        ),
        Store(store.folder).locked(),
    ):
        pytest.fail("both are in")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is read-only to root or on Windows")
def test_a_read_only_folder_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SweepError, match="can't be written"), Store(tmp_path).locked():
            pass
    finally:
        tmp_path.chmod(0o700)


def test_an_altered_result_is_named(store):
    store.keep("a", SETTINGS, DONE)
    path = store.folder / "runs" / "a" / "result.json"
    path.write_text('{"runs": [')
    with pytest.raises(SweepError, match=r"result\.json can't be read .*; remove its folder"):
        store.result("a")
    shutil.rmtree(path.parent)
    assert store.state("a") == "to do"
