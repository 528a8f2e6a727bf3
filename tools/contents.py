"""Write the tables that pages take from the notebooks and from the results.

    python tools/contents.py            into README.md and two pages of docs
    python tools/contents.py --check    only fail if a page is out of date

A table stands between two marks with its name. ``make notebooks`` writes them too.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nbformat
import pandas as pd
import yaml
from minutes import reading_seconds
from quiz import read_questions, section
from repository import badges

from lowrank_utils.comparison.declared import Declaration, judge, read_declaration
from lowrank_utils.comparison.report import (
    declared_lines,
    difference_lines,
    without_one_task,
)
from lowrank_utils.comparison.tables import differences, means, read_table
from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
OPENING = re.compile(
    r"# (?P<title>.+)\n\n\*(?P<question>.+)\*\n"
    r"(?:.|\n)*About (?P<reading>\d+) minutes to read and run, (?P<exercises>\d+) for the exercises"
)
TASK = re.compile(
    r"^### Exercise (?P<number>\d+\.\d): (?P<title>.+) \(\S+, (?P<minutes>\d+) minutes\)",
    flags=re.MULTILINE,
)
OWN = "DoRA with m's rate"
# The differences that the page of the results shows task by task.
SHOWN = [
    (OWN, "DoRA with one rate"),
    (OWN, "LoRA"),
    (OWN, "LoRA matched above"),
    (OWN, "gain"),
    ("gain", "random rows"),
]


class Lesson(NamedTuple):
    """What a notebook says of itself; the minutes are for reading and for exercises.

    ``tasks`` are the exercises by their numbers: title and minutes.
    """

    path: Path
    title: str
    question: str
    reading: int
    exercises: int
    tasks: dict[str, tuple[str, int]]


def lessons() -> list[Lesson]:
    """Return all lessons in reading order."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        opening = OPENING.match("".join(cells[0]["source"]))
        if opening is None:
            raise SystemExit(f"{path.name} doesn't begin as docs/template.ipynb does")
        minutes = int(opening["reading"]), int(opening["exercises"])
        tasks = {
            task["number"]: (task["title"], int(task["minutes"]))
            for cell in cells
            for task in TASK.finditer("".join(cell["source"]))
        }
        found.append(
            Lesson(path, opening["title"], opening["question"], *minutes, tasks)
        )
    return found


def table(*rows: list[str]) -> str:
    """Return a Markdown table, the first row of which is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def series() -> str:
    """Return the map of the series."""
    head = ["notebook", "the question", "minutes to read and run", "exercises"]
    return table(
        head,
        *(
            [
                f"[{one.title}](notebooks/{one.path.name})",
                one.question,
                str(one.reading),
                str(one.exercises),
            ]
            for one in lessons()
        ),
    )


def times() -> str:
    """Return the minutes and the measured seconds of each notebook, and the sum."""
    results = ROOT / "notebooks" / "results" / "running_times.json"
    measured = json.loads(results.read_text(encoding="utf-8"))["median"]
    found = lessons()
    head = ["notebook", "read and run", "exercises", "running alone, seconds"]
    rows = [
        [
            f"[{one.title}](../notebooks/{one.path.name})",
            str(one.reading),
            str(one.exercises),
            str(measured.get(one.path.stem, "–")),
        ]
        for one in found
    ]
    reading = sum(one.reading for one in found)
    exercises = sum(one.exercises for one in found)
    total = (
        f"Together that is {reading} minutes to read and {exercises} for the exercises."
    )
    return f"{table(head, *rows)}\n\n{total}"


def section_minutes(path: Path, names: list[str]) -> int:
    """Return the minutes it takes to read and run some sections of a notebook.

    Raises:
        SystemExit: it has no section of such a name.
    """
    cells: dict[str, list[nbformat.NotebookNode]] = {}
    name = ""
    for cell in nbformat.read(path, as_version=4).cells:
        heading = re.search(r"^## (.+)", cell.source, flags=re.MULTILINE)
        if cell.cell_type == "markdown" and heading:
            name = heading[1]
        cells.setdefault(name, []).append(cell)
    missing = [name for name in names if name not in cells]
    if missing:
        raise SystemExit(f"docs/plans.yaml: {path.name} has no section {missing[0]!r}")
    return math.ceil(sum(reading_seconds(cells[name]) for name in names) / 60)


def plan(name: str) -> str:
    """Return a plan for a class, with the time at which each part begins.

    Raises:
        SystemExit: it takes more minutes than it may, or gives sections fewer than
            they take.
    """
    text = (ROOT / "docs" / "plans.yaml").read_text(encoding="utf-8")
    chosen = yaml.safe_load(text)[name]
    found = {int(one.path.name[:2]): one for one in lessons()}
    rows, now = [["start", "minutes", "what"]], 0
    for part in chosen["parts"]:
        if "shown" in part:
            number, names = part["notebook"], part["shown"]
            counted = section_minutes(found[number].path, names)
            minutes = part.get("minutes", counted)
            if minutes < counted:
                raise SystemExit(
                    f"docs/plans.yaml: {name} gives {minutes} minutes to {names}, "
                    f"which take {counted}"
                )
            what = f"Notebook {number}, shown: " + ", ".join(f'"{n}"' for n in names)
        elif "notebook" in part:
            number = part["notebook"]
            minutes, what = found[number].reading, f"Notebook {number}, read and run"
        elif "exercise" in part:
            number = str(part["exercise"])
            title, minutes = found[int(number.split(".")[0])].tasks[number]
            how = f", {part['how']}" if "how" in part else ""
            what = f"Exercise {number}: {title}{how}"
        else:
            minutes, what = part["minutes"], part["what"]
        rows.append([f"{now // 60}:{now % 60:02d}", str(minutes), what])
        now += minutes
    if now > chosen["at most"]:
        raise SystemExit(f"docs/plans.yaml: {name} takes {now} minutes")
    rows.append([f"{now // 60}:{now % 60:02d}", "", "end"])
    return table(*rows)


def quiz() -> str:
    """Return the questions of the quiz, with their answers folded."""
    return section(read_questions())


def stored(name: str = "comparison") -> pd.DataFrame:
    """Return the runs of a comparison."""
    return read_table(ROOT / "notebooks" / "results" / f"{name}.csv")


def declaration() -> Declaration:
    """Return what the default comparison declares."""
    text = (ROOT / "notebooks" / "comparison.yaml").read_text(encoding="utf-8")
    return read_declaration(yaml.safe_load(text)["declared"])


def declared() -> str:
    """Return the answers of the declared tests."""
    asked = declaration()
    return "\n\n".join(declared_lines(judge(stored(), asked), asked))


def without() -> str:
    """Return the declared differences without one of the tasks."""
    return without_one_task(stored(), declaration())


def task_by_task() -> str:
    """Return the differences at 1,280 steps and at the ranks that are declared."""
    asked, runs = declaration(), stored()
    ranks = {rank for test in asked.tests for rank in test.ranks}
    runs = runs[(runs["steps"] == 1280) & runs["shift"].isin(asked.shifts)]
    runs = runs[runs["rank"].isna() | runs["rank"].isin(ranks)]
    parts = []
    for first, second in SHOWN:
        lines = difference_lines(differences(runs, first, second))
        parts += [f"#### {first} − {second}", lines]
    return "\n\n".join(parts)


def last_layer() -> str:
    """Return the accuracies at rank 1 with and without a trained last layer."""
    runs = stored()
    runs = runs[(runs["steps"] == 1280) & (runs["rank"].isna() | (runs["rank"] == 1))]
    mean = means(runs).set_index(["shift", "method"])["mean"]
    ending = ", trained last layer"
    tasks = [name for name in declaration().shifts if name + ending in mean]
    methods = list(mean[tasks[0] + ending].index)

    def row(name: str, method: str, ending: str = "") -> list[str]:
        return [name, *(f"{100 * mean[task + ending, method]:.1f}" for task in tasks)]

    return table(
        ["method", *tasks],
        row("last layer alone", "last layer"),
        *(row(method, method) for method in methods),
        *(row(f"{one}, last layer trained", one, ending) for one in methods),
    )


def whole_mnist() -> str:
    """Return DoRA's lead over LoRA above networks pretrained on the whole MNIST."""
    runs = stored("comparison_mnist")
    return difference_lines(differences(runs[runs["steps"] == 1280], OWN, "LoRA"))


