"""The teaching guide's times are those of the notebooks and of the measurement, and its
plans add up."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def text_of(path):
    return "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )


def stated_minutes(path):
    found = re.search(
        r"About (\d+) minutes to read and run, (\d+) for the exercises", text_of(path)
    )
    return int(found[1]), int(found[2])


READING = {int(path.name[:2]): stated_minutes(path)[0] for path in NOTEBOOKS}
EXERCISES = {
    number: int(minutes)
    for path in NOTEBOOKS
    for number, minutes in re.findall(
        r"### Exercise (\d+\.\d+): .*\(\S+, (\d+) minutes\)", text_of(path)
    )
}
HEADINGS = {
    int(path.name[:2]): re.findall(r"^#+ (.+)$", text_of(path), flags=re.MULTILINE)
    for path in NOTEBOOKS
}


PLANS = {"90 minutes": 90, "Half a day": 4 * 60, "A day": 7 * 60}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_adds_up_and_gives_each_part_its_minutes(name):
    section = GUIDE.split(f"### {name}: ")[1].split("\n#")[0]
    rows = re.findall(
        r"^\| (\d+):(\d\d) \| ?(\d*) \| (.+) \|$", section, flags=re.MULTILINE
    )
    now = 0
    for hours, minutes, length, what in rows:
        assert 60 * int(hours) + int(minutes) == now, what
        now += int(length or 0)
        if found := re.match(r"Notebook (\d), read and run", what):
            assert int(length) == READING[int(found[1])]
        if found := re.match(r"Exercise (\d\.\d)", what):
            assert int(length) == EXERCISES[found[1]]
    assert rows[-1][3] == "end"
    assert 0 < now <= PLANS[name]


def test_the_headings_that_it_names_are_there():
    # "heading" in the same row or line as the notebook that has it
    for line in GUIDE.splitlines():
        numbers = [
            int(n) for n in re.findall(r"notebooks? (\d)", line, flags=re.IGNORECASE)
        ]
        for heading in re.findall(
            r"(?:before|after|under|notebook \d,) [\"“]([^\"”]+)[\"”]", line
        ):
            plain = [
                h.replace("?", "").strip(" .,")
                for number in numbers
                for h in HEADINGS[number]
            ]
            assert heading.replace("?", "").strip(" .,") in plain, (line, heading)


def test_the_questions_that_a_plan_names_exist():
    questions = re.findall(
        r"^(\d+)\. ",
        GUIDE.split("## Questions to discuss")[1].split("\n## ")[0],
        re.MULTILINE,
    )
    assert questions == [str(n + 1) for n in range(len(questions))]
    for named in re.findall(
        r"questions? ([\d, toand]+)", GUIDE.split("## Where to stop")[0]
    ):
        assert all(
            1 <= int(number) <= len(questions) for number in re.findall(r"\d+", named)
        )
