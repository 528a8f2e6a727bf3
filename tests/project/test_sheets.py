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
        "def grow(values, step):\n    values.append(step * math.pi)",
        "x = [2]",
        "step = 1",
        "grow(x, 1)",
        "grow([], step)",
        "y = [x for x in range(3)]",
        "assert len(x) == 2 and y and step",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    assert needed(notebook, [8]) == [0, 2, 3, 4, 5, 7]


def test_what_only_a_later_exercise_or_its_solution_needs_comes_behind_the_earlier():
    def asks(number):
        text = f"### Exercise 1.{number}: it (core, 1 minutes)\n\nDo it."
        text += "\n\n<details><summary>A sample answer</summary>5</details>"
        return new_markdown_cell(text)

    def code(source, *tags):
        return new_code_cell(source, metadata={"tags": list(tags)})

    cells = [
        new_markdown_cell("# 1. Title"),
        code("import math"),
        code("def twice(n):\n    return n + n"),
        code("def half(n):\n    return n / 2"),
        code("last = 5"),
        asks(1),
        code("def double(n):\n    raise NotImplementedError", "exercise"),
        code("# Solution\ndef double(n):\n    return 2 * n\n\n\nlast", "solution"),
        asks(2),
        code("def quarter(n):\n    return twice(n) / 8", "exercise"),
        code(
            "# Solution\ndef quarter(n):\n    return half(half(n))\n\n\n1", "solution"
        ),
        asks(3),
        code("twice(half(double(3)))"),
    ]
    sheet = sheet_of(new_notebook(cells=cells), "a.ipynb")
    places = [1, 6, 2, 3, 9, 12]
    shown = [cell for cell in sheet.cells if cell.cell_type == "code"]
    assert [cell.source for cell in shown] == [cells[place].source for place in places]
    folded = ["hide-input" in cell.metadata.get("tags", []) for cell in shown]
    assert folded == [True, False, True, True, False, False]
    assert "sample" not in nbformat.writes(sheet)


def test_the_sheet_of_dora_shows_no_layer_before_it_is_written_from_memory():
    before, after = SHEETS["05_dora.ipynb"].split("### Exercise 5.3")
    assert "### Exercise 5.2: DoRA, from memory" in before
    for formula in ("scale_and_bias(self)", "row_scale(self.m"):
        assert formula in after
        assert formula not in before


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
