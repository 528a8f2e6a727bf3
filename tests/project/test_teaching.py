"""The teaching guide's times are those of the notebooks and of the measurement, and its
plans add up."""

import re
from pathlib import Path

import contents
import nbformat
import pytest
import yaml
from quiz import gift, read_questions, section

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def text_of(path):
    return "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )


# The rows of each plan, the last of which is its end.
PLANS = [
    [line for line in part.splitlines() if re.match(r"\| \d:\d\d ", line)]
    for part in re.findall(
        r"^### .*?(?=^##)", GUIDE.split("## Three plans")[1], flags=re.S | re.M
    )
][:3]

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
    sections = ["A vector", "Which axis?"]
    shown = contents.section_minutes(lesson.path, sections)
    each = [contents.section_minutes(lesson.path, [name]) for name in sections]
    assert max(each) < shown <= sum(each) < lesson.reading
    plan = {
        "at most": 70 + lesson.reading + minutes + shown,
        "parts": [
            {"minutes": 70, "what": "Break"},
            {"notebook": 4},
            {"exercise": 4.2, "how": "in pairs"},
            {"notebook": 4, "shown": sections},
        ],
    }

    def rows():
        written.write_text(yaml.safe_dump({"short": plan}))
        return contents.plan("short").splitlines()[2:]

    found = rows()
    assert found[0] == "| 0:00 | 70 | Break |"
    assert found[1] == f"| 1:10 | {lesson.reading} | Notebook 4, read and run |"
    assert found[2].endswith(f"| {minutes} | Exercise 4.2: {title}, in pairs |")
    named = '"A vector", "Which axis?"'
    assert found[3].endswith(f"| {shown} | Notebook 4, shown: {named} |")
    now = plan["at most"]
    assert found[4] == f"| {now // 60}:{now % 60:02d} |  | end |"
    plan["at most"] -= 1
    with pytest.raises(SystemExit, match=f"short takes {now} minutes"):
        rows()
    plan["at most"] += 2
    plan["parts"][3]["minutes"] = shown + 1
    assert f"| {shown + 1} | Notebook 4, shown: " in rows()[3]
    plan["parts"][3]["minutes"] = shown - 1
    with pytest.raises(SystemExit, match=f"which take {shown}"):
        rows()
    sections.append("A matrix by columns")
    with pytest.raises(SystemExit, match="has no section 'A matrix by columns'"):
        rows()


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


def test_every_question_to_discuss_has_an_answer():
    part = GUIDE.split("## Questions to discuss")[1].split("\n## ")[0]
    answered = re.findall(
        r"^\d+\. .+\?\n\n +<details><summary>Answer</summary>.{100,}</details>$",
        part,
        flags=re.MULTILINE,
    )
    assert len(answered) == len(re.findall(r"^\d+\. ", part, flags=re.MULTILINE)) == 10


def read_gift(text):
    """Return (name, question, [(mark, answer, what is said about it)]) for each
    question, by the rules of the format: a blank line ends a question, and a backslash
    stands before each ~ = # { } : that is meant as such.
    """
    sign = r"(?:[^~=#{}:\\\n]|\\[~=#{}:\\])+"
    entry = re.compile(rf"::({sign})::({sign}) \{{\n((?:\t[=~]{sign}#{sign}\n)+)\}}")

    def meant(words):
        return re.sub(r"\\(.)", r"\1", words)

    category, *questions = text.rstrip("\n").split("\n\n")
    assert category.startswith("$CATEGORY: ")
    found = []
    for question in questions:
        match = entry.fullmatch(question)
        assert match, question
        answers = re.findall(rf"\t([=~])({sign})#({sign})\n", match[3])
        found.append(
            (
                meant(match[1]),
                meant(match[2]),
                [(mark, meant(words), meant(why)) for mark, words, why in answers],
            )
        )
    return found


def test_a_learning_platform_reads_the_ten_questions_with_one_right_answer_each():
    questions = read_questions()
    found = read_gift(gift(questions))
    assert len(found) == len({name for name, _, _ in found}) == 10
    assert len({marks.index("=") for marks in map(marks_of, found)}) > 2
    for (name, ask, answers), one in zip(found, questions, strict=True):
        assert (name, ask) == (one.name, one.ask)
        assert [answer[1:] for answer in answers] == [a[:2] for a in one.answers]
        assert sorted(mark for mark, _, _ in answers) == ["=", "~", "~", "~"]
        right = next(answer.text for answer in one.answers if answer.right)
        assert ("=", right) in [answer[:2] for answer in answers]


def marks_of(question):
    return [mark for mark, _, _ in question[2]]


def test_signs_that_the_format_uses_are_meant_as_such():
    text = (
        "- {about: 1, name: 'a: b', ask: 'x = {1}, ~2 #3?', answers: "
        "[{text: 'dim=0', why: 'no: #1'}, {text: '1', why: 'yes', right: true}]}"
    )
    (one,) = read_questions(text)
    ((name, ask, answers),) = read_gift(gift([one]))
    assert (name, ask, answers[0]) == (one.name, one.ask, ("~", "dim=0", "no: #1"))
    assert "<b>b)</b> yes" in section([one])
    for wrong in ("true", "false"):
        with pytest.raises(ValueError, match=r"'a: b' has [02] right answers"):
            read_questions(
                text.replace("why: 'no: #1'", f"why: '', right: {wrong}").replace(
                    "right: true}]", f"right: {wrong}}}]"
                )
            )


def test_the_questions_of_the_quiz_that_a_plan_names_come_after_their_notebooks():
    questions = read_questions()
    assert [one.about for one in questions] == sorted(one.about for one in questions)
    asked = 0
    for rows in PLANS:
        for place, row in enumerate(rows):
            for numbers in re.findall(r"Quiz: questions (.+) \|", row):
                before = " ".join(rows[:place])
                for number in map(int, re.findall(r"\d+", numbers)):
                    assert f"Notebook {questions[number - 1].about}," in before
                    asked += 1
    assert asked


def test_every_plan_has_minutes_for_trouble_and_merging_before_dora():
    for rows in PLANS:
        assert "wrong" in rows[-2]
        merged, dora = (
            next(place for place, row in enumerate(rows) if f"Notebook {number}" in row)
            for number in (3, 5)
        )
        assert merged < dora
