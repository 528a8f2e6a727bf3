"""Every notebook in JupyterLab: opened, run, and looked at as a learner sees it.

What is printed is compared with what is stored, as nbval does it; but nbval's kernels
are told to have another processor (conftest.py), and these have the machine's own.
"""

import re
from pathlib import Path

import nbformat
import pytest
from lab_pages import changes_its_picture, code_cells, run_all_cells, tags
from playwright.sync_api import expect

NOTEBOOKS = sorted((Path(__file__).resolve().parents[3] / "notebooks").glob("*.ipynb"))


# Parameters of comparison.ipynb, so that it trains less and fewer networks; nbval runs
# it as it is stored.
FEWER = {
    "seeds": [1, 2],
    "networks": [1, 2],
    "steps": [2],
    "tuning_points": 1,
    "adaptation_examples": 100,
    "pretraining_epochs": 1,
}


def with_fewer_runs(notebook):
    """Return the notebook with these values in its cell of parameters."""
    for cell in code_cells(notebook):
        for name, value in FEWER.items() if "parameters" in tags(cell) else ():
            cell.source = re.sub(
                rf"^({name}: \w+ = )[^#]*?(?= *(#|$))",
                rf"\g<1>{value}",
                cell.source,
                flags=re.MULTILINE,
            )
    return notebook


def text_of_outputs(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def printed_lines(cell):
    """Return what the cell printed, without the blanks that take a bar of progress
    away."""
    lines = text_of_outputs(cell).splitlines()
    return [line.rstrip() for line in lines if line.strip()]


def pictures(cell):
    return [
        output
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


def save(page, file):
    """Save the notebook and return what stands in its file then."""

    def is_saved(answer):
        return answer.request.method == "PUT" and answer.url.split("?")[0].endswith(
            f"/{file.name}"
        )

    with page.expect_response(is_saved) as answer:
        page.keyboard.press("Control+s")
    assert answer.value.ok
    return nbformat.read(file, as_version=4)


@pytest.mark.parametrize("stored", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(page, lab, screenshot, stored):
    expected = nbformat.read(stored, as_version=4)
    whole = stored.name != "comparison.ipynb"
    if not whole:
        with_fewer_runs(expected)
    file = lab.put(expected, stored.name)
    panel = lab.open(page, file)
    expect(panel.locator(".jp-Cell")).to_have_count(len(expected.cells))
    screenshot(page, f"{stored.stem}-start")

    run_all_cells(page, panel)
    screenshot(page, f"{stored.stem}-end")
    saved = save(page, file)

    counts = [cell.execution_count for cell in code_cells(saved)]
    assert counts == list(range(1, len(counts) + 1)), "every code cell ran, in order"
    for place, (cell, before) in enumerate(
        zip(saved.cells, expected.cells, strict=True)
    ):
        shown = panel.locator(".jp-Cell").nth(place)
        if cell.cell_type == "markdown":
            assert_text_is_rendered(shown, cell.source)
            continue
        raised = [
            output.evalue for output in cell.outputs if output.output_type == "error"
        ]
        meant = [
            output.evalue for output in before.outputs if output.output_type == "error"
        ]
        assert raised == meant, cell.source
        if whole:
            assert printed_lines(cell) == printed_lines(before), cell.source
        # What a slider draws is no picture in the file.
        count = len(pictures(before)) + ("interactive" in tags(cell))
        assert_pictures_are_shown(shown.locator(".jp-OutputArea img"), count)
        if "solution" in tags(cell):
            assert_unfolds(shown, cell.source)
        expect(shown.locator(".jp-InputPrompt")).to_have_text(
            f"[{cell.execution_count}]:"
        )
        if "exercise" in tags(cell):
            assert text_of_outputs(cell).startswith("To do: Exercise ")
            expect(shown.locator(".jp-OutputArea")).to_contain_text(
                text_of_outputs(cell).strip()
            )
        if "interactive" in tags(cell):
            assert_sliders_change_the_picture(shown)
            screenshot(page, f"{stored.stem}-slider-{place}")
    expect(page.locator(".Toastify__toast, .jp-Dialog")).to_have_count(0)


def assert_sliders_change_the_picture(cell):
    """There is a slider or a menu at least, and each changes the picture below, which is
    no larger than it was drawn."""
    sliders = cell.get_by_role("slider").or_(cell.get_by_role("combobox"))
    expect(sliders.first).to_be_visible()
    for slider in sliders.all():
        assert changes_its_picture(cell, slider), cell.inner_text()
    image = cell.locator(".jp-OutputArea img")
    assert image.evaluate("picture => picture.width / picture.naturalWidth") <= 1
    cell.scroll_into_view_if_needed()


def assert_unfolds(cell, source):
    """A solution shows its first line only; a click shows all of it."""
    code = cell.locator(".jp-InputArea-editor")
    expect(code).to_be_hidden()
    folded = cell.locator(".jp-InputPlaceholder")
    first, *_, last = source.splitlines()
    expect(folded).to_contain_text(first)
    folded.click()
    expect(code).to_be_visible()
    expect(code).to_contain_text(last.strip())


def assert_pictures_are_shown(images, count):
    """There are ``count`` pictures, and the browser could draw each."""
    expect(images).to_have_count(count)
    for image in images.all():
        image.scroll_into_view_if_needed()
        expect(image).to_be_visible()
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("picture => picture.naturalWidth") > 100


def assert_text_is_rendered(cell, source):
    """Drawings are shown, formulas are set, tables are tables."""
    assert_pictures_are_shown(cell.locator("img"), source.count("!["))
    expect(cell.locator("table")).to_have_count(
        len(re.findall(r"^\|[-| :]+\|$", source, flags=re.MULTILINE))
    )
    if "$" in source:
        expect(cell.locator("mjx-container").first).to_be_visible()
    expect(cell.locator("mjx-merror")).to_have_count(0)
