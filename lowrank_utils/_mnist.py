"""The four files of the whole MNIST: where they are, whether they are the published
ones, and how they get there.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from platformdirs import user_cache_path

# SHA-256 of the four files as LeCun, Cortes and Burges published them, uncompressed.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# Where torchvision keeps them.
RAW = Path("MNIST", "raw")

# How long a mirror may send nothing before the download is given up.
SILENT_SECONDS = 60.0


class DataError(RuntimeError):
    """MNIST can't be used as it is; the message says what to do."""


def mnist_place() -> Path:
    """Return where the whole MNIST is looked for, whether it is there or not."""
    folder = os.environ.get("LOWRANK_DATA_DIR")
    return Path(folder).expanduser() if folder else user_cache_path("lowrank_utils")


def mnist_folder() -> Path:
    """Return the folder in which torchvision finds the whole MNIST, downloaded if need
    be, and checked.

    Raises:
        DataError: a file is missing or altered, or the download failed.
    """
    root = mnist_place()
    if os.environ.get("LOWRANK_DATA_DIR"):
        if not root.is_dir():
            raise DataError(
                f"LOWRANK_DATA_DIR names {root.absolute()}, which is no folder. Set it to the folder that "
                f"holds MNIST/raw, unset it to download, or use the data set 'mnist-5k'"
            )
        remedy = f"Put the four files {', '.join(MNIST_FILES)} of MNIST, uncompressed, into {root / RAW}"
    else:
        if not (root / "MNIST").is_dir():
            _download(root)
        remedy = f"Delete {root / 'MNIST'}, and it is downloaded again"
    _verify(root, remedy)
    return root


def _verify(root: Path, remedy: str) -> None:
    """Refuse missing or altered files by name, and say the ``remedy``."""
    raw = root / RAW
    for name, digest in MNIST_FILES.items():
        file = raw / name
        try:
            content = file.read_bytes()
        except OSError as error:
            reason = (
                "is missing"
                if isinstance(error, FileNotFoundError)
                else f"can't be read ({error.strerror})"
            )
        else:
            if hashlib.sha256(content).hexdigest() == digest:
                continue
            reason = (
                f"is not the published file ({len(content):,} bytes, wrong SHA-256)"
            )
        raise DataError(
            f"{file.absolute()} {reason}. {remedy}, or use the data set 'mnist-5k', which needs no files"
        )


def _download(root: Path) -> None:
    """Download into a folder beside the cache and move it there whole, so that no half
    is ever seen.
    """
    from torchvision.datasets import MNIST

    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
    except OSError as error:
        raise DataError(
            f"MNIST can't be stored in {root} ({error.strerror}). Set LOWRANK_DATA_DIR to a folder that "
            "holds MNIST/raw, or use the data set 'mnist-5k', which needs no files"
        ) from None
    try:
        with _no_endless_wait():
            MNIST(staging, train=True, download=True)
        _verify(staging, remedy="")
        try:
            (staging / "MNIST").rename(root / "MNIST")
        except OSError:
            # Another process was first; its files are verified like ours.
            if not (root / "MNIST").is_dir():
                raise
    except DataError:
        raise DataError(
            "the MNIST download did not give the published files, so it was thrown away. Try again, set "
            "LOWRANK_DATA_DIR to a folder that holds MNIST/raw, or use the data set 'mnist-5k'"
        ) from None
    except (OSError, RuntimeError, EOFError, HTTPException, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            "MNIST could not be downloaded. Use the data set 'mnist-5k', which needs no network, or put the "
            f"four files {', '.join(MNIST_FILES)}, uncompressed, into {root / RAW} ({reason})"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _no_endless_wait() -> Iterator[None]:
    """Let connections that are made in the block give up on a silent peer; torchvision
    would wait forever.
    """
    if socket.getdefaulttimeout() is not None:
        yield
        return
    socket.setdefaulttimeout(SILENT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)
