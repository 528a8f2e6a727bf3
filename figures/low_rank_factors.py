"""Draw the low-rank factors, their product, and how many numbers each holds."""

from drawing import Box, Drawing, drawing

IN, OUT, RANK = 1000, 1000, 2


def product(d: Drawing) -> None:
    """Draw A left of the square A·B, B above it, and how one entry comes about."""
    side, thin = 2.4, 0.2
    square = Box(2.8, 1.95, side, side)
    a = Box(square.left[0] - 0.3, square.y, thin, side)
    b = Box(square.x, square.top[1] + 0.3, side, thin)
    d.box(square, "ink")
    d.box(a, "LoRA")
    d.box(b, "LoRA")
    row, column = square.y - 0.75, square.x + 0.75
    d.path(
        [(a.right[0], row), (column, row)],
        [(column, b.bottom[1]), (column, row)],
        color="LoRA",
        style="--",
    )
    for cell in (
        Box(a.x, row, thin, 0.14),
        Box(column, b.y, 0.14, thin),
        Box(column, row, 0.14, 0.14),
    ):
        d.block(cell, "LoRA")
    d.label(square.x - 0.2, square.y + 0.35, "A·B", "(in, out)", "ΔW = s·(A·B)ᵀ")
    d.label(a.left[0] - 0.5, a.y, "A", "(in, r)", "trained")
    d.label(b.x, b.top[1] + 0.47, "B", "(r, out), trained")
    d.text(a.x, a.top[1] + 0.15, "r")
    d.text(b.left[0] - 0.12, b.y, "r")
    d.text(
        (a.left[0] + square.right[0]) / 2,
        0.42,
        "each entry: a row of {A|LoRA} times a column of {B|LoRA}",
    )


def counts(d: Drawing) -> None:
    """Draw both counts as bars of one scale."""
    left, length = 4.75, 3.6
    whole, factors = IN * OUT, RANK * (IN + OUT)
    d.text(
        left,
        4.24,
        f"{IN:,} inputs, {OUT:,} outputs, rank {RANK}",
        bold=True,
        align="left",
    )
    for y, draw_bar, look, name, total, count in (
        (3.2, d.box, "full", "ΔW", f"{OUT:,} · {IN:,}", whole),
        (2.0, d.block, "LoRA", "A, B", f"{IN:,} · {RANK} + {RANK} · {OUT:,}", factors),
    ):
        width = length * count / whole
        draw_bar(Box(left + width / 2, y, width, 0.34), look)
        d.text(
            left,
            y + 0.4,
            f"{{{name}|{look}}}   {total} = {{{count:,}|ink}}",
            align="left",
        )
    d.text(
        left,
        1.1,
        f"{whole // factors} times fewer numbers to train",
        size=13,
        bold=True,
        align="left",
    )
    d.lines(
        left,
        0.55,
        "These bars are to scale;",
        "A and B on the left are widened.",
        align="left",
    )


def draw() -> None:
    with drawing("low_rank_factors", 8.8, 4.75) as d:
        product(d)
        counts(d)


if __name__ == "__main__":
    draw()
