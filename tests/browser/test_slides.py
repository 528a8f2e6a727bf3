"""The slides: nothing is cut off at 1280 × 720, the last row can read it, and no other
host is asked."""

import re
from pathlib import Path

import nbformat
import pytest
from html_pages import Page, broken_links, loaded_from_elsewhere

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WIDTH, HEIGHT = 1280, 720
# Pixels that the last row reads. The points in pictures are what
# tests/project/test_type_sizes.py holds.
LETTERS = 18
SMALLEST_IN_PLOTS, SMALLEST_IN_DRAWINGS = 10, 12

# Goes to each slide, shows all of it, and measures what is on it.
MEASURE = """() => Reveal.getSlides().map((slide) => {
  const {h, v} = Reveal.getIndices(slide);
  Reveal.slide(h, v, 99);
  const shown = [...slide.querySelectorAll('h1,h2,h3,p,li,pre,img,table,mjx-container,mjx-math')]
    .filter((part) => !part.closest('aside') && part.getClientRects().length);
  const boxes = shown.map((part) => part.getBoundingClientRect());
  const sized = shown.filter((part) => part.matches('p,li,pre,table') && part.innerText.trim());
  const pictures = shown.filter((part) => part.matches('img'));
  return {
    place: `${h}/${v}`,
    text: slide.innerText.slice(0, 60),
    parts: shown.length,
    height: slide.scrollHeight,
    bottom: Math.max(...boxes.map((box) => box.bottom)),
    right: Math.max(...boxes.map((box) => box.right)),
    letters: Math.min(...sized.map((part) => parseFloat(getComputedStyle(part).fontSize)), 99),
    pictures: pictures.map((part) => ({
      plot: part.src.startsWith('data:'),
      scales: [part.width / part.naturalWidth, part.height / part.naturalHeight],
    })),
    wide: shown.filter((part) => part.scrollWidth > part.clientWidth + 1 && part.matches('pre,table,p')).length,
  };
})"""


@pytest.fixture(scope="module")
def address(slides, serve):
    """Where the slides are served."""
    return serve(slides)


@pytest.fixture
def show(address, new_context):
    """A function that opens the slides of a notebook, with all formulas typeset."""

    def open_slides(path):
        page = new_context().new_page()
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        page.goto(f"{address}{path.stem}.html")
        page.wait_for_function("() => window.Reveal && Reveal.isReady()")
        page.evaluate("() => MathJax.startup.promise")
        return page

    return open_slides


@pytest.fixture(scope="module")
def pages(slides):
    """The page of each notebook and the one that lists them."""
    return {path: Page(path) for path in sorted(slides.glob("*.html"))}


def test_every_notebook_has_slides_and_all_links_lead_somewhere(slides, pages):
    assert [path.stem for path in pages] == [
        *(path.stem for path in NOTEBOOKS),
        "index",
    ]
    assert pages[slides / "index.html"].links == [
        f"{path.stem}.html" for path in NOTEBOOKS
    ]
    assert broken_links(pages) == []


def test_nothing_is_loaded_from_another_host(slides, pages):
    assert loaded_from_elsewhere(slides, pages) == []


def test_every_picture_says_what_it_shows(pages):
    pictures = [
        (path.name, *picture)
        for path, page in pages.items()
        for picture in page.pictures
    ]
    assert len(pictures) >= 30
    assert [picture for picture in pictures if not picture[2]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_slide_fits_and_is_large(path, show, screenshot):
    page = show(path)
    found = page.evaluate(MEASURE)
    assert len(found) > 20
    for slide in found:
        assert slide["parts"], slide
        assert slide["height"] <= HEIGHT, slide
        assert slide["bottom"] <= HEIGHT, slide
        assert slide["right"] <= WIDTH, slide
        assert slide["wide"] == 0, slide
        assert slide["letters"] >= LETTERS, slide
        for picture in slide["pictures"]:
            across, down = picture["scales"]
            assert across == pytest.approx(down, rel=0.01), slide
            smallest = (
                SMALLEST_IN_PLOTS * 100 / 72
                if picture["plot"]
                else SMALLEST_IN_DRAWINGS * 96 / 72
            )
            assert across * smallest >= LETTERS - 0.05, slide
    # Some to look at: the first, one with formulas or code, the last.
    for place in (0, len(found) // 3, 2 * len(found) // 3, len(found) - 1):
        page.evaluate(
            "([h, v]) => Reveal.slide(h, v, 99)",
            list(map(int, found[place]["place"].split("/"))),
        )
        screenshot(page, f"slides-{path.stem}-{place + 1:02d}")


def test_formulas_are_typeset(show):
    page = show(NOTEBOOKS[0])
    shown = page.locator("section mjx-container")
    assert shown.count() >= 4
    assert "$$" not in page.locator(".slides").inner_text()


def test_headings_stand_on_slides_and_solutions_only_in_the_notes(show):
    cells = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    page = show(NOTEBOOKS[0])
    notes = " ".join(page.locator("aside.notes").all_text_contents())
    slides = page.evaluate(
        "() => Reveal.getSlides().map((slide) => { const copy = slide.cloneNode(true); "
        "copy.querySelectorAll('aside').forEach((notes) => notes.remove()); return copy.textContent; })"
    )
    everything = "\n".join(slides)
    for cell in cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^##+ (.+)$", cell.source, flags=re.MULTILINE):
                assert heading.replace("'", "’") in everything.replace("'", "’")
        if "solution" in cell.metadata.get("tags", []):
            body = cell.source.splitlines()[2].strip()
            assert body in notes
            assert body not in everything
        if "exercise" in cell.metadata.get("tags", []):
            assert cell.source.splitlines()[0] in everything
    assert "Further reading" not in everything
