"""Write the tables of the series, from what each notebook says in its first cell.

    python tools/contents.py            into README.md and docs/teaching.md
    python tools/contents.py --check    only fail if one of them is out of date

``make notebooks`` does it too.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
OPENING = re.compile(
    r"# (?P<title>.+)\n\n\*(?P<question>.+)\*\n"
    r"(?:.|\n)*About (?P<reading>\d+) minutes to read and run, (?P<exercises>\d+) for the exercises"
)


class Lesson(NamedTuple):
    """What a notebook says of itself; the minutes are for reading and for exercises."""

    path: Path
    title: str
    question: str
    reading: int
    exercises: int


def lessons() -> list[Lesson]:
    """Return all lessons in reading order."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        opening = OPENING.match("".join(first["source"]))
        if opening is None:
            raise SystemExit(f"{path.name} doesn't begin as docs/template.ipynb does")
        minutes = int(opening["reading"]), int(opening["exercises"])
        found.append(Lesson(path, opening["title"], opening["question"], *minutes))
    return found


def series(found: list[Lesson]) -> str:
    """Return README.md's table."""
    rows = [
        f"| [{one.title}](notebooks/{one.path.name}) | {one.question} | {one.reading} "
        f"| {one.exercises} |"
        for one in found
    ]
    heading = "| notebook | the question | minutes to read and run | exercises |"
    return "\n".join([heading, "|---|---|---|---|", *rows])


def times(found: list[Lesson]) -> str:
    """Return the teaching guide's table, and the sum."""
    results = ROOT / "notebooks" / "results" / "running_times.json"
    measured = json.loads(results.read_text(encoding="utf-8"))["median"]
    rows = [
        f"| [{one.title}](../notebooks/{one.path.name}) | {one.reading} "
        f"| {one.exercises} | {measured.get(one.path.stem, '–')} |"
        for one in found
    ]
    heading = "| notebook | read and run | exercises | running alone, seconds |"
    reading, exercises = (
        sum(getattr(one, n) for one in found) for n in ("reading", "exercises")
    )
    total = (
        f"Together that is {reading} minutes to read and {exercises} for the exercises."
    )
    return "\n".join([heading, "|---|---|---|---|", *rows, "", total])


TABLES = {"README.md": series, "docs/teaching.md": times}


def renewed(text: str, table: str) -> str:
    """Return a page whose table, between two marks, is ``table``."""
    parts = re.split(r"(<!-- (?:/)?written by tools/contents\.py -->\n)", text)
    parts[2] = f"{table}\n"
    return "".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    status = 0
    for name, table in TABLES.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if (new := renewed(text, table(lessons()))) != text:
            if check:
                print(f"{name} is out of date: run python tools/contents.py")
                status = 1
            else:
                write_whole(path, new)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
