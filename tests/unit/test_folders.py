"""A folder is replaced in one step: whenever the process is killed, the old folder is there or the new one."""

import os
import signal
import subprocess
import sys

import pytest

from lowrank_utils import _folders
from lowrank_utils._folders import recover, replace_folder

OLD, NEW = (
    {"a.json": b"old settings", "b.bin": b"old" * 1000},
    {"a.json": b"new settings", "b.bin": b"new" * 1000},
)

# Kills itself just before its n-th step that touches the disk; Python reports each of them to an audit hook.
CHILD = """
import os, signal, sys
from pathlib import Path
from lowrank_utils import _folders

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
    # The exchange itself can't be stopped in the middle; just after it is another moment.
    swap = _folders._exchange
    def swap_and_report(first, second):
        done = swap(first, second)
        sys.audit("os.after_exchange")
        return done
    _folders._exchange = swap_and_report
sys.addaudithook(hook)
_folders.replace_folder(folder, new)
"""


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
            [sys.executable, "-c", CHILD, folder, str(step), way], capture_output=True, text=True, check=False
        )
        assert run.returncode in (0, -signal.SIGKILL), run.stderr
        if way == "exchange" and before != "nothing":
            assert folder.is_dir(), "readers that know nothing of recover() see a folder at every moment"
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


@pytest.mark.parametrize("exchange", [True, False])
def test_nothing_is_left_beside_the_folder(tmp_path, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(_folders, "_exchange", lambda *_: False)
    folder = tmp_path / "deep" / "adapter"
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
    write(folder, {**OLD, "thesis.tex": b"years of work"})
    with pytest.raises(ValueError, match=r"also holds thesis\.tex, which replacing it would delete"):
        replace_folder(folder, NEW)
    assert content(folder) == {**OLD, "thesis.tex": b"years of work"}


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


@pytest.mark.parametrize("exchange", [True, False])
def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch, exchange):
    write(tmp_path / "adapter", OLD)
    if not exchange:
        monkeypatch.setattr(_folders, "_exchange", lambda *_: False)

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
    monkeypatch.setattr(_folders, "_move_into_place", lambda *a: order.append("move") or move(*a))
    replace_folder(tmp_path / "adapter", NEW)
    # Two files and the folder that names them; then the folder above.
    assert order == ["sync", "sync", "sync", "move", "sync"]


def test_an_old_folder_beside_a_finished_new_one_is_removed(tmp_path):
    write(tmp_path / "adapter", NEW)
    write(tmp_path / ".adapter.old", OLD)
    recover(tmp_path / "adapter")
    assert content(tmp_path / "adapter") == NEW
    assert not (tmp_path / ".adapter.old").exists()
