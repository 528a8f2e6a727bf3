"""Draw a vector as its magnitude times its direction."""

import numpy as np
from canvas import Point
from drawing import Drawing, drawing

VECTOR = np.array([1, 2])
MAGNITUDE = np.linalg.norm(VECTOR)
DIRECTION = VECTOR / MAGNITUDE
ORIGIN, SCALE = np.array([2.05, 1.8]), 1.28


def place(x: float, y: float, left: float = 0) -> Point:
    """Return where a point of the plane lies on the card, moved by inches to the
    vector's left.
    """
    across = np.array([-DIRECTION[1], DIRECTION[0]])
    return tuple(ORIGIN + SCALE * np.array([x, y]) + left * across)


def plane(d: Drawing) -> None:
    """Draw the axes with their units, and the unit circle."""
    d.arrow(place(-1.3, 0), place(1.75, 0), color="muted", width=1)
    d.arrow(place(0, -1.2), place(0, 2.35), color="muted", width=1)
    angles = np.linspace(0, 2 * np.pi, 73)
    d.path(
        [place(np.cos(angle), np.sin(angle)) for angle in angles],
        color="muted",
        style="--",
        width=1.2,
    )
    d.text(*place(1.12, -0.92), "unit circle")
    x, y = place(0, 2)
    d.path([(x - 0.05, y), (x + 0.05, y)], color="muted", width=1)
    d.text(x - 0.16, y, "2")
    x, y = place(0, 1)
    d.text(x - 0.16, y + 0.13, "1")
    x, y = place(1, 0)
    d.text(x + 0.14, y - 0.15, "1")


def draw() -> None:
    length = f"{MAGNITUDE:.2f}"
    vector, unit = (
        f"[{VECTOR[0]}, {VECTOR[1]}]",
        f"[{DIRECTION[0]:.3f}, {DIRECTION[1]:.3f}]",
    )
    with drawing("vector_magnitude_direction", 8.8, 5.15) as d:
        plane(d)
        d.arrow(place(0, 0), place(*VECTOR), width=2, head=0.17)
        d.arrow(place(0, 0), place(*DIRECTION), color="DoRA", width=4.5, head=0.22)
        ends = (place(0, 0, 0.2), place(*VECTOR, 0.2))
        d.path(ends, color="magnitude", width=2, style=":")
        for end in ((0, 0), tuple(VECTOR)):
            d.path([place(*end, 0.13), place(*end, 0.27)], color="magnitude", width=2)

        x, y = place(*VECTOR)
        d.text(x + 0.12, y, f"{{{vector}|ink}}", align="left")
        x, y = place(*DIRECTION)
        d.text(x + 0.15, y + 0.06, f"{{{unit}|DoRA}}", align="left")
        x, y = place(*VECTOR * 0.68, 0.3)
        d.text(x - 0.03, y + 0.03, f"{{{length}|magnitude}}", align="right")

        left = 4.85
        d.text(
            left,
            3.95,
            f"{{{vector}|ink}} = {{{length}|magnitude}} × {{{unit}|DoRA}}",
            size=15,
            align="left",
        )
        d.text(left, 3.05, "{magnitude|magnitude}, how long it is", align="left")
        d.text(
            left,
            2.72,
            f"√({VECTOR[0]}² + {VECTOR[1]}²) = √{VECTOR @ VECTOR} ≈ {length}",
            align="left",
        )
        d.text(left, 2.0, "{direction|DoRA}, where it points", align="left")
        d.text(left, 1.67, f"{vector} / √{VECTOR @ VECTOR} ≈ {unit}", align="left")
        d.text(left, 1.34, "of length 1: it ends on the unit circle", align="left")


if __name__ == "__main__":
    draw()
