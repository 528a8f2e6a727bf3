"""The talk: short slides, notes whose minutes add up, and numbers and code that a
notebook has."""

import re
from pathlib import Path

import nbformat
import pytest
from build_slides import bars, plot, slides_of

ROOT = Path(__file__).resolve().parents[2]
SLIDES = slides_of((ROOT / "docs" / "talk.md").read_text(encoding="utf-8"))
NOTEBOOKS = {
    path.stem[:2]: nbformat.read(path, as_version=4).cells
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}


def printed(cells):
    """Return what the cells print."""
    return "\n".join(
        output.get("text", "") for cell in cells for output in cell.get("outputs", [])
    )


def words(slide):
    """Return the words that stand on a slide; a line of code is no word."""
    shown = re.sub(r"!\[.*?\]\(.*?\)|```python.*?```|\]\(.*?\)", " ", slide, flags=re.S)
    shown = re.sub(r"^```\w*$|\\\w+", " ", shown, flags=re.M)
    return re.findall(r"\w[\w.,'′-]*", shown)


def test_it_has_few_words_on_few_slides_and_one_claim_on_each():
    assert 35 <= len(SLIDES) <= 40
    for slide, _ in SLIDES:
        assert len(words(slide)) <= 25, words(slide)
        assert re.match(r"##? [^\n]{8,60}\n?", slide), slide
        assert slide.count("![") <= 1
    titles = [slide.splitlines()[0] for slide, _ in SLIDES]
    assert len(set(titles)) == len(titles)
    assert len([title for title in titles if title.startswith("# ")]) >= 4


def test_every_slide_has_notes_and_their_minutes_add_up():
    minutes = []
    for slide, notes in SLIDES:
        found = re.match(r"\((\d) min\)\. (?=.{40})", notes, re.S)
        assert found, slide
        minutes.append(int(found[1]))
    assert sum(minutes) == 45
    assert len([notes for _, notes in SLIDES if "?" in notes]) >= 15, "ask the room"
    guide = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    left_out, saved = re.search(
        r"leave out slides (.+?), which take (\d+) minutes", guide
    ).groups()
    spared = [minutes[int(number) - 1] for number in re.findall(r"\d+", left_out)]
    assert sum(spared) == int(saved)


@pytest.mark.parametrize("slide", SLIDES, ids=lambda slide: slide[0].splitlines()[0])
def test_numbers_are_printed_in_a_notebook(slide):
    """Those with a decimal point or a percent sign; thousands stand at least in a text
    or in code.
    """
    text = re.sub(r"!\[.*?\]\(.*?\)|```python.*?```", " ", "\n".join(slide), flags=re.S)
    outputs = "\n".join(printed(cells) for cells in NOTEBOOKS.values())
    texts = "\n".join(cell.source for cells in NOTEBOOKS.values() for cell in cells)
    found = re.findall(r"([+-]?\d[\d,]*(?:\.\d+)?)( ?%)?", text)
    for number, percent in found:
        exact = rf"(?<![\d.,]){re.escape(number)}(?!\d|\.\d)"
        if percent or "." in number:
            assert re.search(exact, outputs), number
        elif "," in number:
            assert re.search(f"{exact}|{number.replace(',', '')}", outputs + texts)


def test_the_detective_story_has_the_numbers_of_its_methods():
    story = printed(NOTEBOOKS["07"])
    start = next(i for i, (slide, _) in enumerate(SLIDES) if "looks fair" in slide)
    lines = "\n".join(slide for slide, _ in SLIDES[start : start + 6])
    found = re.findall(r"^(?:\+ )?(\S.*) ([\d.]+) %$", lines, flags=re.M)
    assert len({name for name, _ in found}) == 7
    for name, number in found:
        assert f"{name}: {number}%" in story


def test_code_is_a_notebooks():
    sources = [cell.source for cells in NOTEBOOKS.values() for cell in cells]
    for slide, _ in SLIDES:
        for code in re.findall(r"```python\n(.*?)```", slide, flags=re.S):
            for line in code.strip().splitlines():
                assert any(line.strip() in source for source in sources), line


def test_a_bar_is_as_long_as_its_number_and_a_step_is_marked():
    shown = bars("cut to rank 1 42.5 %\n+ trained at rank 1 65.9 %\n")
    assert re.findall(r"width: ([\d.]+)%", shown) == ["42.5", "65.9"]
    assert shown.count("fragment") == 1
    assert re.findall(r"width: ([\d.]+)%", bars("a 28 GB\nb 7 GB")) == ["100.0", "25.0"]
    with pytest.raises(ValueError, match=r"85\.9%"):
        bars("after 85.9%\n")


def test_a_plot_that_is_not_there_is_refused():
    notebook = next((ROOT / "notebooks").glob("07_*.ipynb"))
    with pytest.raises(ValueError, match="no plot that is described by 'A cat'"):
        plot(notebook, "A cat")