def transformer() -> str:
    """Return what each method and place reached in MiniLM, and with which rates."""
    runs = pd.read_csv(ROOT / "notebooks" / "results" / "transformer.csv")
    runs = runs[(runs["split"] > 0) & (runs["epochs"] == 4)]
    parts = ["method", "places", "rate", "factor", "dropout", "trained"]
    found = runs.groupby(parts, as_index=False)["test"].mean()
    rows = []
    for row in found.sort_values("test", ascending=False).itertuples():
        trains_all = row.method in ("full", "head")
        method = f"{row.method}, dropout {row.dropout}" if row.dropout else row.method
        rates = "–" if row.method == "head" else f"{row.rate:g}"
        if row.factor > 1 or row.method == "DoRA":
            rates += f", × {row.factor}"
        places = "–" if trains_all else row.places
        rows.append([method, places, f"{row.trained:,}", rates, f"{row.test:.1f}"])
    return table(["method", "in", "trained", "learning rate", "right"], *rows)


def four_bits() -> str:
    """Return what MiniLM reached on bases of 32, four and two bits."""
    runs = pd.read_csv(ROOT / "notebooks" / "results" / "four_bits_training.csv")
    found = runs.groupby(["method", "base"])["test"].mean()
    bases = ["32 bits", "NF4", "2 bits"]
    rows = [
        [method, *(f"{found[method, base]:.1f}" for base in bases)]
        for method in ("head", "gain alone", "LoRA")
    ]
    return table(["trained", *bases], *rows)


# Page → name of a table → what returns it.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"links": badges, "series": series},
    "docs/teaching.md": {
        "times": times,
        **{name: partial(plan, name) for name in ("90 minutes", "Half a day", "A day")},
        "quiz": quiz,
    },
    "docs/results.md": {
        "declared": declared,
        "without one task": without,
        "task by task": task_by_task,
        "last layer": last_layer,
        "whole MNIST": whole_mnist,
        "transformer": transformer,
        "four bits": four_bits,
    },
}


def renewed(text: str, name: str, content: str) -> str:
    """Return a page in which ``content`` stands between the marks of that name."""
    first = f"<!-- {name}: written by tools/contents.py -->\n"
    last = f"<!-- /{name} -->\n"
    before, rest = text.split(first)
    return f"{before}{first}\n{content}\n\n{last}{rest.split(last)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    status = 0
    for page, blocks in PAGES.items():
        path = ROOT / page
        old = new = path.read_text(encoding="utf-8")
        for name, content in blocks.items():
            new = renewed(new, name, content())
        if new != old and check:
            print(f"{page} is out of date: run python tools/contents.py")
            status = 1
        elif new != old:
            write_whole(path, new)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
