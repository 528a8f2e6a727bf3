"""What notebooks ask of JupyterLab: links that stay in it, and sliders whose pictures
follow."""

from pathlib import Path

from lab_pages import changes_its_picture, run_all_cells
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

NOTEBOOKS = sorted((Path(__file__).resolve().parents[3] / "notebooks").glob("*.ipynb"))


def test_links_to_other_notebooks_open_them_here(page, lab):
    first, second = NOTEBOOKS[:2]
    panel = lab.open(page, lab.put(first))
    lab.put(second)
    panel.locator(".jp-Cell").last.locator(f'a[href*="{second.stem}"]').last.click()
    expect(
        page.locator(".jp-mod-current[role=tab]", has_text=second.name)
    ).to_be_visible()
    expect(panel.get_by_role("heading", level=1)).to_contain_text("2. ")
    panel.locator(".jp-Cell").first.locator(f'a[href*="{first.stem}"]').last.click()
    expect(
        page.locator(".jp-mod-current[role=tab]", has_text=first.name)
    ).to_be_visible()
    expect(panel.get_by_role("heading", level=1)).to_contain_text("1. ")


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
@interact(length=[1, 3])
def of_a_menu(length):
    draw(length)
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
        cells=[new_code_cell(source) for source in SLIDERS],
        metadata={"kernelspec": kernel},
    )
    panel = lab.open(page, lab.put(notebook))
    run_all_cells(page, panel)
    _, changing, menu, still = panel.locator(".jp-Cell").all()
    for cell in (changing, menu, still):
        expect(cell.locator(".jp-OutputArea img")).to_have_count(1)
    assert changes_its_picture(changing, changing.get_by_role("slider"))
    assert changes_its_picture(menu, menu.get_by_role("combobox"))
    assert not changes_its_picture(still, still.get_by_role("slider"), 3_000)
