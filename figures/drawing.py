"""The vocabulary of all drawings: boxes for what is frozen and what is trained, arrows,
padlocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from canvas import COLORS, Canvas, Point
from matplotlib.colors import to_rgb
from matplotlib.patches import Arc, Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline

from lowrank_utils.plots import LOOKS, PALETTE

# On top of matplotlib's defaults, so that the user's own settings change no byte.
STYLE = {"svg.hashsalt": "lowrank", "svg.fonttype": "path", "hatch.linewidth": 1.2}


class Box(NamedTuple):
    """A rectangle by its centre and size, and the middles of its edges, where arrows
    end.
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        """The middle of the left edge."""
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        """The middle of the right edge."""
        return self.x + self.width / 2, self.y

    @property
    def top(self) -> Point:
        """The middle of the upper edge."""
        return self.x, self.y + self.height / 2

    @property
    def bottom(self) -> Point:
        """The middle of the lower edge."""
        return self.x, self.y - self.height / 2

    @property
    def corners(self) -> list[Point]:
        """The four corners, from the lower left one against the clock."""
        (left, _), (right, _), (_, low), (_, high) = (
            self.left,
            self.right,
            self.bottom,
            self.top,
        )
        return [(left, low), (right, low), (right, high), (left, high)]


def tint(look: str, amount: float) -> np.ndarray:
    """Return the paper with a share ``amount`` of a look's colour in it."""
    paper, color = np.array(to_rgb(PALETTE["paper"])), np.array(to_rgb(COLORS[look]))
    return paper + amount * (color - paper)


