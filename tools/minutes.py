"""How many minutes a notebook takes, or some of its cells: counted, never guessed."""

import math
import re

from nbformat import NotebookNode

# What "About N minutes" stands for: 120 words a minute, and time to read a line of code,
# to look at a plot, a drawing or a formula, and to think about a prediction.
SECONDS_PER_WORD = 0.5
SECONDS_PER_LINE = 8
SECONDS_PER_PICTURE = 45
SECONDS_PER_PREDICTION = 60


def reading_minutes(notebook: NotebookNode) -> int:
    """Return the minutes it takes to read and run what isn't folded, without the
    exercises, rounded up to five.
    """
    return 5 * math.ceil(reading_seconds(notebook.cells) / 300)


def reading_seconds(cells: list[NotebookNode]) -> float:
    """Return the seconds it takes to read and run what isn't folded in these cells,
    without the exercises.
    """
    seconds = 0.0
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            shown = running_text(cell.source)
            pictures = cell.source.count("](../figures/")
            looked_at = pictures + shown.count("$$") // 2
            seconds += SECONDS_PER_WORD * len(shown.split())
            seconds += SECONDS_PER_PICTURE * looked_at
            seconds += SECONDS_PER_PREDICTION * shown.count("**Predict.**")
        elif not tags & {"exercise", "solution"}:
            if "hide-input" not in tags:
                lines = [line for line in cell.source.splitlines() if line.strip()]
                seconds += SECONDS_PER_LINE * len(lines)
            plots = ["image/png" in o.get("data", {}) for o in cell.outputs]
            seconds += SECONDS_PER_PICTURE * sum(plots)
    return seconds


def running_text(source: str) -> str:
    """Return Markdown without what is folded, and without pictures."""
    folded_or_picture = r"<details>.*?</details>|!\[[^]]*\]\([^)]*\)"
    return re.sub(folded_or_picture, "", source, flags=re.S)


def exercise_minutes(notebook: NotebookNode) -> int:
    """Return the minutes that the exercises' headings allow, all together."""
    headings = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("### Exercise ")
    ]
    return sum(int(m) for m in re.findall(r", (\d+) minutes\)", "\n".join(headings)))
