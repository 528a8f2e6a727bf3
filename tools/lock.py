"""Write requirements.lock: every package that constraints.txt pins, for all systems,
with the hashes of its files.

    python -m pip install uv
    python tools/lock.py

uv resolves pyproject.toml under constraints.txt once for Linux, macOS and Windows and
for every Python that the project supports; what only one of them needs carries a
marker.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEADER = """\
# Every package that the series and its tests need, for Linux, macOS and Windows and for Python 3.11 and newer, in the
# versions of constraints.txt and with the SHA-256 of each file that PyPI has of it. Written by tools/lock.py.
#     python -m pip install --require-hashes -r requirements.lock
#     python -m pip install --no-deps --no-build-isolation -e .
# Not in it: PyTorch's own index of CPU builds (TORCH=cpu). Its files have other hashes than PyPI's, and that index
# could not be reached where this file was made; with the lock, Linux takes the build with CUDA.
"""


def main() -> int:
    """Resolve, and write the file; return the exit status."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--all-extras",
        "--universal",
    ]
    options = [
        "--python-version=3.11",
        "--constraints=constraints.txt",
        "--generate-hashes",
        "--no-header",
    ]
    # No shell, and nothing but constants. What an index or a user's settings say about
    # mirrors stays out of the file.
    resolved = subprocess.run(  # noqa: S603
        [
            *command,
            *options,
            "--no-annotate",
            "--no-emit-index-url",
            "--no-config",
            "--quiet",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if resolved.returncode != 0:
        print(
            "uv could not resolve pyproject.toml; is it installed (python -m pip install uv)?",
            file=sys.stderr,
        )
        return 1
    (ROOT / "requirements.lock").write_text(
        HEADER + resolved.stdout, encoding="utf-8", newline="\n"
    )
    print(
        f"Wrote requirements.lock with {sum(line[:1].isalpha() for line in resolved.stdout.splitlines())} versions."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
