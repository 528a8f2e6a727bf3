"""Fetch what the pages load in a browser: MathJax and reveal.js, in the versions that
docs/package-lock.json pins.

npm checks each package against the digest in the lock file. Afterwards the pages need
no other host.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Git ignores this folder, and ``make clean`` removes it.
BUILD = ROOT / "build"
FILES = ("package.json", "package-lock.json")


class MissingPackages(Exception):
    """The packages can't be had; the message says what to do."""


def install_packages() -> Path:
    """Return the folder ``node_modules`` with the packages of docs/package-lock.json,
    fetched where needed.

    Raises:
        MissingPackages: npm is missing or could not fetch them.
    """
    folder = BUILD / "npm"
    modules = folder / "node_modules"
    wanted = [(DOCS / name).read_bytes() for name in FILES]
    # npm writes its own list at the very end, so a fetch that was cut off is noticed.
    complete = (modules / ".package-lock.json").is_file()
    if complete and [(folder / name).read_bytes() for name in FILES] == wanted:
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackages(
            "npm is missing, which fetches MathJax and reveal.js for the pages: install Node.js 18 or newer from "
            "https://nodejs.org/ (on Debian and Ubuntu: sudo apt install npm), then run this again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, wanted, strict=True):
        (folder / name).write_bytes(content)
    # npm reads its settings from the environment too; none of the packages needs a
    # script of its own.
    command = [
        npm,
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
    ]
    run = subprocess.run(  # noqa: S603
        command, cwd=folder, env=os.environ, stdout=sys.stderr, check=False
    )
    if run.returncode != 0:
        raise MissingPackages(
            f"npm ended with status {run.returncode}; its lines above say why. Is there a network connection? "
            "Once there is, run this again"
        )
    return modules


def copy_mathjax(modules: Path, target: Path) -> None:
    """Copy the parts of MathJax that the pages load to the folder ``target``.

    Args:
        modules: what ``install_packages`` returned.
        target: is made where needed; ``tex-chtml.js`` lies in it afterwards.
    """
    source = modules / "mathjax" / "es5"
    # The menu of a formula offers a reader for screens, which loads the last two.
    for part in ("input/tex/extensions", "output/chtml/fonts", "a11y", "sre"):
        shutil.copytree(source / part, target / part, dirs_exist_ok=True)
    shutil.copy2(source / "tex-chtml.js", target)
