"""Draw the pictures with sliders for the site, where no kernel draws them: a frame for
each place of the sliders, from the same function as in JupyterLab.

What a picture needs of its notebook is run; nothing of it is stored.
"""

import base64
import hashlib
import html
import io
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from execute_notebooks import execute
from ipywidgets import SelectionSlider
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from sheets import needed

from lowrank_utils.interactive import WITHOUT_A_KERNEL

ROOT = Path(__file__).resolve().parent.parent

# Of each slider; of several together, so that a page stays small.
MOST_PLACES = {1: 24, 2: 9}


def places_of(slider: Any, most: int) -> list[tuple[str, Any]]:
    """Return the places at which a slider is drawn, as labels and values: all of them,
    or ``most`` of them at equal distances and the one where it begins.
    """
    if isinstance(slider, SelectionSlider):
        return [(str(label), value) for label, value in slider._options_full]
    count = round((slider.max - slider.min) / slider.step) + 1
    steps = sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
    begin = round((slider.value - slider.min) / slider.step)
    nearest = min(steps, key=lambda step: abs(step - begin))
    steps[steps.index(nearest)] = begin
    kind = type(slider.value)
    values = [
        slider.value if step == begin else kind(slider.min + step * slider.step)
        for step in steps
    ]
    return [(f"{value:g}", value) for value in values]


def picture_of(notebook: NotebookNode, place: int, alt: str) -> str:
    """Run what the picture in a cell needs, in a kernel of its own, and return its
    frames as HTML.
    """
    sources = [
        *(notebook.cells[number].source for number in needed(notebook, [place])),
        notebook.cells[place].source,
        # The picture is what the cell before has shown.
        f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from frames import picture_with_frames\n\n"
        f"print(picture_with_frames(_.draw, _.sliders, {alt!r}))",
    ]
    run = new_notebook(cells=[new_code_cell(source) for source in sources])
    execute(run, ROOT / "notebooks")
    return str(run.cells[-1].outputs[-1].text)


def picture_with_frames(draw: Any, sliders: dict[str, Any], alt: str) -> str:
    """Return a picture as HTML that shows another frame where a slider moves
    (docs/static/frames.js); without a script it shows the first.

    Args:
        draw: returns a figure for the sliders' values.
        sliders: by the names of the arguments that they set.
        alt: what the picture shows.
    """
    places = {
        name: places_of(slider, MOST_PLACES[len(sliders)])
        for name, slider in sliders.items()
    }
    frames = []
    for chosen in itertools.product(*places.values()):
        figure = draw(**dict(zip(places, (value for _, value in chosen), strict=True)))
        file = io.BytesIO()
        figure.savefig(file, format="webp", pil_kwargs={"lossless": True})
        plt.close(figure)
        data = base64.b64encode(file.getvalue()).decode()
        frames.append(f"data:image/webp;base64,{data}")
    controls, first = [], 0
    for name, slider in sliders.items():
        labels = [label for label, _ in places[name]]
        begin = [value for _, value in places[name]].index(slider.value)
        first = first * len(labels) + begin
        controls.append(
            f"<label>{html.escape(slider.description or name)} "
            f'<input type="range" min="0" max="{len(labels) - 1}" value="{begin}" '
            f"data-labels='{html.escape(json.dumps(labels))}'>"
            f"<output>{html.escape(labels[begin])}</output></label>"
        )
    return (
        '<div class="frames">'
        + "".join(controls)
        + f'<img alt="{html.escape(alt)}" src="{frames[first]}">'
        + f'<script type="application/json">{json.dumps(frames)}</script></div>'
    )


def put_in_frames(notebook: NotebookNode, kept: Path) -> None:
    """Show frames where a notebook has a picture with sliders.

    Args:
        notebook: is changed in place.
        kept: a folder, in which frames are kept for as long as their code is the same.
    """
    alt = ""
    for place, cell in enumerate(notebook.cells):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", alt)
        if "interactive" not in cell.metadata.get("tags", []):
            continue
        sources = [
            notebook.cells[number].source
            for number in [*needed(notebook, [place]), place]
        ]
        name = hashlib.sha256("\n".join([alt, *sources]).encode()).hexdigest()
        path = kept / f"{name}.html"
        if not path.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            path.write_text(picture_of(notebook, place, alt), encoding="utf-8")
        shown = {
            "text/html": path.read_text(encoding="utf-8"),
            "text/plain": WITHOUT_A_KERNEL,
        }
        cell.outputs = [new_output("display_data", shown)]
