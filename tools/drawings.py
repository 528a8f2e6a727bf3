"""Put drawings into pages, so that the words in them can be selected and searched.

The drawings hold their letters as outlines, which look the same everywhere
(figures/canvas.py). Matplotlib notes the words beside them; here these words lie over
the outlines as text that isn't painted.
"""

import html
import re
from pathlib import Path

WORDS = re.compile(
    r"<!-- (?P<words>[^\n]*?) -->\s*"
    r'<g style="[^"]*" transform="translate\((?P<x>\S+) (?P<y>\S+)\)'
    r' scale\((?P<scale>\S+) [^)]*\)">(?P<glyphs>.*?)\n    </g>',
    flags=re.DOTALL,
)


def text_over(found: re.Match[str]) -> str:
    """Return a group of outlines with its words over it.

    Outlines are a hundred units high, and the last one is about sixty wide.
    """
    scale = float(found["scale"])
    steps = re.findall(r"<use [^>]*translate\((\S+) ", found["glyphs"])
    width = scale * (float(steps[-1] if steps else 0) + 60)
    words = found["words"]
    return (
        f'{found[0]}<text x="{found["x"]}" y="{found["y"]}" '
        f'font-size="{100 * scale:g}" textLength="{width:.1f}" '
        f'lengthAdjust="spacingAndGlyphs">{words}</text>'
    )


def inline(path: Path, alt: str) -> str:
    """Return a drawing as a part of an HTML page.

    Args:
        path: the SVG that figures/ draws.
        alt: what it shows; stands in the place of the drawing's own description.
    """
    svg = path.read_text(encoding="utf-8")
    view = re.search(r'viewBox="[^"]*"', svg)
    if view is None:
        raise ValueError(f"{path.name} has no viewBox")
    content = svg.partition("</desc>")[2].rpartition("</svg>")[0]
    content = WORDS.sub(text_over, content)
    # Two drawings on a page have other names for their parts.
    name = path.stem
    content = re.sub(r'\bid="', f'id="{name}-', content)
    content = re.sub(r'href="#', f'href="#{name}-', content)
    content = content.replace("url(#", f"url(#{name}-")
    # Its style is for all that is drawn, and would reach the page.
    content = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", content, flags=re.S)
    return (
        f'<div class="drawing" tabindex="0" role="group" aria-label="A drawing">'
        f'<svg role="img" aria-label="{html.escape(alt)}" {view[0]} '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{content}</svg></div>'
    )
