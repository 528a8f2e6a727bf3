"""Draw DoRA's two steps."""

from drawing import Box, Drawing, drawing

SIDE = 1.02


def column(d: Drawing, x: float, y: float) -> None:
    """Draw m, which has one entry per row."""
    d.grid(Box(x, y, 0.32, SIDE), "magnitude", 5, 1)


def square(
    d: Drawing, x: float, y: float, look: str, symbol: str, size: float = 17
) -> None:
    """Draw a matrix, with a padlock on what is frozen."""
    d.box(Box(x, y, SIDE, SIDE), look, symbol, "(out, in)", size=size)
    if look == "frozen":
        d.lock(x + SIDE / 2 - 0.17, y + SIDE / 2 - 0.2)


def decompose(d: Drawing, y: float) -> None:
    """Draw W as m times the direction."""
    square(d, 1.05, y, "frozen", "W")
    d.text(1.9, y, "=", size=18)
    column(d, 2.35, y)
    d.text(2.8, y, "⊙", size=18)
    square(d, 3.65, y, "DoRA", "V / ‖V‖", size=14)
    below = y - SIDE / 2 - 0.2
    d.text(1.05, below, "{pretrained|frozen}")
    d.text(2.35, below, "{m|magnitude} (out,)")
    d.text(3.65, below, "{direction|DoRA}")
    for height, text in (
        (0.34, "{m|magnitude} = ‖{W|frozen}‖, the length of each row:"),
        (0.08, "one parameter per output neuron"),
        (-0.34, "{V|DoRA} = {W|frozen} at the start:"),
        (-0.6, "each row of {V|DoRA} / ‖{V|DoRA}‖ has length 1"),
    ):
        d.text(4.65, y + height, text, align="left")


def train(d: Drawing, y: float) -> None:
    """Draw what V is made of, and W′ of m and V's directions."""
    square(d, 0.92, y, "DoRA", "V")
    square(d, 2.44, y, "frozen", "W")
    square(d, 3.96, y, "LoRA", "ΔW")
    square(d, 5.5, y, "ink", "W′")
    column(d, 6.68, y)
    square(d, 7.86, y, "DoRA", "V / ‖V‖", size=14)
    for x, symbol in ((1.68, "="), (3.2, "+"), (6.26, "="), (7.09, "⊙")):
        d.text(x, y, symbol, size=18)
    d.path([(4.73, y - SIDE / 2), (4.73, y + SIDE / 2)], color="muted", width=1)
    below = y - SIDE / 2 - 0.2
    d.text(2.44, below, "{frozen|frozen}")
    d.text(3.96, below, "s·({A·B|LoRA})ᵀ, {trained|LoRA}")
    d.text(6.68, below, "{m|magnitude}, {trained|magnitude}")
    d.text(7.86, below, "{direction|DoRA}")
    note = "At the start {ΔW|LoRA} = 0 and {m|magnitude} = ‖{W|frozen}‖, so W′ = {W|frozen}."
    d.text(4.4, y - 1.15, note)


def draw() -> None:
    with drawing("dora_steps", 8.8, 5.45) as d:
        d.panel(Box(4.4, 4.1, 8.4, 2.3), "1   Decompose the pretrained weight")
        decompose(d, 4.03)
        d.panel(
            Box(4.4, 1.5, 8.4, 2.6),
            "2   Train the magnitude, and the direction by LoRA",
        )
        train(d, 1.6)


if __name__ == "__main__":
    draw()
