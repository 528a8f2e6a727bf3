"""A folder is replaced in one step: whenever the process is killed, the old folder is
there or the new one."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_utils.adapters import folders as _folders
from lowrank_utils.adapters.folders import recover, replace_folder

pytestmark = pytest.mark.slow

OLD = {"a.json": b"old settings", "b.bin": b"old" * 1000}
NEW = {"a.json": b"new settings", "b.bin": b"new" * 1000}

# For each line "step folder" it forks a process that kills itself just before its n-th
# step that touches the disk, which Python reports to an audit hook, and says how that
# ended. The package is imported once for all of them.
CHILDREN = """
import os, signal, sys
from pathlib import Path
from lowrank_utils.adapters import folders as _folders

exchange = sys.argv[1] == "exchange"
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
for line in sys.stdin:
    number, folder = line.rstrip().split(" ", 1)
    child = os.fork()
    if child == 0:
        steps = int(number)
        sys.addaudithook(hook)
        _folders.replace_folder(Path(folder), new)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


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


@pytest.fixture
def killed_at(way):
    """Replace a folder in a process that is killed at a step, and return its status."""
    command = [sys.executable, "-c", CHILDREN, way]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:

        def run(step, folder):
            process.stdin.write(f"{step} {folder}\n")
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
@pytest.mark.parametrize("before", ["an older folder", "nothing"])
def test_killed_at_any_step_the_old_or_the_new_folder_is_there(
    tmp_path, killed_at, way, before
):
    outcomes = []
    for step in range(1, 100):
        place = tmp_path / str(step)
        place.mkdir()
        folder = place / "adapter"
        if before != "nothing":
            write(folder, OLD)
        status = killed_at(step, folder)
        assert status in (0, -signal.SIGKILL)
        if way == "exchange" and before != "nothing":
            # Readers that know nothing of recover() see a folder at every moment.
            assert folder.is_dir()
        recover(folder)
        found = content(folder) if folder.exists() else {}
        assert found in ([OLD, NEW] if before != "nothing" else [{}, NEW])
        outcomes.append(found == NEW)
        # The next attempt is not disturbed by what was left behind.
        replace_folder(folder, NEW)
        assert content(folder) == NEW
        if status == 0:
            break
    assert status == 0, "the loop must reach the end of the write"
    assert not outcomes[0]
    assert outcomes[-1]
    assert outcomes == sorted(outcomes), "once the new folder is there, it stays"
    assert len(outcomes) > 8


def left_alone(folder):
    """Assert that nothing stands beside the folder."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@EITHER_WAY
def test_nothing_is_left_beside_the_folder(tmp_path):
    folder = tmp_path / "very" / "deep" / "adapter"
    folder.mkdir(parents=True)
    for files in (OLD, NEW, OLD):
        replace_folder(folder, files)
        assert content(folder) == files
        left_alone(folder)
    shutil.rmtree(folder.parent)
    replace_folder(folder, NEW)
    assert content(folder) == NEW


def test_a_folder_with_other_files_is_left_alone(folder):
    others = {"thesis.tex": b"years of work", "notes.txt": b"more of it"}
    write(folder, OLD | others)
    said = r"also holds notes.txt, thesis.tex, .* nothing but a.json and b.bin\. Name a new"
    with pytest.raises(ValueError, match=said):
        replace_folder(folder, NEW)
    assert content(folder) == OLD | others


def test_a_file_is_not_replaced(folder):
    folder.write_bytes(b"a file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        replace_folder(folder, NEW)
    assert folder.read_bytes() == b"a file"


def test_a_link_stays_and_what_it_points_to_is_replaced(folder, tmp_path):
    write(tmp_path / "real", OLD)
    folder.symlink_to(tmp_path / "real")
    replace_folder(folder, NEW)
    assert folder.is_symlink()
    assert content(tmp_path / "real") == NEW


@EITHER_WAY
def test_a_write_that_fails_leaves_the_old_folder(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    write(folder, OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(folder, NEW)
    assert content(folder) == OLD
    left_alone(folder)


def test_everything_is_synced_before_the_folder_changes_its_name(folder, monkeypatch):
    order = []
    for module, name in ((os, "fsync"), (_folders, "_move_into_place")):
        call = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, n=name, f=call: order.append(n) or f(*a)
        )
    replace_folder(folder, NEW)
    # Two files and the folder that names them; then the folder above.
    assert order == ["fsync", "fsync", "fsync", "_move_into_place", "fsync"]


# What two processes do to each other, and what other systems can't do.


@pytest.fixture
def another_is_faster(monkeypatch):
    """Whatever tree is to be removed, another process removes it just before."""
    remove = shutil.rmtree

    def remove_twice(path, *arguments, **options):
        remove(path, ignore_errors=True)
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_twice)


@EITHER_WAY
@pytest.mark.parametrize("faster", [False, True])
def test_what_another_process_has_removed_is_no_error(folder, faster, request):
    if faster:
        request.getfixturevalue("another_is_faster")
    write(folder, NEW)
    old = folder.with_name(".adapter.old")
    write(old, OLD)
    recover(folder)
    assert content(folder) == NEW
    assert not old.exists()
    replace_folder(folder, OLD)
    assert content(folder) == OLD
    left_alone(folder)


def test_what_another_process_has_put_back_is_no_error(folder, monkeypatch):
    rename = Path.rename

    def rename_twice(path, target):
        rename(path, target)
        return rename(path, target)

    write(folder.with_name(".adapter.old"), OLD)
    monkeypatch.setattr(Path, "rename", rename_twice)
    recover(folder)
    assert content(folder) == OLD


def test_a_folder_that_another_process_puts_there_first_is_replaced(
    folder, monkeypatch
):
    rename = Path.rename

    def rename_too_late(path, target):
        if not folder.exists():
            write(folder, OLD)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    replace_folder(folder, NEW)
    assert content(folder) == NEW
    left_alone(folder)


def test_a_folder_that_cannot_be_put_there_is_an_error(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        replace_folder(folder, NEW)
    assert list(folder.parent.iterdir()) == []


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
    folder, monkeypatch, lacking
):
    if lacking == "Linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    write(folder, OLD)
    write(folder.with_name("other"), NEW)
    assert _folders._exchange(folder, folder.with_name("other")) is False
    replace_folder(folder, NEW)
    assert content(folder) == NEW
