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
from ipywidgets import Dropdown, SelectionSlider
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from sheets import needed

from lowrank_utils.interactive import WITHOUT_A_KERNEL

ROOT = Path(__file__).resolve().parent.parent

# Of each slider; of several together, so that a page stays small.
MOST_PLACES = {1: 24, 2: 7}
# Of a frame; a plot has few, and fewer make a smaller file.
COLOURS = 64


def places_of(slider: Any, most: int) -> list[tuple[str, Any]]:
    """Return the places at which a slider is drawn, as labels and values: all of them,
    or ``most`` of them at equal distances and the one where it begins. A menu is drawn
    at all of its entries.
    """
    if isinstance(slider, Dropdown | SelectionSlider):
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


def pictures_of(notebook: NotebookNode, alts: dict[int, str]) -> list[str]:
    """Run what the pictures in some cells need, in one kernel, and return the frames of
    each as HTML.

    Args:
        notebook: is left as it is.
        alts: what each picture shows, by the place of its cell.
    """
    ending = (
        f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from frames import picture_with_frames\n\n"
        # The picture is what the cell before has shown.
        "print(picture_with_frames(_.draw, _.sliders, {!r}))"
    )
    run, shown = new_notebook(), []
    for place in sorted({*alts, *needed(notebook, [*alts])}):
        run.cells.append(new_code_cell(notebook.cells[place].source))
        if place in alts:
            shown.append(len(run.cells))
            run.cells.append(new_code_cell(ending.format(alts[place])))
    execute(run, ROOT / "notebooks")
    return [str(run.cells[place].outputs[-1].text) for place in shown]


def control(name: str, slider: Any, labels: list[str], begin: int) -> str:
    """Return a slider or a menu as HTML.

    Args:
        name: of the argument that it sets.
        slider: what it stands for.
        labels: of its places.
        begin: the place where it begins.
    """
    words = html.escape(slider.description or name)
    if isinstance(slider, Dropdown):
        entries = "".join(
            f"<option{' selected' * (place == begin)}>{html.escape(label)}</option>"
            for place, label in enumerate(labels)
        )
        return f"<label>{words} <select>{entries}</select></label>"
    return (
        f'<label>{words} <input type="range" min="0" max="{len(labels) - 1}" '
        f'value="{begin}" autocomplete="off" '
        f"data-labels='{html.escape(json.dumps(labels))}'>"
        f"<output>{html.escape(labels[begin])}</output></label>"
    )


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
        drawn, file = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png")
        plt.close(figure)
        few = (
            Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        )
        few.convert("RGB").save(file, format="webp", lossless=True)
        data = base64.b64encode(file.getvalue()).decode()
        frames.append(f"data:image/webp;base64,{data}")
    controls, first = [], 0
    for name, slider in sliders.items():
        labels = [label for label, _ in places[name]]
        begin = [value for _, value in places[name]].index(slider.value)
        first = first * len(labels) + begin
        controls.append(control(name, slider, labels, begin))
    return (
        '<div class="frames">'
        + "".join(controls)
        + f'<div class="drawing"><img alt="{html.escape(alt)}" src="{frames[first]}">'
        + "</div>"
        + f'<script type="application/json">{json.dumps(frames)}</script></div>'
    )


def moving_pictures(notebook: NotebookNode, kept: Path) -> dict[int, str]:
    """Return the frames of a notebook's pictures with sliders as HTML, by the places of
    their cells.

    Args:
        notebook: is left as it is.
        kept: a folder, in which frames are kept for as long as their code is the same.
    """
    alt, alts, paths = "", {}, {}
    for place, cell in enumerate(notebook.cells):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", alt)
        if "interactive" in cell.metadata.get("tags", []):
            alts[place] = alt
            chosen = [*needed(notebook, [place]), place]
            sources = [notebook.cells[number].source for number in chosen]
            # How they are drawn counts too.
            sources += [alt, Path(__file__).read_text(encoding="utf-8")]
            name = hashlib.sha256("\n".join(sources).encode()).hexdigest()
            paths[place] = kept / f"{name}.html"
    new = {place: alts[place] for place in alts if not paths[place].is_file()}
    if new:
        kept.mkdir(parents=True, exist_ok=True)
        for place, text in zip(new, pictures_of(notebook, new), strict=True):
            paths[place].write_text(text, encoding="utf-8")
    return {place: path.read_text(encoding="utf-8") for place, path in paths.items()}


def first_picture(notebook: NotebookNode, kept: Path) -> str:
    """Return the frames of a notebook's first picture with sliders as HTML."""
    return next(iter(moving_pictures(notebook, kept).values()))


def put_in_frames(notebook: NotebookNode, kept: Path) -> None:
    """Show frames where a notebook has a picture with sliders.

    Args:
        notebook: is changed in place.
        kept: as in ``moving_pictures``.
    """
    for place, text in moving_pictures(notebook, kept).items():
        shown = {"text/html": text, "text/plain": WITHOUT_A_KERNEL}
        notebook.cells[place].outputs = [new_output("display_data", shown)]