class Drawing(Canvas):
    """An opaque white card, legible on a light and on a dark page, and what can be
    drawn on it.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(width, height)
        self.panel(Box(width / 2, height / 2, width - 0.03, height - 0.03))

    def panel(self, box: Box, title: str = "") -> None:
        """Draw a frame with round corners, its title at the top."""
        self.add(
            FancyBboxPatch(
                (box.left[0], box.bottom[1]),
                box.width,
                box.height,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=PALETTE["paper"],
                edgecolor=tint("muted", 0.5),
            )
        )
        self.text(box.x, box.top[1] - 0.28, title, size=14, bold=True)

    def shape(self, corners: Sequence[Point], look: str) -> None:
        """Draw a polygon in a look: its colour as a tint, its hatch, its outline."""
        if look in LOOKS:
            self.add(Polygon(corners, facecolor=tint(look, 0.12), linewidth=0))
            self.hatch(corners, look)
        inside = "none" if look in LOOKS else PALETTE["paper"]
        self.add(
            Polygon(
                corners,
                facecolor=inside,
                edgecolor=COLORS[look],
                linewidth=1.6,
                joinstyle="round",
            )
        )

    def hatch(self, corners: Sequence[Point], look: str) -> None:
        """Draw a look's hatch, in a light tint of its colour so that text on it stays
        legible.
        """
        hatch, color = LOOKS[look].hatch, tint(look, 0.28)
        if hatch != "..":
            if hatch:
                self.add(
                    Polygon(
                        corners,
                        facecolor="none",
                        edgecolor=color,
                        hatch=hatch,
                        linewidth=0,
                    )
                )
            return
        # matplotlib's own dots weigh 70 kB; these are dashes of no length with round
        # ends.
        (left, low), (right, high) = np.min(corners, axis=0), np.max(corners, axis=0)
        step = 1 / 12
        heights = np.arange(low + step / 2, high, step)
        rows = [
            [(left + step * (0.5 + index % 2 / 2), y), (right, y)]
            for index, y in enumerate(heights)
        ]
        outline = Outline.make_compound_path(*map(Outline, rows))
        dots = (0, (0.01, 72 * step / 2.2))
        self.add(
            PathPatch(
                outline,
                edgecolor=color,
                linewidth=2.2,
                linestyle=dots,
                capstyle="round",
            )
        )

    def box(self, box: Box, look: str, *label: str, size: float = 17) -> Box:
        """Draw a rectangle with a label and return it."""
        return self.taper(box, look, *label, size=size)

    def taper(
        self,
        box: Box,
        look: str,
        *label: str,
        size: float = 17,
        widths: tuple[float, float] = (1, 1),
        heights: tuple[float, float] = (1, 1),
    ) -> Box:
        """Draw a box that narrows or widens, as a factor of low rank does, and return
        it.

        Args:
            box: what it fits in.
            look: how it is drawn.
            label: a symbol, then small lines below it.
            size: of the symbol.
            widths: shares of the width that the lower and the upper edge take.
            heights: shares of the height that the left and the right edge take.
        """
        x, y, width, height = box
        corners = [
            (
                x + side * width / 2 * widths[end > 0],
                y + end * height / 2 * heights[side > 0],
            )
            for side, end in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        self.shape(corners, look)
        self.label(x, y, *label, size=size)
        return box

    def label(self, x: float, y: float, *label: str, size: float = 17) -> None:
        """Write a bold symbol and small lines below it, centred on (x, y) as a
        block.
        """
        if label:
            symbol, *lines = label
            half = len(lines) * 0.13
            self.text(x, y + half, symbol, size, bold=True)
            self.lines(x, y - 0.15 if lines else y, *lines)

    def grid(self, box: Box, look: str, rows: int, columns: int) -> None:
        """Draw a matrix as a box ruled into cells."""
        self.box(box, look)
        (left, low), (right, high) = box.corners[0], box.corners[2]
        ends = [[(left, y), (right, y)] for y in np.linspace(low, high, rows + 1)[1:-1]]
        ends += [
            [(x, low), (x, high)] for x in np.linspace(left, right, columns + 1)[1:-1]
        ]
        self.path(*ends, color=look, width=0.8)

    def arrow(
        self, *points: Point, color: str = "ink", width: float = 1.6, head: float = 0.11
    ) -> None:
        """Draw an arrow through the points, its tip on the last one."""
        before, tip = np.array(points[-2]), np.array(points[-1])
        along = (tip - before) / np.linalg.norm(tip - before)
        across = np.array([-along[1], along[0]])
        base = tip - head * along
        self.path([*points[:-1], tuple(base)], color=color, width=width)
        corners = [tip, base + 0.45 * head * across, base - 0.45 * head * across]
        self.add(Polygon(corners, facecolor=COLORS[color], linewidth=0))

    def circle(self, x: float, y: float, radius: float, look: str = "paper") -> Box:
        """Draw a filled circle and return the box around it."""
        self.add(
            Circle(
                (x, y),
                radius,
                facecolor=COLORS[look],
                edgecolor=COLORS["ink"],
                linewidth=1.6,
            )
        )
        return Box(x, y, 2 * radius, 2 * radius)

    def block(self, box: Box, color: str) -> None:
        """Fill a rectangle with the full colour, to mark a cell."""
        self.add(Polygon(box.corners, facecolor=COLORS[color], linewidth=0))

    def frame(self, box: Box) -> None:
        """Draw a strong outline, to mark a row or a column."""
        self.add(
            Polygon(
                box.corners, facecolor="none", edgecolor=COLORS["ink"], linewidth=2.6
            )
        )

    def operator(self, x: float, y: float, symbol: str) -> Box:
        """Draw an operation, such as + in a circle, and return its box."""
        self.text(x, y, symbol, size=15, bold=True)
        return self.circle(x, y, 0.16)

    def lock(self, x: float, y: float) -> None:
        """Draw the padlock that marks what is frozen, centred on (x, y)."""
        arc = Arc(
            (x, y + 0.02),
            0.1,
            0.14,
            theta1=0,
            theta2=180,
            edgecolor=COLORS["frozen"],
            linewidth=1.6,
        )
        self.add(arc)
        self.block(Box(x, y - 0.04, 0.16, 0.12), "frozen")


@contextmanager
def drawing(name: str, width: float, height: float) -> Iterator[Drawing]:
    """Give a card to draw on, then write it to ``name``.svg beside this file."""
    with matplotlib.style.context(["default", STYLE]):
        card = Drawing(width, height)
        yield card
        svg = card.svg(name)
    Path(__file__).with_name(f"{name}.svg").write_text(
        svg, encoding="utf-8", newline="\n"
    )
