"""Replace a folder of files in one step, so that a crash leaves the old folder or the
new one.
"""

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold ``files`` and nothing else, in one step.

    The files are written to a new folder beside it and synced to the disk before the
    two change places. A process that is killed leaves that new folder,
    ``.<name>.….new``, which can be deleted.

    Args:
        folder: made if it isn't there; where it is a symbolic link, what it points to
            is replaced.
        files: content by file name.

    Raises:
        NotADirectoryError: ``folder`` is a file.
        ValueError: it holds something that isn't among ``files`` and would be lost.
        OSError: it can't be written; what was there is still there.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a new or an empty folder")
    if folder.exists() and (
        others := sorted({path.name for path in folder.iterdir()} - files.keys())
    ):
        raise ValueError(
            f"{folder} also holds {', '.join(others)}, which replacing it would delete; "
            f"it may hold nothing but {' and '.join(files)}. Name a new or an empty folder"
        )
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
    try:
        new.mkdir()
        for name, content in files.items():
            with (new / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(new)
        _move_into_place(new, folder)
        _sync_folder(folder.parent)
    finally:
        # What was swapped out, or what could not be finished.
        shutil.rmtree(new, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put an old folder back that a crash left under its second name, where folders
    can't be exchanged.
    """
    old = _old_name(folder)
    if old.is_dir():
        # Another process may be doing the same, or may just have put its new folder
        # there.
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                old.rename(folder)


def is_being_replaced(folder: Path) -> bool:
    """Tell whether a process is at it, or was until it was killed: its new folder
    stands beside.
    """
    return any(folder.parent.glob(f".{glob.escape(folder.name)}.*.new"))


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _move_into_place(new: Path, folder: Path) -> None:
    if not folder.exists():
        try:
            new.rename(folder)
            return
        except OSError:
            # Another process that saves here was first; its folder is replaced like any
            # other.
            if not folder.is_dir():
                raise
    if not _exchange(new, folder):
        # Two steps instead of one. Between them the folder is missing, and `recover`
        # brings the old one back.
        folder.rename(_old_name(folder))
        new.rename(folder)
        shutil.rmtree(_old_name(folder), ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step; return False where the system can't do
    that.
    """
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    # The constants of Linux: AT_FDCWD, paths are relative to where the process is;
    # RENAME_EXCHANGE.
    return (
        renameat2 is not None
        and renameat2(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0
    )


def _sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` written to the disk. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
