"""A folder is replaced in one step: whenever the process is killed, the old folder is
there or the new one."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_utils.adapters import folders as _folders
from lowrank_utils.adapters.folders import recover, replace_folder

OLD, NEW = (
    {"a.json": b"old settings", "b.bin": b"old" * 1000},
    {"a.json": b"new settings", "b.bin": b"new" * 1000},
)

# Kills itself just before its n-th step that touches the disk; Python reports each of
# them to an audit hook.
CHILD = """
import os, signal, sys
from pathlib import Path
from lowrank_utils.adapters import folders as _folders

folder, steps, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    _folders._exchange = lambda first, second: False
new = {"a.json": b"new settings", "b.bin": b"new" * 1000}
watched = ("open", "os.", "shutil.", "ctypes.")
count = 0

def hook(event, arguments):
    global count
    if event.startswith(watched):
        count += 1
        if count == steps:
            os.kill(os.getpid(), signal.SIGKILL)

if exchange:
    # The exchange itself can't be stopped in the middle; just after it is another
    # moment.
    swap = _folders._exchange
    def swap_and_report(first, second):
        done = swap(first, second)
        sys.audit("os.after_exchange")
        return done
    _folders._exchange = swap_and_report
sys.addaudithook(hook)
_folders.replace_folder(folder, new)
"""


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request, monkeypatch):
    """The way in which two folders change places: in one step, or as on a system that
    can't do that."""
    if request.param == "two renames":
        monkeypatch.setattr(_folders, "_exchange", lambda *_: False)


EITHER_WAY = pytest.mark.usefixtures("either_way")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
@pytest.mark.parametrize("before", ["an older folder", "nothing"])
def test_killed_at_any_step_the_old_or_the_new_folder_is_there(tmp_path, way, before):
    outcomes = []
    for step in range(1, 100):
        place = tmp_path / str(step)
        place.mkdir()
        folder = place / "adapter"
        if before != "nothing":
            write(folder, OLD)
        run = subprocess.run(
            [sys.executable, "-c", CHILD, folder, str(step), way],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        if way == "exchange" and before != "nothing":
            assert folder.is_dir(), (
                "readers that know nothing of recover() see a folder at every moment"
            )
        recover(folder)
        found = content(folder) if folder.exists() else {}
        assert found in ([OLD, NEW] if before != "nothing" else [{}, NEW])
        outcomes.append(found == NEW)
        # The next attempt is not disturbed by what was left behind.
        replace_folder(folder, NEW)
        assert content(folder) == NEW
        if run.returncode == 0:
            break
    assert run.returncode == 0, "the loop must reach the end of the write"
    assert not outcomes[0]
    assert outcomes[-1]
    assert outcomes == sorted(outcomes), "once the new folder is there, it stays"
    assert len(outcomes) > 8


@EITHER_WAY
def test_nothing_is_left_beside_the_folder(tmp_path):
    folder = tmp_path / "very" / "deep" / "adapter"
    for files in (OLD, NEW, OLD):
        replace_folder(folder, files)
        assert content(folder) == files
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "adapter").mkdir()
    replace_folder(tmp_path / "adapter", NEW)
    assert content(tmp_path / "adapter") == NEW


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    folder = tmp_path / "adapter"
    others = {"thesis.tex": b"years of work", "notes.txt": b"more of it"}
    write(folder, OLD | others)
    said = (
        "also holds notes.txt, thesis.tex, which replacing it would delete; "
        "it may hold nothing but a.json and b.bin. Name a new or an empty folder"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        replace_folder(folder, NEW)
    assert content(folder) == OLD | others


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "adapter").write_bytes(b"a file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        replace_folder(tmp_path / "adapter", NEW)
    assert (tmp_path / "adapter").read_bytes() == b"a file"


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    write(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace_folder(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == NEW


@EITHER_WAY
def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    write(tmp_path / "adapter", OLD)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(tmp_path / "adapter", NEW)
    assert content(tmp_path / "adapter") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_everything_is_synced_before_the_folder_changes_its_name(tmp_path, monkeypatch):
    order = []
    sync, move = os.fsync, _folders._move_into_place
    monkeypatch.setattr(os, "fsync", lambda d: order.append("sync") or sync(d))
    monkeypatch.setattr(
        _folders, "_move_into_place", lambda *a: order.append("move") or move(*a)
    )
    replace_folder(tmp_path / "adapter", NEW)
    # Two files and the folder that names them; then the folder above.
    assert order == ["sync", "sync", "sync", "move", "sync"]


def test_an_old_folder_beside_a_finished_new_one_is_removed(tmp_path):
    write(tmp_path / "adapter", NEW)
    write(tmp_path / ".adapter.old", OLD)
    recover(tmp_path / "adapter")
    assert content(tmp_path / "adapter") == NEW
    assert not (tmp_path / ".adapter.old").exists()


# What two processes do to each other, and what other systems can't do.


@pytest.fixture
def another_is_faster(monkeypatch):
    """Whatever tree is to be removed, another process removes it just before."""
    remove = shutil.rmtree

    def remove_twice(path, *arguments, **options):
        remove(path, ignore_errors=True)
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_twice)


@pytest.mark.usefixtures("another_is_faster")
@EITHER_WAY
def test_what_another_process_has_removed_is_no_error(tmp_path):
    write(tmp_path / "adapter", OLD)
    write(tmp_path / ".adapter.old", OLD)
    recover(tmp_path / "adapter")
    replace_folder(tmp_path / "adapter", NEW)
    assert content(tmp_path / "adapter") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_another_process_has_put_back_is_no_error(tmp_path, monkeypatch):
    write(tmp_path / ".adapter.old", OLD)
    rename = Path.rename

    def rename_twice(path, target):
        rename(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_twice)
    recover(tmp_path / "adapter")
    assert content(tmp_path / "adapter") == OLD


def test_a_folder_that_another_process_puts_there_first_is_replaced(
    tmp_path, monkeypatch
):
    folder, rename = tmp_path / "adapter", Path.rename

    def rename_too_late(path, target):
        if not folder.exists():
            write(folder, OLD)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    replace_folder(folder, NEW)
    assert content(folder) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_put_there_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        replace_folder(tmp_path / "adapter", NEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux exchanges folders in one step",
)
def test_two_folders_change_names_also_under_relative_paths(tmp_path, monkeypatch):
    write(tmp_path / "first", OLD)
    write(tmp_path / "second", NEW)
    monkeypatch.chdir(tmp_path)
    assert _folders._exchange(Path("first"), Path("second"))
    assert (content(Path("first")), content(Path("second"))) == (NEW, OLD)


@pytest.mark.parametrize("lacking", ["Linux", "the call"])
def test_a_system_that_cannot_exchange_folders_takes_two_steps(
    tmp_path, monkeypatch, lacking
):
    if lacking == "Linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    write(tmp_path / "adapter", OLD)
    write(tmp_path / "other", NEW)
    assert _folders._exchange(tmp_path / "adapter", tmp_path / "other") is False
    replace_folder(tmp_path / "adapter", NEW)
    assert content(tmp_path / "adapter") == NEW
