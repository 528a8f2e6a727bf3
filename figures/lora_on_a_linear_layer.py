"""Draw a linear layer with a LoRA layer beside it."""

from drawing import Box, drawing


def draw() -> None:
    with drawing("lora_on_a_linear_layer", 8.8, 5.4) as d:
        upper, lower, height = 3.5, 1.68, 1.1
        d.panel(Box(4.4, 2.93, 5.7, 4.24))
        d.text(1.8, 4.76, "`LinearWithLoRA`", size=13, align="left")
        for y, text in (
            (upper, "`linear`:  `Linear`, {frozen|frozen}"),
            (lower, "`lora`:  `LoRALayer`, {trained|LoRA}"),
        ):
            d.panel(Box(3.85, y + 0.17, 3.8, 1.66))
            d.text(2.15, y + 0.78, text, align="left")

        weight = d.box(Box(3.1, upper, 1.45, height), "frozen", "W", "(out, in)")
        bias = d.box(Box(5.0, upper, 0.95, height), "frozen", "b", "(out,)")
        for box in (weight, bias):
            d.lock(box.right[0] - 0.2, upper + 0.33)
        a = d.taper(
            Box(2.95, lower, 1.15, height), "LoRA", "A", "(in, r)", heights=(1, 0.5)
        )
        b = d.taper(
            Box(4.6, lower, 1.15, height), "LoRA", "B", "(r, out)", heights=(0.5, 1)
        )
        total = d.operator(6.85, (upper + lower) / 2, "+")
        source = d.box(Box(0.78, total.y, 1.16, 0.8), "ink", "x", "(batch, in)")
        output = d.box(Box(8.02, total.y, 1.16, 0.8), "ink", "y", "(batch, out)")

        for first in (weight, a):
            d.arrow(source.right, (1.74, total.y), (1.74, first.y), first.left)
        d.arrow(weight.right, bias.left)
        d.arrow(a.right, b.left)
        d.arrow(bias.right, (total.x, upper), total.top)
        d.arrow(b.right, (total.x, lower), total.bottom)
        d.arrow(total.right, output.left)
        d.text(5.45, lower + 0.2, "· s")
        d.text(6.3, upper + 0.2, "x{W|frozen}ᵀ + {b|frozen}")
        d.text(6.3, lower + 0.2, "s·x{AB|LoRA}")
        d.text(4.4, 0.43, "y = x{W|frozen}ᵀ + {b|frozen} + s·x{AB|LoRA}", size=15)


if __name__ == "__main__":
    draw()
