"""Change the package in one small way after another: does a unit test fail each time?

    python -m pip install mutmut==3.8.1        what plants the changes
    python tools/mutants.py                    all files of the table in docs/mutants.md
    python tools/mutants.py lora.py norms.py   some of the package, in it or not yet

How many changes were found is written to that table, and those that weren't to
docs/survivors.md, where the reason why is kept from run to run. Files that aren't run
now keep their rows.
"""

# ruff: noqa: S603 (it runs mutmut, never through a shell)

import argparse
import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "mutants.md"
SURVIVORS = ROOT / "docs" / "survivors.md"
WORK = ROOT / "build" / "mutants"
MUTMUT = "3.8.1"

# Left out is what takes seconds for each change, and what counts frames, among which
# mutmut puts its own.
LEFT_OUT = " or ".join(
    [
        *("torch_compile", "is_compiled", "costs_the_bytes", "every_flipped_bit"),
        *("the_line_that_made", "test_two_processes", "test_disks", "test_fuzz"),
        *("test_data", "test_training", "test_text", "test_plots", "test_imports"),
        *("test_interactive", "a_graph_holds"),
    ]
)

# What mutmut calls a change that a test found. A loop without an end and a crash of
# Python are found too.
FOUND = {"killed", "timeout", "segfault"}


class Survivor(NamedTuple):
    """A change that no test found: in which function, the line before, and the line
    after.
    """

    file: str
    function: str
    before: str
    after: str


def without_decorators(source: str) -> str:
    """Return the source with ``@property`` and the like written as the assignments that
    they stand for.

    mutmut leaves decorated functions alone, which would be the weight of DoRA and half
    of the bank. What is left to it so is a context manager: whose block it opens is
    read from the frames, and mutmut would put its own between them.
    """
    lines = source.splitlines()
    blocks = [
        node.body if isinstance(node, ast.ClassDef) else [node]
        for node in ast.parse(source).body
    ]
    for node in reversed(
        [
            node
            for block in blocks
            for node in block
            if isinstance(node, ast.FunctionDef)
            and "contextmanager" not in map(ast.unparse, node.decorator_list)
        ]
    ):
        calls = [
            f"{ast.unparse(decorator)}({node.name})"
            for decorator in reversed(node.decorator_list)
        ]
        lines[node.end_lineno : node.end_lineno] = [
            f"{' ' * node.col_offset}{node.name} = {call}" for call in calls
        ]
        if calls:
            del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def prepare(file: str) -> None:
    """Lay a copy of what mutmut needs into WORK."""
    shutil.rmtree(WORK, ignore_errors=True)
    # Python remembers of a folder on its path that it isn't there, so mutmut's copy of
    # the copy is made first.
    (WORK / "mutants").mkdir(parents=True)
    for name in ("lowrank_utils", "tests/unit", "docs"):
        shutil.copytree(
            ROOT / name, WORK / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "conftest.py", WORK)
    path = WORK / "lowrank_utils" / file
    path.write_text(
        without_decorators(path.read_text(encoding="utf-8")), encoding="utf-8"
    )
    settings = {
        "source_paths": ["lowrank_utils"],
        "only_mutate": [f"lowrank_utils/{file}"],
        "also_copy": ["conftest.py", "docs"],
        # Without unraisableexception, which collects garbage twice for each change, it
        # takes half the time.
        "pytest_add_cli_args": [
            "-pno:cacheprovider",
            "-pno:unraisableexception",
            f"-knot ({LEFT_OUT})",
        ],
        # All tests of the folder; of those mutmut takes for a change the ones that
        # reach its function.
        "pytest_add_cli_args_test_selection": [
            path.relative_to(WORK).as_posix()
            for path in sorted((WORK / "tests/unit" / file).parent.glob("test_*.py"))
        ],
        "process_isolation": "forkserver",  # torch is loaded once, and no test has run before a change is made
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    of_pytest = project["tool"]["pytest"]["ini_options"]
    lines = [
        "[tool.mutmut]",
        *(f"{name} = {json.dumps(value)}" for name, value in settings.items()),
        "[tool.pytest.ini_options]",
        *(
            f"{name} = {json.dumps(of_pytest[name])}"
            for name in ("filterwarnings", "markers", "pythonpath")
        ),
    ]
    (WORK / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def mutmut(*arguments: str, **options: bool) -> str:
    """Run mutmut in WORK, and return what it prints if that is captured."""
    variables = os.environ | {
        "PYTHONPATH": str(WORK / "mutants"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-c",
        "from mutmut.__main__ import cli; cli()",
        *arguments,
    ]
    return subprocess.run(
        command, cwd=WORK, env=variables, check=True, text=True, **options
    ).stdout


def outcomes() -> dict[str, str]:
    """Return by the name of each change what became of it."""
    lines = mutmut("results", "--all", "true", capture_output=True).splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines if ": " in line)


def survivor(name: str) -> Survivor:
    """Return what the change with this name does."""
    difference = mutmut("show", name, capture_output=True).splitlines()
    before, after = (
        " ".join(
            line[1:].strip()
            for line in difference
            if re.match(rf"{sign}(?!{sign}{sign} )", line)
        )
        for sign in (r"\-", r"\+")
    )
    _, file, function = name.split("__mutmut_")[0].split(".")
    function = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return Survivor(f"{file}.py", function, before, after or "(nothing)")


def code(text: str) -> str:
    """Return the text as code within a cell of a table."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def rows(path: Path) -> list[list[str]]:
    """Return the cells of the table in a page, without its heading and the marks of
    code.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    table = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")
    ][1:]
    return [
        [cell.replace(r"\|", "|").strip().strip("`").strip() for cell in line]
        for line in table
    ]


def write(
    path: Path, introduction: str, heading: list[str], cells: Iterable[Iterable[str]]
) -> None:
    """Write a page with one table, in one step."""
    table = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
        for line in [heading, *cells]
    ]
    table.insert(1, "|" + "---|" * len(heading))
    write_whole(path, introduction + "\n".join(table) + "\n")


