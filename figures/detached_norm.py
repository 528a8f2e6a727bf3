"""Draw what the detached norm cuts, and which step that adds to a row."""

import numpy as np
from canvas import Point
from drawing import Box, Drawing, drawing

ORIGIN = np.array([5.0, 1.5])
ALONG = np.array([np.cos(0.62), np.sin(0.62)])
ACROSS = np.array([-ALONG[1], ALONG[0]])
LENGTH, MAGNITUDE, STEP = 2.05, 1.35, (0.85, 0.8)


def place(along: float, across: float = 0) -> Point:
    """Return a point of the card, by inches along and across the row."""
    return tuple(ORIGIN + along * ALONG + across * ACROSS)


def graph(d: Drawing, x: float) -> None:
    """Draw how W′ is made of V and m, and where the gradient is stopped."""
    direction = d.box(Box(x - 0.85, 1.45, 1.3, 0.4), "DoRA")
    d.text(direction.x, direction.y, "{V|ink} = W + ΔW")
    norm = d.box(Box(x + 0.65, 2.15, 0.75, 0.4), "ink")
    d.text(norm.x, norm.y, "‖{V|DoRA}‖")
    factor = d.box(Box(x + 0.65, 3.05, 1.5, 0.4), "ink")
    d.text(factor.x, factor.y, "{c|ink} = {m|magnitude} / ‖{V|DoRA}‖")
    magnitude = d.box(Box(x + 0.65, 3.95, 0.75, 0.4), "magnitude")
    d.text(magnitude.x, magnitude.y, "{m|ink}")
    product = d.operator(direction.x, factor.y, "")
    d.circle(direction.x, factor.y, 0.02, "ink")
    weight = d.box(Box(direction.x, magnitude.y, 1.3, 0.4), "ink")
    d.text(weight.x, weight.y, "{W′|ink} = {c|ink} ⊙ {V|DoRA}")
    d.arrow(direction.top, product.bottom)
    d.arrow(direction.right, (norm.x, direction.y), norm.bottom)
    d.arrow(norm.top, factor.bottom)
    d.arrow(magnitude.bottom, factor.top)
    d.arrow(factor.left, product.right)
    d.arrow(product.top, weight.bottom)
    for shift in (-0.05, 0.05):
        y = 1.68 + shift
        d.path([(norm.x - 0.14, y - 0.06), (norm.x + 0.14, y + 0.06)], width=2.6)
    d.lines(x, 0.72, "The two bars stop the gradient", "on its way from c back to V")


def plane(d: Drawing) -> None:
    """Draw a row of V, its two steps, and W′ on the circle of radius m."""
    angles = np.linspace(-0.1, 1.5, 41)
    circle = [
        tuple(ORIGIN + MAGNITUDE * np.array([np.cos(a), np.sin(a)])) for a in angles
    ]
    d.path(circle, color="muted", style="--", width=1.2)
    d.arrow(place(0), place(LENGTH), color="DoRA", width=2, head=0.16)

    d.circle(*place(MAGNITUDE), 0.06, "ink")
    d.text(*place(MAGNITUDE - 0.28, -0.2), "{W′|ink}")
    d.text(*place(LENGTH - 0.2, -0.22), "{V|DoRA}")
    d.text(ORIGIN[0] + MAGNITUDE + 0.1, ORIGIN[1], "radius {m|magnitude}", align="left")
    across, along = STEP
    d.arrow(place(LENGTH), place(LENGTH, across), width=2, head=0.14)
    d.arrow(place(LENGTH), place(LENGTH + along), color="muted", width=2, head=0.14)
    ends = [place(LENGTH, across), place(LENGTH + along, across), place(LENGTH + along)]
    d.path(ends, color="muted", style=":", width=1.4)
    d.text(*place(LENGTH - 0.12, across / 2 + 0.1), "across", align="right")
    d.text(*place(LENGTH + along / 2 + 0.1, -0.22), "along", align="left")
    d.lines(
        6.5,
        0.72,
        "across: in both gradients; it turns V and W′",
        "along: only after the cut; W′ doesn’t feel it",
    )


def draw() -> None:
    with drawing("detached_norm", 8.8, 4.9) as d:
        d.panel(Box(2.2, 2.45, 4.0, 4.5), "What is cut")
        d.panel(Box(6.5, 2.45, 4.2, 4.5), "What it does to a row of V")
        graph(d, 2.2)
        plane(d)


if __name__ == "__main__":
    draw()
