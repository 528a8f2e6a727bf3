"""The scene of two drawings: an input that takes two ways up, and the sum of what comes
out.
"""

from drawing import Box, Drawing

WIDTH, HEIGHT = 1.65, 1.4


def factors(d: Drawing, x: float, y: float) -> Box:
    """Draw A, which narrows to the rank, below B, which widens again, and return their
    box.
    """
    height = 0.58
    neck = (1, 0.3)
    low = d.taper(Box(x, y - (HEIGHT - height) / 2, WIDTH, height), "LoRA", widths=neck)
    high = d.taper(
        Box(x, y + (HEIGHT - height) / 2, WIDTH, height), "LoRA", widths=neck[::-1]
    )
    d.text(x, low.y - 0.06, "{A|ink}  (in, r)")
    d.text(x, high.y + 0.06, "{B|ink}  (r, out)")
    d.arrow(low.top, high.bottom)
    d.text(x + 0.14, y, "{trained|LoRA}", align="left")
    d.text(x + 0.1, y + HEIGHT / 2 + 0.2, "· s", align="left")
    return Box(x, y, WIDTH, HEIGHT)


def frozen(d: Drawing, x: float, y: float) -> Box:
    """Draw the frozen pretrained weight, with a padlock, and return its box."""
    box = d.box(Box(x, y, WIDTH, HEIGHT), "frozen", "W", "(out, in)", "frozen")
    d.lock(x + WIDTH / 2 - 0.2, y + HEIGHT / 2 - 0.22)
    return box


def values(d: Drawing, x: float, y: float, label: str) -> Box:
    """Draw what goes in or comes out, as wide as the two boxes between, and return its
    box.
    """
    box = d.box(Box(x, y, 3.55, 0.36), "ink")
    d.text(x, y, label)
    return box


def two_ways(d: Drawing, x: float, bottom: float, left: Box, right: Box) -> Box:
    """Draw the input below two boxes, the arrows into both, and the sum above; return
    the sum.
    """
    source = values(d, x, bottom, "{x|ink}  (batch, in)")
    total = d.operator(x, left.top[1] + 0.36, "+")
    for box, edge in ((left, total.left), (right, total.right)):
        d.arrow((box.x, source.top[1]), box.bottom)
        d.arrow(box.top, (box.x, total.y), edge)
    return total
