"""Every notebook in JupyterLab, as ``make lab`` starts it: opened, run, and looked at as a learner sees it."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from lab_process import started_lab
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What the server and the notebooks read.
PARTS = ("figures", "lowrank_utils", "notebooks", "tools", "README.md", "constraints.txt", "pyproject.toml")

# Milliseconds for the longest notebook on a slow machine.
RUN = 900_000


class LabSite:
    """A running JupyterLab, and the copy of the project that it serves.

    Args:
        address: where the server is.
        token: what lets one in.
        root: the copy's folder.
    """

    def __init__(self, address: str, token: str, root: Path):
        self.address = address
        self.token = token
        self.root = root

    def put(self, notebook) -> Path:
        """Write a notebook without its stored outputs, whose counts would look like cells that have run.

        Args:
            notebook: a file among the project's notebooks, or the notebook itself.
        """
        if isinstance(notebook, Path):
            file, notebook = self.root / "notebooks" / notebook.name, nbformat.read(notebook, as_version=4)
        else:
            file = self.root / "notebooks" / "of_the_tests.ipynb"
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, file)
        return file

    def open(self, page, file: Path):
        """Open a notebook in ``page`` and return its panel when its kernel is ready."""
        path = file.relative_to(self.root).as_posix()
        page.goto(f"{self.address}/lab/tree/{path}?token={self.token}&reset")
        panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        expect(page.locator(".jp-mod-current[role=tab]", has_text=file.name)).to_be_visible()
        # The panel's own indicator calls a kernel idle that isn't there yet.
        expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
        return panel

    def end_kernels(self, page) -> None:
        """End all kernels, since each holds torch and its models in memory."""
        headers = {"Authorization": f"token {self.token}"}
        for session in page.request.get(f"{self.address}/api/sessions", headers=headers).json():
            answer = page.request.delete(f"{self.address}/api/sessions/{session['id']}", headers=headers)
            assert answer.ok


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser_type_launch_args):  # noqa: ARG001 (where there is no browser, it skips first)
    """JupyterLab on a copy of the project, for all tests here."""
    copy = tmp_path_factory.mktemp("project")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        else:
            shutil.copy(ROOT / part, copy)
    command = [sys.executable, copy / "tools" / "environment.py", "--here", "lab", "--no-browser"]
    with started_lab(command, tmp_path_factory.mktemp("jupyter")) as process:
        server = process.wait_for(process.information, seconds=180)
        yield LabSite(f"http://127.0.0.1:{server['port']}", server["token"], copy)
        assert process.elsewhere() == [], "JupyterLab or a notebook asked another machine"


@pytest.fixture
def page(page, lab):
    """As the plugin's; the kernels that a test started are ended after it."""
    yield page
    lab.end_kernels(page)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def text_of_outputs(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(cell):
    return [output for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]


def indicator(panel):
    return panel.locator(".jp-Notebook-ExecutionIndicator")


def run_all_cells(page, panel):
    """Choose that entry of the menu Run, and wait until no cell waits and the kernel is idle."""
    prompts = panel.locator(".jp-CodeCell .jp-InputPrompt")
    waiting = prompts.filter(has_text="[*]")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    # All cells to be run wait from the click on, so that none waits isn't seen too early.
    expect(prompts.first).not_to_have_text("[ ]:")
    expect(waiting).to_have_count(0, timeout=RUN)
    expect(indicator(panel)).to_have_attribute("data-status", "idle")


def save(page, file):
    """Save the notebook and return what stands in its file then."""

    def is_saved(answer):
        return answer.request.method == "PUT" and answer.url.split("?")[0].endswith(f"/{file.name}")

    with page.expect_response(is_saved) as answer:
        page.keyboard.press("Control+s")
    assert answer.value.ok
    return nbformat.read(file, as_version=4)


@pytest.mark.parametrize("stored", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(page, lab, screenshot, stored):
    file = lab.put(stored)
    expected = nbformat.read(stored, as_version=4)
    panel = lab.open(page, file)
    expect(panel.locator(".jp-Cell")).to_have_count(len(expected.cells))
    screenshot(page, f"{stored.stem}-start")

    run_all_cells(page, panel)
    screenshot(page, f"{stored.stem}-end")
    saved = save(page, file)

    counts = [cell.execution_count for cell in code_cells(saved)]
    assert counts == list(range(1, len(counts) + 1)), "every code cell ran, in order"
    for place, (cell, before) in enumerate(zip(saved.cells, expected.cells, strict=True)):
        shown = panel.locator(".jp-Cell").nth(place)
        if cell.cell_type == "markdown":
            assert_text_is_rendered(shown, cell.source)
            continue
        raised = [output.evalue for output in cell.outputs if output.output_type == "error"]
        meant = [output.evalue for output in before.outputs if output.output_type == "error"]
        assert raised == meant, cell.source
        # What a slider draws is no picture in the file.
        count = len(pictures(before)) + ("interactive" in tags(cell))
        assert_pictures_are_shown(shown.locator(".jp-OutputArea img"), count)
        if "solution" in tags(cell):
            assert_unfolds(shown, cell.source)
        expect(shown.locator(".jp-InputPrompt")).to_have_text(f"[{cell.execution_count}]:")
        if "exercise" in tags(cell):
            assert text_of_outputs(cell).startswith("To do: Exercise ")
            expect(shown.locator(".jp-OutputArea")).to_contain_text(text_of_outputs(cell).strip())
    expect(page.locator(".Toastify__toast, .jp-Dialog")).to_have_count(0)


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
    expect(cell.locator("table")).to_have_count(len(re.findall(r"^\|[-| :]+\|$", source, flags=re.MULTILINE)))
    if "$" in source:
        expect(cell.locator("mjx-container").first).to_be_visible()
    expect(cell.locator("mjx-merror")).to_have_count(0)


def test_links_to_other_notebooks_open_them_here(page, lab):
    first, second = NOTEBOOKS[:2]
    panel = lab.open(page, lab.put(first))
    lab.put(second)
    panel.locator(".jp-Cell").last.locator(f'a[href*="{second.stem}"]').last.click()
    expect(page.locator(".jp-mod-current[role=tab]", has_text=second.name)).to_be_visible()
    expect(panel.get_by_role("heading", level=1)).to_contain_text("2. ")
    panel.locator(".jp-Cell").first.locator(f'a[href*="{first.stem}"]').last.click()
    expect(page.locator(".jp-mod-current[role=tab]", has_text=first.name)).to_be_visible()
    expect(panel.get_by_role("heading", level=1)).to_contain_text("1. ")


# Sliders


def interactive(notebook):
    return [place for place, cell in enumerate(notebook.cells) if "interactive" in tags(cell)]


def changes_its_picture(cell, slider, patience=None):
    """Move a slider by a step, and tell whether the picture below becomes another one.

    Args:
        cell: the cell in the page.
        slider: the slider's handle.
        patience: how many milliseconds to wait for the other picture; by default, as for all else.
    """
    image = cell.locator(".jp-OutputArea img").last
    before = image.get_attribute("src")
    value = slider.get_attribute("aria-valuenow")
    slider.press("ArrowLeft" if value == slider.get_attribute("aria-valuemax") else "ArrowRight")
    expect(slider).not_to_have_attribute("aria-valuenow", value)
    try:
        expect(image).not_to_have_attribute("src", before, timeout=patience)
    except AssertionError:
        return False
    return True


INTERACTIVE = [path for path in NOTEBOOKS if interactive(nbformat.read(path, as_version=4))]


@pytest.mark.parametrize(
    "stored",
    INTERACTIVE
    or [pytest.param(None, marks=pytest.mark.skip(reason="no notebook has a cell tagged interactive"))],
    ids=lambda path: path.stem if path else "none",
)
def test_every_slider_of_a_notebook_changes_its_picture(page, lab, screenshot, stored):
    panel = lab.open(page, lab.put(stored))
    run_all_cells(page, panel)
    for place in interactive(nbformat.read(stored, as_version=4)):
        cell = panel.locator(".jp-Cell").nth(place)
        sliders = cell.get_by_role("slider")
        expect(sliders.first).to_be_visible()
        for slider in sliders.all():
            assert changes_its_picture(cell, slider), cell.inner_text()
        cell.scroll_into_view_if_needed()
        screenshot(page, f"{stored.stem}-slider-{place}")


SLIDERS = (
    """\
import matplotlib.pyplot as plt
from ipywidgets import FloatSlider, IntSlider, VBox, interact, interactive_output

def draw(rank):
    plt.plot([0, rank, 4])
    plt.show()
""",
    """\
rank = IntSlider(value=8, min=1, max=8)
VBox([rank, interactive_output(draw, {"rank": rank})])
""",
    """\
@interact(length=FloatSlider(value=0, min=0, max=1, step=0.1))
def always_the_same(length):
    draw(2)
""",
)


def test_a_slider_whose_picture_stays_the_same_is_noticed(page, lab):
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = new_notebook(
        cells=[new_code_cell(source) for source in SLIDERS], metadata={"kernelspec": kernel}
    )
    panel = lab.open(page, lab.put(notebook))
    run_all_cells(page, panel)
    _, changing, still = panel.locator(".jp-Cell").all()
    for cell in (changing, still):
        expect(cell.locator(".jp-OutputArea img")).to_have_count(1)
    assert changes_its_picture(changing, changing.get_by_role("slider"))
    assert not changes_its_picture(still, still.get_by_role("slider"), 3_000)
