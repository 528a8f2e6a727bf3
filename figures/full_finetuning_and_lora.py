"""Draw full fine-tuning beside LoRA."""

from drawing import Box, Drawing, drawing
from flow import HEIGHT, WIDTH, factors, frozen, two_ways, values


def finish(d: Drawing, total: Box, formula: str, count: str) -> None:
    """Draw the output, and write the formula and how many numbers are trained."""
    output = values(d, total.x, total.y + 0.62, "{y|ink}  (batch, out)")
    d.arrow(total.top, output.bottom)
    d.text(total.x, 0.83, formula, size=13)
    d.text(total.x, 0.5, count)


def draw() -> None:
    with drawing("full_finetuning_and_lora", 8.8, 5.15) as d:
        y, side = 2.55, 0.95
        for x, title in ((2.25, "Full fine-tuning"), (6.55, "LoRA")):
            d.panel(Box(x, 2.575, 4.1, 4.75), title)

        x = 2.25
        weight = d.box(
            Box(x - side, y, WIDTH, HEIGHT), "frozen", "W", "(out, in)", "pretrained"
        )
        update = d.box(
            Box(x + side, y, WIDTH, HEIGHT), "full", "ΔW", "(out, in)", "trained"
        )
        total = two_ways(d, x, 1.32, weight, update)
        finish(
            d,
            total,
            "y = x({W|frozen} + {ΔW|full})ᵀ",
            "{trained:|full} out · in numbers",
        )

        x = 6.55
        total = two_ways(d, x, 1.32, frozen(d, x - side, y), factors(d, x + side, y))
        finish(
            d,
            total,
            "y = x{W|frozen}ᵀ + s·x{AB|LoRA}",
            "{trained:|LoRA} r · (in + out) numbers",
        )


if __name__ == "__main__":
    draw()
