"""Draw LoRA beside DoRA."""

from drawing import Box, Drawing, drawing
from flow import factors, frozen, two_ways, values

Y, BIAS, SCALING = 2.5, 5.08, 4.24


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
    x = before.x
    # V is a weight and no output: it is made of W, A and B, whatever x is.
    weight = Box(x, Y - 0.035, 3.8, 1.65)
    d.path([*weight.corners, weight.corners[0]], color="DoRA", style="--")
    d.text(x - 1.72, weight.top[1] + 0.17, "{V|DoRA}", size=14)
    norm = d.box(Box(x + 1.62, SCALING - 0.56, 0.58, 0.36), "ink")
    d.text(norm.x, norm.y, "‖{V|DoRA}‖")
    factor = d.box(Box(x + 1.32, SCALING, 1.22, 0.36), "ink")
    d.text(factor.x, SCALING, "{c|ink} = {m|magnitude} / ‖{V|DoRA}‖")
    magnitude = d.box(Box(x + 1.32, BIAS - 0.14, 0.95, 0.36), "magnitude")
    d.text(magnitude.x, magnitude.y, "{m|ink}  (out,)")
    between = (magnitude.bottom[1] + factor.top[1]) / 2
    d.text(x + 1.22, between, "{trained|magnitude}", align="right")
    product = d.operator(x, SCALING, "")
    d.circle(x, SCALING, 0.02, "ink")
    d.arrow((norm.x, weight.top[1]), norm.bottom)
    d.arrow(norm.top, (norm.x, factor.bottom[1]))
    d.arrow(magnitude.bottom, factor.top)
    d.arrow(factor.left, product.right)
    d.arrow(before.top, product.bottom)
    return product


def draw() -> None:
    with drawing("lora_and_dora", 8.8, 6.5) as d:
        side = 0.95
        sums = []
        for x, title in ((2.25, "LoRA"), (6.55, "DoRA")):
            d.panel(Box(x, 3.25, 4.1, 6.18), title)
            sums.append(
                two_ways(d, x, 1.37, frozen(d, x - side, Y), factors(d, x + side, Y))
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
            "y = {c|ink} ⊙ (x{W|frozen}ᵀ + s·x{AB|LoRA}) + {b|frozen}",
            "{V|DoRA} = {W|frozen} + {ΔW|LoRA},  ‖{V|DoRA}‖ the lengths of its rows",
            "frozen: {W|frozen}, {b|frozen}     trained: {m|magnitude}, {A|LoRA}, {B|LoRA}",
        )


if __name__ == "__main__":
    draw()
