"""The site: complete, without dead ends, readable in light and dark, and without a
request to another host."""

import ast
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from build_site import modules
from contents import lessons
from html_pages import broken_links, loaded_from_elsewhere, pages_of
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.name[0].isdigit()]
MODULES = [name for name in modules() if name != "checks"]

# A page of each kind, which is looked at in both themes.
LOOKED_AT = (
    "index",
    "docs/results",
    "docs/teaching",
    "search",
    "notebooks/results/comparison",
    "api/index",
    "api/lora",
    "exercises/02_lora_layer",
    *(f"notebooks/{path.stem}" for path in NOTEBOOKS),
)


@pytest.fixture(scope="module")
def pages(site):
    """All pages as they were built, by path."""
    return pages_of(site)


@pytest.fixture(scope="module")
def address(site, serve):
    """Where the site is served."""
    return serve(site)


@pytest.fixture(scope="session")
def axe(site):
    """The script that looks for what keeps people out."""
    del site  # its packages are there once it is built
    return (ROOT / "build/npm/node_modules/axe-core/axe.min.js").read_text(
        encoding="utf-8"
    )


def test_there_is_a_page_for_everything(site):
    expected = {"index.html", "docs/results.html", "search.html", "api/index.html"}
    expected |= {f"notebooks/{path.stem}.html" for path in NOTEBOOKS}
    expected |= {
        f"notebooks/results/{path.stem}.html"
        for path in (ROOT / "notebooks/results").glob("*.md")
    }
    expected |= {f"api/{name}.html" for name in MODULES}
    if (ROOT / "docs/teaching.md").is_file():
        expected.add("docs/teaching.html")
    assert expected <= {
        path.relative_to(site).as_posix() for path in site.rglob("*.html")
    }


def test_all_links_within_the_site_lead_somewhere(pages):
    assert len(pages) > 50
    assert broken_links(pages) == []


def test_no_link_leads_to_a_file_that_only_the_project_has(pages):
    for path, page in pages.items():
        for link in page.links:
            # Sphinx keeps the sources of its pages, to be downloaded.
            assert "_sources/" in link or not re.search(r"\.(py|md)(#|$)", link), (
                path.name,
                link,
            )


def test_nothing_is_loaded_from_another_host(site, pages):
    assert loaded_from_elsewhere(site, pages) == []


def test_every_picture_says_what_it_shows(pages):
    pictures = [
        (path.name, *picture)
        for path, page in pages.items()
        for picture in page.pictures
    ]
    assert len(pictures) >= 40
    # Sphinx puts the address in the place of a missing text. A card's picture stands
    # beside the words of the card.
    mute = [
        picture
        for picture in pictures
        if (not picture[2] and "_static/cards/" not in picture[1])
        or "_images" in (picture[2] or "")
    ]
    assert mute == []


