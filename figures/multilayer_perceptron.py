"""Draw the multilayer perceptron that the series trains."""

import numpy as np
from drawing import Drawing, drawing

SIZES = (784, 128, 256, 10)
NAMES = ("inputs", "hidden", "hidden", "outputs")
PLACES = (1.1, 3.3, 5.5, 7.7)
# How many neurons' places a column has; the dots take one.
SHOWN = (9, 6, 7, 5)
GAP, MIDDLE, DOTS = 0.34, 2.93, 1


def heights(shown: int) -> np.ndarray:
    """Return the heights of a column's places, the lowest first."""
    return MIDDLE + GAP * (np.arange(shown) - (shown - 1) / 2)


def neurons(d: Drawing, layer: int) -> None:
    """Draw a column of neurons, those of the hidden layers with a small ReLU inside."""
    x, places = PLACES[layer], heights(SHOWN[layer])
    for y in np.delete(places, DOTS):
        d.circle(x, y, 0.12, "shade")
        if layer in (1, 2):
            d.path([(x - 0.07, y - 0.03), (x, y - 0.03), (x + 0.05, y + 0.05)])
    for step in (-0.09, 0, 0.09):
        d.circle(x, places[DOTS] + step, 0.01, "ink")
    d.lines(x, 4.88, f"{{{SIZES[layer]}|ink}}", NAMES[layer])


def weights(d: Drawing, layer: int) -> int:
    """Draw the lines from one column to the next, what the layer is called, and return
    its parameters.
    """
    (x, end), (before, after) = PLACES[layer : layer + 2], SIZES[layer : layer + 2]
    starts, ends = (
        np.delete(heights(SHOWN[column]), DOTS) for column in (layer, layer + 1)
    )
    d.path(
        *([(x, y), (end, y_end)] for y in starts for y_end in ends),
        color="muted",
        width=0.4,
    )
    count = before * after + after
    label = (
        f"`layers[{2 * layer}]`",
        "`Linear`",
        f"W ({after}, {before}), b ({after},)",
        f"{count:,}",
    )
    d.lines((x + end) / 2, 0.8, *label)
    return count


def draw() -> None:
    with drawing("multilayer_perceptron", 8.8, 5.3) as d:
        total = sum(weights(d, layer) for layer in range(3))
        for layer in range(4):
            neurons(d, layer)
        for index in (1, 2):
            d.lines(PLACES[index], 0.8, f"`layers[{2 * index - 1}]`", "`ReLU`", "", "+")
        for digit, y in zip("9210", np.delete(heights(SHOWN[3]), DOTS), strict=True):
            d.text(PLACES[3] + 0.3, y, digit)
        d.lines(0.9, 0.8, "", "", "", "parameters:")
        d.lines(PLACES[3] + 0.2, 0.8, "", "", "", f"= {total:,}")


if __name__ == "__main__":
    draw()
