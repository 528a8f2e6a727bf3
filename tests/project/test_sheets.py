"""The exercise sheets: run from the top they ask for what is to be done, and give no
solution away; and the pictures with sliders in frames."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from execute_notebooks import execute
from frames import picture_with_frames, places_of, put_in_frames
from ipywidgets import Dropdown, FloatSlider, IntSlider, SelectionSlider
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from sheets import needed, sheet_of, sheets, solutions

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SHEETS = sheets("../notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_runs_from_the_top_and_asks(name):
    sheet = nbformat.reads(SHEETS[name], as_version=4)
    execute(sheet, NOTEBOOKS)
    asked = [
        output
        for cell in sheet.cells
        if "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs
        # A lesson may show an error, too.
        if output.output_type == "stream"
    ]
    assert len(asked) == SHEETS[name].count('raise NotImplementedError(\\"') >= 3
    for output in asked:
        assert output["text"].startswith("To do: Exercise ")


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_has_every_exercise_and_no_solution(name):
    text = "".join(
        cell.source for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells
    )
    sheet = nbformat.reads(SHEETS[name], as_version=4)
    asked = "".join(cell.source for cell in sheet.cells)
    headings = re.findall("### Exercise .*", text)
    assert re.findall("### Exercise .*", asked) == headings
    assert "# Solution " not in asked
    assert "sample answer" not in asked
    assert all(cell.outputs == [] for cell in sheet.cells if cell.cell_type == "code")


def test_the_solutions_are_those_of_every_exercise():
    parts = re.split("^### Exercise ", solutions(), flags=re.MULTILINE)[1:]
    asked = [
        number
        for name in SHEETS
        for number in re.findall(r"### Exercise (\S+):", SHEETS[name])
    ]
    assert [part.partition(":")[0] for part in parts] == asked
    assert "<details>" not in solutions()
    for part in parts:
        code = "\n".join(re.findall(r"```python\n(.+?)\n```", part, flags=re.DOTALL))
        compile(code, part, "exec")
        # A change is answered in words.
        assert len(code) > 40 or len(part.split()) > 30
        assert "check_" not in code


def test_a_sheet_takes_the_last_definitions_and_what_changes_them():
    sources = [
        "import math",
        "x = [1]",
        "def grow(values):\n    values.append(math.pi)",
        "x = [2]",
        "grow(x)",
        "print(x)",
        "y = [x for x in range(3)]",
        "assert len(x) == 2 and y",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    assert needed(notebook, [7]) == [0, 2, 3, 4, 6]
    notebook.cells[0] = new_markdown_cell("# 1. Title")
    asks = new_markdown_cell("### Exercise 1.1: it (core, 1 minutes)\n\nDo it.")
    asks.source += "\n\n<details><summary>A sample answer</summary>5</details>"
    notebook.cells.insert(7, asks)
    sheet = sheet_of(notebook, "a.ipynb")
    assert "sample" not in sheet.cells[-2].source
    assert sheet.cells[-1].source == sources[-1]


def test_a_slider_has_few_places_and_the_one_where_it_begins():
    places = places_of(FloatSlider(2.24, min=0, max=3, step=0.01), 7)
    assert len(places) == 7
    assert [value for _, value in places][::6] == [0, 3]
    assert ("2.24", 2.24) in places
    assert [v for _, v in places_of(IntSlider(0, min=0, max=7), 24)] == list(range(8))
    beside_its_steps = places_of(FloatSlider(63.4, min=0, max=360, step=1), 9)
    assert 63.4 in [value for _, value in beside_its_steps]
    powers = SelectionSlider(options=[("one", 1), ("two", 2)], value=2)
    assert places_of(powers, 2) == [("one", 1), ("two", 2)]


def test_a_menu_has_all_its_entries_and_moves_a_picture():
    pairs = Dropdown(options=["a − b", "a < c"], value="a < c", description="pair")
    assert places_of(pairs, 1) == [("a − b", "a − b"), ("a < c", "a < c")]
    found = picture_with_frames(
        lambda pair: plt.figure(figsize=(0.1 * len(pair), 0.1)), {"pair": pairs}, "x"
    )
    frames = json.loads(re.search(r"json\">(.*)</script>", found)[1])
    assert f'src="{frames[1]}"' in found
    assert "<label>pair <select><option>a − b</option>" in found
    assert "<option selected>a &lt; c</option></select>" in found


def draw(shade, size):
    return plt.figure(figsize=(0.1 * size, 0.2), facecolor=(shade, shade, shade))


def test_the_frames_stand_in_the_order_that_the_script_counts_in():
    sliders = {
        "shade": FloatSlider(1, min=0, max=1, step=0.5, description="shade"),
        "size": IntSlider(2, min=1, max=3),
    }
    found = picture_with_frames(draw, sliders, alt='a "shade"')
    frames = json.loads(re.search(r"json\">(.*)</script>", found)[1])
    assert len(frames) == 9
    assert f'alt="a &quot;shade&quot;" src="{frames[7]}"' in found
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(frame.split(",")[1])))
        for frame in frames
    ]
    shades = [picture.convert("L").getpixel((2, 2)) for picture in pictures]
    assert shades == [0] * 3 + [128] * 3 + [255] * 3
    assert [picture.width for picture in pictures[:3]] == [10, 20, 30]


def test_frames_are_drawn_by_the_cell_s_own_function(tmp_path):
    cells = [
        new_code_cell(
            "import matplotlib.pyplot as plt\nfrom ipywidgets import IntSlider\n"
            "from lowrank_utils.interactive import PictureWithSliders\n"
            "plt.rcParams['savefig.dpi'] = 50"
        ),
        new_code_cell("def picture(n):\n    return plt.figure(figsize=(n, 1))"),
        new_code_cell("PictureWithSliders(picture, n=IntSlider(1, min=1, max=2))"),
    ]
    cells[1].metadata["mystnb"] = {"image": {"alt": "a still picture"}}
    cells[2].metadata["tags"] = ["interactive"]
    # One after it, which gives a name that this one uses to something else.
    later = "def picture(n):\n    return plt.figure(figsize=(9, 9))\n\n\n"
    later += "PictureWithSliders(picture, n=IntSlider(1, min=1, max=2))"
    cells.append(new_code_cell(later))
    cells[3].metadata["tags"] = ["interactive"]
    notebook = new_notebook(cells=cells)
    put_in_frames(notebook, tmp_path)
    for cell, size in zip(notebook.cells[2:], [(100, 50), (450, 450)], strict=True):
        shown = cell.outputs[0].data["text/html"]
        frames = json.loads(re.search(r"json\">(.*)</script>", shown)[1])
        data = io.BytesIO(base64.b64decode(frames[1].split(",")[1]))
        assert Image.open(data).size == size
        assert 'alt="a still picture"' in shown
    for kept in tmp_path.iterdir():
        kept.write_text("kept")
    put_in_frames(notebook, tmp_path)
    assert notebook.cells[3].outputs[0].data["text/html"] == "kept"
