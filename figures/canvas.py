"""The card that a drawing is made on: colours, fonts, text, lines, and the SVG that
comes of it.

Lengths are inches from the lower left corner of the card; font sizes are points.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape  # nosec B406 (it writes XML and parses none)

import matplotlib
from alt_texts import ALT_TEXTS
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.textpath import text_to_path

from lowrank_utils.plots import LOOKS, PALETTE

Point = tuple[float, float]

COLORS = PALETTE | {name: look.color for name, look in LOOKS.items()}
# By file, since the system may have fonts of the same name in another version.
FONTS = {
    name: Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{suffix}.ttf")
    for name, suffix in {"plain": "", "bold": "-Bold", "code": "Mono"}.items()
}


def text_width(text: str, size: float, font: str) -> float:
    """Return how far ``text`` moves the pen, in inches, spaces at its ends included."""
    properties = FontProperties(fname=FONTS[font], size=size)
    framed, frame = (
        text_to_path.get_text_width_height_descent(part, properties, ismath=False)[0]
        for part in (f"|{text}|", "||")
    )
    return (framed - frame) / 72


class Canvas:
    """A surface of ``width`` × ``height`` inches for patches, lines and text."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure((width, height), facecolor="none")
        self.axes = self.figure.add_axes(
            (0, 0, 1, 1), xlim=(0, width), ylim=(0, height)
        )
        self.axes.set_axis_off()

    def add(self, patch: Patch) -> None:
        """Put a patch of matplotlib on the card, above what is there."""
        patch.set(zorder=1 + len(self.axes.patches) / 1000, clip_on=False)
        self.axes.add_patch(patch)

    def path(
        self,
        *lines: Sequence[Point],
        color: str = "ink",
        width: float = 1.6,
        style: str = "-",
    ) -> None:
        """Draw lines, each through its points, in one stroke."""
        outline = Outline.make_compound_path(*map(Outline, lines))
        self.add(
            PathPatch(
                outline,
                facecolor="none",
                edgecolor=COLORS[color],
                linewidth=width,
                linestyle=style,
                capstyle="butt",
            )
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        align: str = "center",
        bold: bool = False,
    ) -> None:
        """Write a line, its capitals centred on y.

        ``{W|frozen}`` within it is bold and in the colour of that look, ```Linear``` is
        code.
        """
        pieces = []
        for part in re.split(r"(\{.*?\|.*?\}|`.*?`)", text):
            if part.startswith("{"):
                word, look = part[1:-1].split("|")
                pieces.append((word, look, "bold"))
            elif part.startswith("`"):
                pieces.append((part[1:-1], "ink", "code"))
            elif part:
                pieces.append((part, "ink", "bold" if bold else "plain"))
        widths = [text_width(part, size, font) for part, _, font in pieces]
        x -= sum(widths) * {"left": 0, "center": 0.5, "right": 1}[align]
        y -= 0.365 * size / 72  # half a capital
        for (part, look, font), width in zip(pieces, widths, strict=True):
            properties = FontProperties(fname=FONTS[font], size=size)
            self.axes.text(
                x, y, part, color=COLORS[look], font=properties, parse_math=False
            )
            x += width

    def lines(
        self, x: float, y: float, *lines: str, size: float = 12, align: str = "center"
    ) -> None:
        """Write lines one below the other, centred on y as a block."""
        for index, line in enumerate(lines):
            self.text(
                x,
                y + ((len(lines) - 1) / 2 - index) * 1.6 * size / 72,
                line,
                size,
                align=align,
            )

    def svg(self, name: str) -> str:
        """Return the SVG with its title and description, without a date or a
        version.
        """
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", metadata=nothing)
        # A thousandth of a point is fine enough, and the same on every processor.
        long = r"(?<!scale\()\b\d+\.\d{4,}"
        svg = re.sub(
            long, lambda number: f"{round(float(number[0]), 3):g}", buffer.getvalue()
        )
        before, start, after = svg.partition("<svg ")
        attributes, end, content = after.partition(">")
        title, text = map(escape, ALT_TEXTS[name])
        role = (
            f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc" '
        )
        words = f'\n <title id="{name}-title">{title}</title>\n <desc id="{name}-desc">{text}</desc>'
        return before + start + role + attributes + end + words + content
