"""A picture with sliders or menus, which is drawn anew where one of them changes.

A page without a kernel, on paper or on the web, can't do that. So what is kept of
such a picture in the file of a notebook is one sentence (tools/execute_notebooks.py),
and a still picture stands beside it.
"""

import io
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from ipywidgets import Image, VBox
from matplotlib.figure import Figure

WITHOUT_A_KERNEL = (
    "Run this cell in JupyterLab, and choose here what the picture shows."
)


class PictureWithSliders(VBox):
    """Sliders or menus, and below them what ``draw`` makes of their values.

    As the last expression of a cell it shows itself.

    Args:
        draw: takes the sliders' values by name and returns a figure, which is closed
            after it was shown.
        sliders: by the name of the argument that each one sets.
    """

    def __init__(self, draw: Callable[..., Figure], **sliders: Any) -> None:
        self.draw, self.sliders = draw, sliders
        # In a box it would be stretched to the width of the page, and a square one be
        # taller than a screen.
        self.picture = Image(
            format="png", layout={"max_width": "100%", "align_self": "flex-start"}
        )
        super().__init__([*sliders.values(), self.picture])
        for slider in sliders.values():
            # The default width cuts labels of several words.
            slider.style.description_width = "initial"
            slider.layout.width = "30em"
            slider.observe(lambda _: self.redraw(), names="value")
        self.redraw()

    def redraw(self) -> None:
        """Draw the picture for the sliders' present values."""
        figure = self.draw(
            **{name: slider.value for name, slider in self.sliders.items()}
        )
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        self.picture.value = png.getvalue()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return super()._repr_mimebundle_(**options) | {"text/plain": WITHOUT_A_KERNEL}