def save(file: str, found: Mapping[str, str]) -> None:
    """Write what came out for one file into both pages."""
    alive = [survivor(name) for name, outcome in found.items() if outcome not in FOUND]
    killed = len(found) - len(alive)
    versions = {name: version(name).split("+")[0] for name in ("mutmut", "torch")}
    result = [
        file, str(len(found)), str(killed), str(len(alive)), f"{100 * killed / len(found):.1f} %",
        date.today().isoformat(), f"mutmut {versions['mutmut']}, Python {platform.python_version()}, torch {versions['torch']}",
    ]  # fmt: skip
    results = [result, *(row for row in rows(RESULTS) if row[0] != file)]
    write(
        RESULTS,
        RESULTS_INTRODUCTION,
        ["file", "changes", "found", "not found", "share", "date", "versions"],
        [[code(row[0]), *row[1:]] for row in sorted(results)],
    )
    stored = rows(SURVIVORS)
    reasons = {Survivor(*row[:4]): row[4] for row in stored}
    explained = [row for row in stored if row[0] != file] + [
        [*key, reasons.get(key, "")] for key in alive
    ]
    write(
        SURVIVORS,
        SURVIVORS_INTRODUCTION,
        ["file", "function", "line", "becomes", "why no test finds it"],
        [[*map(code, row[:4]), row[4]] for row in sorted(explained)],
    )


RESULTS_INTRODUCTION = """# How many small changes of the package a unit test finds

`python tools/mutants.py` makes one change after another in a copy of the package (another operator, another number, an argument less, None in the place of a value, another text in a message), runs the unit tests of that file that reach the function, and writes this table. No kind of change is left out; only what stands outside of functions and in context managers isn't changed. What wasn't found stands in [survivors.md](survivors.md), each with its reason.

"""

SURVIVORS_INTRODUCTION = """# Changes that no unit test finds

`python tools/mutants.py` writes this table and keeps the last column.

"""


def main() -> int:
    """Run the command line, and return its exit status: 0 if every survivor has its
    reason.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="of lowrank_utils; default: those in the table",
    )
    arguments = parser.parse_args()
    package = ROOT / "lowrank_utils"
    if unknown := [file for file in arguments.files if not (package / file).is_file()]:
        parser.error(f"no such file of the package: {', '.join(unknown)}")
    if importlib.util.find_spec("mutmut") is None:
        parser.error(
            f"mutmut is missing: {sys.executable} -m pip install mutmut=={MUTMUT}"
        )
    for file in arguments.files or [row[0] for row in rows(RESULTS)]:
        print(f"--- {file}", flush=True)
        prepare(file)
        mutmut("run")
        save(file, outcomes())
    unexplained = [row for row in rows(SURVIVORS) if not row[4]]
    for row in unexplained:
        print("not found, and without a reason:", *row[:4])
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
