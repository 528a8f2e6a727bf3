"""Write requirements.lock and, from it, constraints.txt and the table of licences.

    make lock                       keep the versions; add and remove what has changed
    make lock LOCK_ARGS=--upgrade   take the newest versions

uv resolves pyproject.toml once for Linux, macOS and Windows and for every Python that
the project supports; what only one of them needs carries a marker.
"""

import subprocess
import sys
from pathlib import Path

import licences

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CONSTRAINTS = ROOT / "constraints.txt"

LOCK_HEADER = """\
# What `make lab` and `make test` install: every package that the series and its tests
# need, on Linux, macOS and Windows and with Python 3.11 and newer, with the SHA-256 of
# each file that PyPI has of it. Written by tools/lock.py.
# Not in it: PyTorch's own index of CPU builds (TORCH=cpu), whose files have other hashes.
"""
CONSTRAINTS_HEADER = """\
# The versions of requirements.lock, for pip and conda, which can't install a folder
# under a file with hashes. Written by tools/lock.py.
"""


def resolved(*options: str) -> str:
    """Return what uv resolves, with hashes; the lock's versions go first."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
    command += ["--all-extras", "--universal", "--python-version=3.11", *options]
    # What an index or a user's settings say about mirrors stays out of the file.
    command += ["--no-config", "--no-emit-index-url", "--no-header", "--no-annotate"]
    command += ["--generate-hashes", f"--output-file={LOCK}", "--quiet"]
    # No shell, and nothing but constants and this script's options.
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603
    return LOCK.read_text(encoding="utf-8")


def without_hashes(lock: str) -> str:
    """Return the lines of a lock that name a version, without their hashes."""
    lines = (line for line in lock.splitlines() if line[:1].isalnum())
    return "".join(line.removesuffix("\\").rstrip() + "\n" for line in lines)


def main() -> None:
    """Resolve, and write the files."""
    lock = resolved(*sys.argv[1:])
    write_whole(LOCK, LOCK_HEADER + lock)
    write_whole(CONSTRAINTS, CONSTRAINTS_HEADER + without_hashes(lock))
    licences.main()


if __name__ == "__main__":
    main()