def test_no_level_of_heading_is_skipped(pages):
    for path, page in pages.items():
        if path.name == "search.html":  # a script fills it
            continue
        levels = page.headings
        assert levels.count(1) == 1, path
        assert all(
            after <= before + 1 for before, after in itertools.pairwise(levels)
        ), path


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_the_package_is_described(name, pages, site):
    described = pages[site / f"api/{name}.html"].ids
    tree = ast.parse(
        (ROOT / f"lowrank_utils/{name.replace('.', '/')}.py").read_text(
            encoding="utf-8"
        )
    )
    for node in tree.body:
        if isinstance(
            node, (ast.FunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            assert f"lowrank_utils.{name}.{node.name}" in described


@pytest.mark.parametrize("name", MODULES)
def test_no_docstring_is_shown_with_its_marks(name, site):
    text = re.sub(
        r"<[^>]+>", "", (site / f"api/{name}.html").read_text(encoding="utf-8")
    )
    assert "``" not in text
    assert "Args:" not in text


def errors_of(page):
    """Return a list that gets each error of the page's scripts, each answer that is
    one, and each on its console."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "response",
        lambda answer: (
            answer.status < 400 or errors.append(f"{answer.status} {answer.url}")
        ),
    )
    page.on(
        "console",
        lambda message: message.type == "error" and errors.append(message.text),
    )
    return errors


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_is_readable_in_light_and_dark(
    name, address, new_context, axe, screenshot
):
    page = new_context(color_scheme="light").new_page()
    errors = errors_of(page)
    page.goto(f"{address}{name}.html")
    formulas = page.locator("span.math, div.math").count()
    expect(page.locator("mjx-container")).to_have_count(formulas)
    page.evaluate(axe)
    picture = name.replace("/", "-")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        # In the other theme only colours are others.
        rules = {} if theme == "light" else {"runOnly": ["color-contrast"]}
        found = page.evaluate(
            "rules => axe.run(document, {...rules, resultTypes: ['violations']})", rules
        )
        assert found["passes"], "axe looked at something"
        grave = [
            rule
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
        ]
        assert grave == [], theme
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            "the page is wider than its window"
        )
        if theme == "dark":
            assert page.evaluate(PAPER) == [], "what is drawn on white has white paper"
        # In full where it is looked at for what it says; the other theme has other
        # colours alone.
        screenshot(page, f"site-{picture}-{theme}", full_page=theme == "light")
    if name.startswith("notebooks/0"):
        assert page.evaluate(CUT, ".cell pre") == [], "a line is cut"
        look_on_a_phone(page)
        screenshot(page, f"site-{picture}-phone", full_page=True)
        look_on_paper(page)
        screenshot(page, f"site-{picture}-paper", full_page=True)
    assert errors == []


# Elements that are shown and hold more than they show.
CUT = """selector => [...document.querySelectorAll(selector)]
    .filter(part => part.getClientRects().length && part.scrollWidth > part.clientWidth + 1)
    .map(part => part.textContent)"""

# Pictures in dark pages that don't stand on white, or on something beside it.
PAPER = """() => [...document.querySelectorAll('.drawing, .cell_output img')]
    .filter(part => part.getClientRects().length
        && getComputedStyle(part).backgroundColor !== 'rgb(255, 255, 255)')
    .map(part => part.outerHTML.slice(0, 80))"""

# The smallest type in each drawing and plot, in pixels: 12 points in a drawing, in a
# plot 10 points at 100 dots an inch (tests/project/test_type_sizes.py).
TYPE = """() => [
    ...[...document.querySelectorAll('.drawing > svg')]
        .map(svg => 12 * svg.clientWidth / svg.viewBox.baseVal.width),
    ...[...document.querySelectorAll('.cell_output img')].filter(img => img.clientWidth)
        .map(img => 10 / 72 * 100 * img.clientWidth / img.naturalWidth)]"""


def look_on_a_phone(page):
    """Pictures are scrolled and keep their type; the page isn't scrolled sideways."""
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.evaluate(TYPE)
    assert min(sizes, default=12) >= 12, sizes
    found = page.evaluate(
        "axe.run(document, {runOnly: ['scrollable-region-focusable']})"
    )
    assert found["violations"] == []


def look_on_paper(page):
    """Nothing is cut, and what was folded stands at the end; afterwards it is back."""
    folded = page.evaluate("document.querySelectorAll('details').length")
    before = page.evaluate("document.querySelector('article').innerText")
    # As wide as A4 between its margins.
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for what in ("pre", "div.math", "mjx-container", ".drawing", ".cell_output"):
        assert page.evaluate(CUT, f"article {what}") == [], what
    answers = page.locator("article > .answers:last-child details")
    assert answers.count() > 6
    for place in range(answers.count()):
        assert answers.nth(place).get_attribute("open") is not None
        expect(answers.nth(place).locator("summary").first).to_be_hidden()
    elsewhere = "article section:not(.answers) > details > summary"
    for summary in page.locator(elsewhere).all_inner_texts():
        assert not re.match("Answer|A sample|Solution|Hint", summary), summary
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.querySelectorAll('details').length") == folded
    assert page.evaluate("document.querySelector('article').innerText") == before


def test_formulas_are_typeset(address, page):
    page.goto(f"{address}notebooks/01_low_rank_updates.html")
    # The heading says ΔW, and so does the formula, for a screen reader too.
    expect(page.locator("mjx-container").first).to_be_visible()
    assert "Δ" in page.locator("mjx-container mjx-assistive-mml").first.text_content()


def test_all_other_pages_load_without_an_error(address, site, new_context):
    page = new_context().new_page()
    errors = errors_of(page)
    for path in site.rglob("*.html"):
        name = path.relative_to(site)
        if (
            name.parts[0] not in ("_static", "_modules")
            and name.with_suffix("").as_posix() not in LOOKED_AT
        ):
            page.goto(address + name.as_posix())
    assert errors == []


def luminance(color):
    """Return the relative luminance of a colour such as rgb(31, 35, 40), as WCAG
    defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_theme_is_switched_and_stays(address, new_context):
    page = new_context(color_scheme="light").new_page()
    page.goto(f"{address}index.html")
    page.get_by_role("button", name="Color mode").click()
    page.get_by_role("button", name="Dark").click()
    page.goto(f"{address}notebooks/02_lora_layer.html")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    ink, paper = page.evaluate(
        "() => [getComputedStyle(document.querySelector('article p')).color, "
        "getComputedStyle(document.body).backgroundColor]"
    )
    assert luminance(paper) < 0.05
    # Plots and drawings keep the white paper, and so the contrast, that they were drawn
    # with.
    picture = page.locator("article img").first
    assert picture.evaluate("picture => getComputedStyle(picture).filter") == "none"
    assert (luminance(ink) + 0.05) / (luminance(paper) + 0.05) > 7


def test_the_start_page_leads_on_and_has_a_card_for_each_notebook(address, page):
    page.goto(f"{address}index.html")
    for words, place in {
        "Read notebook 1": f"notebooks/{LESSONS[0].stem}.html",
        "Run it": "docs/setup.html",
        "Teach with it": "docs/teaching.html",
    }.items():
        start = page.get_by_role("link", name=words, exact=True)
        expect(start).to_be_in_viewport()
        expect(start).to_have_attribute("href", place)
    expect(page.locator(".frames img")).to_be_in_viewport()
    cards = page.locator("a.lesson")
    expect(cards).to_have_count(len(LESSONS))
    for place, one in enumerate(lessons()):
        assert one.title in cards.nth(place).inner_text()
        assert one.question in cards.nth(place).inner_text()
        cards.nth(place).scroll_into_view_if_needed()
        picture = cards.nth(place).locator("img").element_handle()
        page.wait_for_function("picture => picture.naturalWidth", arg=picture)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    findings = re.findall(r"^\d\. (.+): \*\*(.+)\*\*$", readme, flags=re.MULTILINE)
    shown = page.locator("section#what-came-out ol li").all_inner_texts()
    plain = [f"{words}: {number}".replace("'", "’") for words, number in findings]
    assert shown == plain
    assert len(findings) == 3


def test_words_in_a_drawing_can_be_selected(address, page):
    page.goto(f"{address}notebooks/02_lora_layer.html")
    drawing = page.locator(".drawing").first
    chosen = drawing.evaluate(
        "part => { getSelection().selectAllChildren(part); return `${getSelection()}` }"
    )
    assert "LinearWithLoRA" in chosen
    words = drawing.locator("text", has_text="LinearWithLoRA")
    outlines = words.locator("xpath=preceding-sibling::*[1]")
    over, under = words.bounding_box(), outlines.bounding_box()
    assert over["x"] == pytest.approx(under["x"], abs=3)
    assert over["width"] == pytest.approx(under["width"], rel=0.1)


def test_the_search_finds_the_notebook_on_magnitudes(address, page):
    page.goto(f"{address}search.html?q=magnitude")
    found = page.locator("#search-results li a")
    expect(found.filter(has_text="4. Magnitude and direction").first).to_be_visible()
    found.filter(has_text="4. Magnitude and direction").first.click()
    expect(page.locator("article h1")).to_contain_text("Magnitude and direction")


def test_next_leads_through_the_series_and_previous_back(address, page):
    page.goto(f"{address}index.html")
    for path in LESSONS:
        page.locator("a.right-next").click()
        page.wait_for_url(f"**/notebooks/{path.stem}.html")
    page.locator("a.left-prev").click()
    page.wait_for_url(f"**/{LESSONS[-2].stem}.html")
    # The line that the notebook itself has at its end.
    page.locator("article").get_by_role("link", name="Contents").last.click()
    page.wait_for_url("**/index.html")


def test_the_notebook_that_is_downloaded_is_the_stored_one(address, page):
    page.goto(f"{address}notebooks/05_dora.html")
    page.get_by_role("button", name="Download this page").click()
    with page.expect_download() as started:
        page.get_by_role("link", name=".ipynb").or_(
            page.locator("a.btn-download-source-button")
        ).first.click()
    name = started.value.suggested_filename
    assert name == "05_dora.ipynb"
    assert (
        Path(started.value.path()).read_bytes()
        == (ROOT / "notebooks" / name).read_bytes()
    )


def count_tagged(stem, tag, but_not=None):
    """Return how many cells of a notebook have a tag, and not another one."""
    notebook = nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    count = sum(tag in some and but_not not in some for some in tags)
    assert count > 0
    return count


def test_solutions_are_folded_and_unfold(address, page):
    page.goto(f"{address}notebooks/03_merged_and_unmerged.html")
    count = count_tagged("03_merged_and_unmerged", "solution")
    solutions = page.locator("details.hide.above-input", has_text="Show the solution")
    expect(solutions).to_have_count(count)
    for place in range(count):
        code = solutions.nth(place).locator(".cell_input pre")
        # What a solution prints is a part of it.
        printed = solutions.nth(place).locator(".cell_output pre")
        for part in (code, printed):
            expect(part).to_be_hidden()
        solutions.nth(place).locator("summary").click()
        for part in (code, printed):
            expect(part).to_be_visible()
        expect(code).to_contain_text(f"# Solution 3.{place + 1}")
        expect(printed).to_contain_text(f"Solution 3.{place + 1}: correct")


def test_what_a_prediction_asks_is_folded_and_unfolds(address, page):
    page.goto(f"{address}notebooks/01_low_rank_updates.html")
    # Where the code is folded too, one fold has both.
    count = count_tagged("01_low_rank_updates", "hide-output", "hide-input")
    outputs = page.locator("details.hide.below-input")
    expect(outputs).to_have_count(count)
    for place in range(count):
        shown = outputs.nth(place).locator(".cell_output")
        expect(shown).to_be_hidden()
        summary = outputs.nth(place).locator("summary")
        expect(summary).to_contain_text("Show what comes out")
        summary.click()
        expect(shown).to_be_visible()


@pytest.mark.parametrize("stem", ["01_low_rank_updates", "04_magnitude_and_direction"])
def test_a_slider_moves_its_picture_without_a_kernel(stem, address, page):
    page.goto(f"{address}notebooks/{stem}.html")
    expect(page.locator(".frames")).to_have_count(count_tagged(stem, "interactive"))
    # Those of one notebook are drawn in one kernel, each by its own function.
    pictures = page.locator(".frames img").all()
    assert len({one.get_attribute("src") for one in pictures}) == len(pictures)
    frames = page.locator(".frames").first
    slider, picture = frames.get_by_role("slider").first, frames.locator("img")
    assert len(picture.get_attribute("alt")) > 60
    before = picture.get_attribute("src")
    slider.press("ArrowLeft" if slider.input_value() != "0" else "ArrowRight")
    assert picture.get_attribute("src") != before
    shown = frames.locator("output").first.text_content()
    expect(slider).to_have_attribute("aria-valuetext", shown)
    slider.press("Home")
    assert slider.input_value() == "0"


def test_a_menu_chooses_its_picture_by_keys_without_a_kernel(address, page):
    page.goto(f"{address}notebooks/07_comparison.html")
    frames = page.locator(".frames")
    menu, picture = frames.get_by_label("pair"), frames.locator("img")
    names = menu.locator("option").all_text_contents()
    assert names[0] == "DoRA with m's rate − LoRA"
    shown = [picture.get_attribute("src")]
    menu.focus()
    for name in names[1:]:
        page.keyboard.press("ArrowDown")
        expect(menu.locator("option:checked")).to_have_text(name)
        shown.append(picture.get_attribute("src"))
    assert len({*shown}) == len(names)
    # The text has to fit every pair.
    assert "chosen pair" in picture.get_attribute("alt")
    page.keyboard.press("Home")
    assert picture.get_attribute("src") == shown[0]


def test_no_page_is_heavier_than_three_megabytes(site):
    for path in site.rglob("*.html"):
        assert path.stat().st_size < 3_000_000, path


def test_hints_open(address, page):
    page.goto(f"{address}notebooks/03_merged_and_unmerged.html")
    hint = page.locator("details", has=page.get_by_text(re.compile(r"^Hint"))).first
    assert hint.get_attribute("open") is None
    hint.locator("summary").click()
    assert hint.evaluate("details => details.open")
