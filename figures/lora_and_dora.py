"""Draw LoRA beside DoRA."""

from drawing import Box, Drawing, drawing
from flow import factors, frozen, two_ways, values

BIAS, SCALING = 4.72, 4.06


def finish(d: Drawing, before: Box, *lines: str) -> None:
    """Add the bias, draw the output, and write the formula and what is trained."""
    bias = d.box(Box(before.x - 1.2, BIAS, 1.15, 0.36), "frozen")
    d.text(bias.x - 0.13, bias.y, "{b|ink}  (out,)")
    d.lock(bias.right[0] - 0.18, bias.y)
    total = d.operator(before.x, BIAS, "+")
    output = values(d, before.x, BIAS + 0.51, "{y|ink}  (batch, out)")
    d.arrow(bias.right, total.left)
    d.arrow(before.top, total.bottom)
    d.arrow(total.top, output.bottom)
    d.lines(before.x, 0.71, *lines)


def scale(d: Drawing, before: Box) -> Box:
    """Multiply by the trained magnitude over the norm, and return where that
    happens.
    """
    magnitude = d.box(Box(before.x + 1.3, SCALING, 0.95, 0.36), "magnitude")
    d.text(magnitude.x, SCALING, "{m|ink}  (out,)")
    d.text(magnitude.x, SCALING - 0.3, "{trained|magnitude}")
    d.text(
        before.x + 0.22,
        SCALING + 0.36,
        "{c|magnitude} = {m|magnitude} / ‖{V|DoRA}‖",
        align="left",
    )
    product = d.operator(before.x, SCALING, "")
    d.circle(before.x, SCALING, 0.02, "ink")
    d.arrow(magnitude.left, product.right)
    d.arrow(before.top, product.bottom)
    return product


def draw() -> None:
    with drawing("lora_and_dora", 8.8, 6.05) as d:
        y, side = 2.5, 0.95
        sums = []
        for x, title in ((2.25, "LoRA"), (6.55, "DoRA")):
            d.panel(Box(x, 3.0, 4.1, 5.7), title)
            sums.append(
                two_ways(d, x, 1.37, frozen(d, x - side, y), factors(d, x + side, y))
            )
        finish(
            d,
            sums[0],
            "y = x{W|frozen}ᵀ + s·x{AB|LoRA} + {b|frozen}",
            "that is x({W|frozen} + {ΔW|LoRA})ᵀ + {b|frozen},  {ΔW|LoRA} = s·({A·B|LoRA})ᵀ",
            "frozen: {W|frozen}, {b|frozen}     trained: {A|LoRA}, {B|LoRA}",
        )
        finish(
            d,
            scale(d, sums[1]),
            "y = {c|magnitude} ⊙ (x{W|frozen}ᵀ + s·x{AB|LoRA}) + {b|frozen}",
            "{V|DoRA} = {W|frozen} + {ΔW|LoRA},  ‖{V|DoRA}‖ the lengths of its rows",
            "frozen: {W|frozen}, {b|frozen}     trained: {m|magnitude}, {A|LoRA}, {B|LoRA}",
        )


if __name__ == "__main__":
    draw()
