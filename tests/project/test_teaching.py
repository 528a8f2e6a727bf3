"""The teaching guide's times are those of the notebooks and of the measurement, and its
plans add up."""

import re
from pathlib import Path

import contents
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def text_of(path):
    return "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )


HEADINGS = {
    int(path.name[:2]): re.findall(r"^#+ (.+)$", text_of(path), flags=re.MULTILINE)
    for path in NOTEBOOKS
}


def test_a_plan_adds_up_gives_each_part_its_minutes_and_ends_in_time(
    tmp_path, monkeypatch
):
    (tmp_path / "docs").mkdir()
    written = tmp_path / "docs" / "plans.yaml"
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks", target_is_directory=True)
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    lesson = contents.lessons()[3]
    title, minutes = lesson.tasks["4.2"]
    plan = {
        "at most": 70 + lesson.reading + minutes,
        "parts": [
            {"minutes": 70, "what": "Break"},
            {"notebook": 4},
            {"exercise": 4.2},
        ],
    }
    written.write_text(yaml.safe_dump({"short": plan}))
    rows = contents.plan("short").splitlines()[2:]
    assert rows[0] == "| 0:00 | 70 | Break |"
    assert rows[1] == f"| 1:10 | {lesson.reading} | Notebook 4, read and run |"
    assert rows[2].endswith(f"| {minutes} | Exercise 4.2: {title} |")
    now = plan["at most"]
    assert rows[3] == f"| {now // 60}:{now % 60:02d} |  | end |"
    plan["at most"] -= 1
    written.write_text(yaml.safe_dump({"short": plan}))
    with pytest.raises(SystemExit, match=f"short takes {now} minutes"):
        contents.plan("short")


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
