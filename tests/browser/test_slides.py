"""The talk and the handouts: nothing is cut off, the last row can read the talk in both
colour schemes, and no other host is asked."""

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
SMALLEST_IN_PLOTS, SMALLEST_IN_DRAWINGS = 10 * 100 / 72, 12

# Measures what is on the slide that is shown.
MEASURE = """() => {
  const slide = Reveal.getCurrentSlide();
  const shown = [...slide.querySelectorAll('h1,h2,p,li,pre,table,img,mjx-container,.bar,.bar b')]
    .filter((part) => !part.closest('aside') && part.getClientRects().length);
  const boxes = shown.map((part) => part.getBoundingClientRect());
  const blocks = [...slide.querySelectorAll('h1,h2,p:not(:has(.picture)),.picture,ol,ul,pre,.bars,.boxes')]
    .filter((part) => !part.closest('aside')).map((part) => part.getBoundingClientRect());
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = (part) => {
    const color = part ? getComputedStyle(part).backgroundColor : getComputedStyle(document.body).backgroundColor;
    return !part || !color.endsWith(', 0)') ? light(color) : paper(part.parentElement);
  };
  const contrast = (part) => {
    const both = [light(getComputedStyle(part).color), paper(part)].sort((a, b) => a - b);
    return (both[1] + 0.05) / (both[0] + 0.05);
  };
  return {
    index: Reveal.getIndices().h,
    title: slide.querySelector('h1,h2').innerText,
    text: slide.innerText,
    notes: slide.querySelector('aside.notes').textContent.trim(),
    parts: shown.length,
    left: Math.min(...boxes.map((box) => box.left)),
    right: Math.max(...boxes.map((box) => box.right)),
    bottom: Math.max(...boxes.map((box) => box.bottom)),
    overlaps: blocks.filter((box, place) => place && box.top < blocks[place - 1].bottom - 1).length,
    wide: shown.filter((part) => part.scrollWidth > part.clientWidth + 1 && part.matches('pre,table,p')).length,
    letters: Math.min(...shown.filter((part) => part.innerText?.trim()).map((part) => parseFloat(getComputedStyle(part).fontSize))),
    contrast: Math.min(...shown.filter((part) => part.innerText?.trim()).map(contrast)),
    pictures: shown.filter((part) => part.matches('img')).map((part) => ({
      source: part.getAttribute('src'), width: part.width, natural: part.naturalWidth})),
    hidden: [...slide.querySelectorAll('.fragment')].filter((part) => getComputedStyle(part).visibility === 'hidden').length,
    errors: slide.querySelectorAll('mjx-merror').length,
  };
}"""


@pytest.fixture(scope="module")
def address(slides, serve):
    """Where the talk and the handouts are served."""
    return serve(slides)


@pytest.fixture(scope="module")
def pages(slides):
    """The talk, the handouts, and the page that lists them."""
    return {path: Page(path) for path in sorted(slides.glob("*.html"))}


def test_every_notebook_has_a_handout_and_all_links_lead_somewhere(slides, pages):
    handouts = [f"{path.stem}.html" for path in NOTEBOOKS]
    assert [path.name for path in pages] == [*handouts, "index.html", "talk.html"]
    assert pages[slides / "index.html"].links == ["talk.html", *handouts]
    assert pages[slides / "talk.html"].links == handouts
    drawn = {
        path: [(address.partition("#")[0], words) for address, words in page.pictures]
        for path, page in pages.items()
    }
    for path, page in pages.items():
        page.pictures = drawn[path]
    assert broken_links(pages) == []


def test_nothing_is_loaded_from_another_host(slides, pages):
    assert loaded_from_elsewhere(slides, pages) == []


def test_every_picture_says_what_it_shows(slides, pages):
    talk = slides / "talk.html"
    for path, page in pages.items():
        words = [words for _, words in page.pictures]
        assert None not in words
        # Of a picture in steps, the first says it for all.
        assert path == talk or "" not in words, path
    assert len([words for _, words in pages[talk].pictures if words]) >= 18


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_keys_lead_through_the_talk_and_every_slide_fits_and_is_read(
    scheme, address, new_context, screenshot
):
    page = new_context(color_scheme=scheme).new_page()
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    page.goto(f"{address}talk.html")
    page.wait_for_function("() => window.Reveal && Reveal.isReady()")
    page.evaluate("() => MathJax.startup.promise")
    assert page.locator("section mjx-container").count() >= 4
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    shown, steps = {}, 0
    while page.evaluate("() => !Reveal.isLastSlide()") or not shown:
        found = page.evaluate(MEASURE)
        shown[found["index"]] = found
        page.keyboard.press("Space")
        steps += 1
        assert steps < 200
    last = page.evaluate(MEASURE)
    shown[last["index"]] = last
    # A slide's last state is measured, in which all its steps are there.
    assert [*shown] == list(range(page.evaluate("() => Reveal.getTotalSlides()")))
    assert steps > len(shown) + 30, "built up in steps"
    for place, slide in shown.items():
        assert slide["hidden"] == 0, slide
        assert slide["parts"], slide
        assert min(slide["left"], WIDTH - slide["right"]) >= 40, slide
        assert slide["bottom"] <= HEIGHT - 20, slide
        assert slide["overlaps"] == slide["wide"] == slide["errors"] == 0, slide
        assert slide["letters"] >= LETTERS, slide
        assert slide["contrast"] >= 4.5, slide
        assert "$" not in slide["text"], slide
        assert len(slide["notes"]) > 40, slide
        for picture in slide["pictures"]:
            assert picture["natural"], picture
            view = re.search(r"viewBox\(\S+?,\S+?,(\S+?),", picture["source"])
            # The plots are 7.2 inches wide, also where an inch has more than 100 dots.
            size = float(view[1]) if view else min(picture["natural"], 720)
            smallest = SMALLEST_IN_DRAWINGS if view else SMALLEST_IN_PLOTS
            assert picture["width"] / size * smallest >= LETTERS - 0.1, slide
        if place % 8 == 0:
            page.evaluate("(place) => Reveal.slide(place, 0, 99)", place)
            screenshot(page, f"talk-{scheme}-{place + 1:02d}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_handout_has_everything_and_shows_no_answer_before_it_is_asked_for(
    path, address, new_context, screenshot
):
    page = new_context().new_page()
    page.goto(f"{address}{path.stem}.html")
    page.evaluate("() => MathJax.startup.promise")
    text = page.evaluate("() => document.querySelector('main').innerText")
    whole = page.evaluate("() => document.querySelector('main').textContent")
    asked = False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            asked = "**Predict.**" in cell.source
            for heading in re.findall(r"^##+ (.+)$", cell.source, flags=re.M):
                assert heading.replace("*", "").replace("`", "") in text
            continue
        assert cell.source in whole
        assert ("# Solution" in cell.source) <= (cell.source not in text)
        for output in cell.outputs:
            assert output.get("text", "").rstrip() in whole
            if asked and len(output.get("text", "")) > 40:
                assert output.text.rstrip() not in text
    assert "$$" not in text
    assert page.evaluate("() => document.documentElement.scrollWidth") <= WIDTH
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    cut = "(part) => part.scrollWidth > part.clientWidth + 1"
    assert (
        page.evaluate(
            f"() => [...document.querySelectorAll('pre')].filter({cut}).length"
        )
        == 0
    )
    lost = "(picture) => !picture.naturalWidth || !picture.getClientRects().length"
    assert page.evaluate(f"() => [...document.images].filter({lost}).length") == 0
    screenshot(page, f"handout-{path.stem}", full_page=True)
