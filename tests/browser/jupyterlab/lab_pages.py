"""JupyterLab in a browser: the server with its copy of the project, and what one does
on a notebook's page."""

import copy
from pathlib import Path

import nbformat
from playwright.sync_api import expect

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

    def put(self, notebook, name: str = "of_the_tests.ipynb") -> Path:
        """Write a notebook without its stored outputs, whose counts would look like
        cells that have run.

        Args:
            notebook: a file among the project's notebooks, or the notebook itself.
            name: for the notebook itself, its file's name.
        """
        if isinstance(notebook, Path):
            notebook, name = nbformat.read(notebook, as_version=4), notebook.name
        file = self.root / "notebooks" / name
        notebook = copy.deepcopy(notebook)
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, file)
        return file

    def open(self, page, file: Path):
        """Open a notebook in ``page`` and return its panel when its kernel is ready."""
        path = file.relative_to(self.root).as_posix()
        page.goto(f"{self.address}/lab/tree/{path}?token={self.token}&reset")
        panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        expect(
            page.locator(".jp-mod-current[role=tab]", has_text=file.name)
        ).to_be_visible()
        # The panel's own indicator calls a kernel idle that isn't there yet.
        expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
        return panel

    def end_kernels(self, page) -> None:
        """End all kernels, since each holds torch and its models in memory."""
        headers = {"Authorization": f"token {self.token}"}
        for session in page.request.get(
            f"{self.address}/api/sessions", headers=headers
        ).json():
            answer = page.request.delete(
                f"{self.address}/api/sessions/{session['id']}", headers=headers
            )
            assert answer.ok


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def indicator(panel):
    return panel.locator(".jp-Notebook-ExecutionIndicator")


def run_all_cells(page, panel):
    """Choose that entry of the menu Run, and wait until no cell waits and the kernel is
    idle."""
    prompts = panel.locator(".jp-CodeCell .jp-InputPrompt")
    waiting = prompts.filter(has_text="[*]")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    # All cells to be run wait from the click on, so that none waits isn't seen too
    # early.
    expect(prompts.first).not_to_have_text("[ ]:")
    expect(waiting).to_have_count(0, timeout=RUN)
    expect(indicator(panel)).to_have_attribute("data-status", "idle")


def changes_its_picture(cell, slider, patience=None):
    """Move a slider by a step, or a menu to its second entry, and tell whether the
    picture below becomes another one.

    Args:
        cell: the cell in the page.
        slider: the slider's handle, or the menu.
        patience: how many milliseconds to wait for the other picture; by default, as
            for all else.
    """
    image = cell.locator(".jp-OutputArea img").last
    before = image.get_attribute("src")
    value = slider.get_attribute("aria-valuenow")
    if value is None:
        # In JupyterLab a press of an arrow's key left the menu as it was.
        slider.select_option(index=1)
    else:
        last = value == slider.get_attribute("aria-valuemax")
        slider.press("ArrowLeft" if last else "ArrowRight")
        expect(slider).not_to_have_attribute("aria-valuenow", value)
    try:
        expect(image).not_to_have_attribute("src", before, timeout=patience)
    except AssertionError:
        return False
    return True
