"""The quiz of docs/quiz.yaml: as a section of the teaching guide, and as the file in
GIFT format that Moodle and other learning platforms import.
"""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
GIFT_FILE = "quiz.gift.txt"


class Answer(NamedTuple):
    """An answer, whether it is right, and why."""

    text: str
    why: str
    right: bool = False


class Question(NamedTuple):
    """A question, the number of the notebook that it is about, and its answers."""

    about: int
    name: str
    ask: str
    answers: list[Answer]


def read_questions(text: str | None = None) -> list[Question]:
    """Return the questions of docs/quiz.yaml, or of another text in its form.

    Raises:
        ValueError: a question has no right answer, or several.
    """
    if text is None:
        text = (ROOT / "docs" / "quiz.yaml").read_text(encoding="utf-8")
    found = [
        Question(**{**one, "answers": [Answer(**answer) for answer in one["answers"]]})
        for one in yaml.safe_load(text)
    ]
    for one in found:
        right = sum(answer.right for answer in one.answers)
        if right != 1:
            raise ValueError(f"docs/quiz.yaml: {one.name!r} has {right} right answers")
    return found


def section(questions: list[Question]) -> str:
    """Return the questions as Markdown, their answers folded."""
    lines = []
    for number, one in enumerate(questions, start=1):
        lines.append(f"**{number}.** {one.ask} (Notebook {one.about}.)\n")
        letters = "abcdefgh"[: len(one.answers)]
        # An answer that is code looks like code.
        shown = [
            f"`{answer.text}`" if "weight." in answer.text else answer.text
            for answer in one.answers
        ]
        lines.append(
            "\\\n".join(
                f"{letter}) {text}" for letter, text in zip(letters, shown, strict=True)
            )
        )
        right = next(a for a in zip(letters, one.answers, strict=True) if a[1].right)
        wrong = " ".join(
            f"{letter}) {answer.why}"
            for letter, answer in zip(letters, one.answers, strict=True)
            if not answer.right
        )
        lines.append(
            f"\n<details><summary>Answer</summary><p><b>{right[0]})</b> {right[1].why}"
            f"</p><p>And the others: {wrong}</p></details>\n"
        )
    return "\n".join(lines).rstrip()


def gift(questions: list[Question]) -> str:
    """Return the questions in Moodle's GIFT format: the right answer after =, wrong
    ones after ~, and what is said about each after #.
    """

    def plain(text: str) -> str:
        return re.sub(r"([~=#{}:\\])", r"\\\1", text)

    parts = ["$CATEGORY: $course$/LoRA and DoRA from scratch"]
    for one in questions:
        answers = "\n".join(
            f"\t{'=' if answer.right else '~'}{plain(answer.text)}#{plain(answer.why)}"
            for answer in one.answers
        )
        parts.append(f"::{plain(one.name)}::{plain(one.ask)} {{\n{answers}\n}}")
    return "\n\n".join(parts) + "\n"
