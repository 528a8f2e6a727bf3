"""Draw a weight matrix as magnitude times direction, row by row."""

import numpy as np
from drawing import Box, Drawing, drawing

W = np.array([[2, 0, -1, 2], [4, -2, 2, 1], [1, 1, -1, 1]])
M = np.linalg.norm(W, axis=1, keepdims=True)
MARKED = 1  # the row of the neuron that the drawing follows
HEIGHT = 0.44


def row_of(box: Box, rows: int, row: int) -> Box:
    """Return one row of a box."""
    return Box(
        box.x,
        box.top[1] - (row + 0.5) * box.height / rows,
        box.width,
        box.height / rows,
    )


def matrix(
    d: Drawing,
    left: float,
    y: float,
    cell: float,
    look: str,
    values: np.ndarray,
    digits: int,
) -> Box:
    """Draw a matrix of numbers, its marked row framed, and return its box."""
    rows, columns = values.shape
    box = Box(left + columns * cell / 2, y, columns * cell, rows * HEIGHT)
    d.grid(box, look, rows, columns)
    for (row, column), value in np.ndenumerate(values):
        number = f"{value:.{digits}f}".replace("-", "−")
        d.text(left + (column + 0.5) * cell, row_of(box, rows, row).y, number, size=13)
    d.frame(row_of(box, rows, MARKED))
    return box


def equation(d: Drawing, y: float) -> None:
    """Draw W = m ⊙ direction in numbers."""
    for row in range(len(W)):
        name = f"neuron {row + 1}"
        d.text(1.3, y + (1 - row) * HEIGHT, name, align="right", bold=row == MARKED)
    weight = matrix(d, 1.45, y, 0.56, "frozen", W, 0)
    magnitude = matrix(d, 4.2, y, 0.62, "magnitude", M, 0)
    direction = matrix(d, 5.4, y, 0.76, "DoRA", W / M, 2)
    d.text(3.95, y, "=", size=18)
    d.text(5.11, y, "⊙", size=18)
    title = weight.top[1] + 0.42
    d.lines(weight.x, title, "{W|frozen} (out, in)", "as torch stores it")
    d.lines(magnitude.x, title, "{m|magnitude} (out,)", "lengths")
    d.lines(direction.x, title, "{direction|DoRA} (out, in)", "each row of length 1")
    row = W[MARKED]
    squares = " + ".join(str(number**2) for number in row)
    d.text(
        4.4,
        y - 1.0,
        f"length of row {MARKED + 1}:  √({squares}) = {{{M[MARKED, 0]:.0f}|magnitude}}",
    )


def neuron(d: Drawing, x: float, y: float) -> None:
    """Draw all inputs and the one output neuron that a row belongs to."""
    output = (x + 0.55, y)
    places = [(x - 0.55, y + 0.3 * (1.5 - index)) for index in range(W.shape[1])]
    d.path(*([place, output] for place in places), width=1.6)
    for place in places:
        d.circle(*place, 0.1, "shade")
    d.circle(*output, 0.17, "shade")
    d.text(*output, f"{MARKED + 1}", bold=True)


def small(d: Drawing, x: float, y: float, rows: int, columns: int) -> Box:
    """Draw a small ruled matrix and return its box."""
    box = Box(x, y, columns * 0.26, rows * 0.26)
    d.grid(box, "frozen", rows, columns)
    return box


def axes(d: Drawing, y: float) -> None:
    """Draw the same neuron in torch's weight, a row, and in the article's, a column."""
    rows, columns = W.shape
    neuron(d, 1.3, y)
    torch = small(d, 3.7, y, rows, columns)
    d.frame(row_of(torch, rows, MARKED))
    article = small(d, 6.9, y, columns, rows)
    d.frame(
        Box(
            article.x + (MARKED - (rows - 1) / 2) * 0.26,
            article.y,
            0.26,
            article.height,
        )
    )
    d.arrow(torch.right, article.left)
    d.text(5.35, y + 0.17, "transposed")


def draw() -> None:
    with drawing("matrix_decomposition", 8.8, 5.6) as d:
        equation(d, 3.95)
        d.panel(Box(4.4, 1.33, 8.4, 2.26))
        axes(d, 1.62)
        d.lines(1.3, 0.62, "all weights into", "output neuron 2")
        d.lines(
            3.7,
            0.62,
            "torch: y = x{W|frozen}ᵀ, {W|frozen} (out, in)",
            "the neuron is a {row|ink}",
        )
        d.lines(
            6.9,
            0.62,
            "article: y = x·{W|frozen}, {W|frozen} (in, out)",
            "the neuron is a {column|ink}",
        )


if __name__ == "__main__":
    draw()
