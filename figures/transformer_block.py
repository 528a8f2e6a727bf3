"""Draw one block of a transformer, and where adapters go in it."""

from drawing import Box, Drawing, drawing

X, HEIGHT = 4.4, 0.62
WIDE, WIDTH = 7.9, 1.7


def linear(
    d: Drawing, x: float, y: float, name: str, shape: str, width: float = WIDTH
) -> Box:
    """Draw a frozen linear layer with the small factors of an adapter at its side."""
    box = d.box(Box(x, y, width, HEIGHT), "frozen", name, shape, size=13)
    d.lock(x + width / 2 - 0.16, y + HEIGHT / 2 - 0.16)
    side = x + width / 2 + 0.32
    for end in (-1, 1):
        part = Box(side, y + end * HEIGHT / 4, 0.4, HEIGHT / 2)
        d.taper(part, "LoRA", widths=(1, 0.4) if end < 0 else (0.4, 1))
    return box


def values(d: Drawing, y: float, text: str) -> Box:
    """Draw what goes in or comes out, one vector for each token."""
    box = d.box(Box(X, y, WIDE, 0.34), "ink")
    d.text(X, y, text)
    return box


def around(d: Drawing, low: float, high: float) -> Box:
    """Draw the sum with what went past the layers between, and the normalisation."""
    total = d.operator(X, high, "+")
    d.arrow((X, low), (0.42, low), (0.42, high), total.left)
    norm = d.box(Box(X + 1.5, high, 1.5, 0.34), "ink")
    d.text(norm.x, norm.y, "normalise")
    d.arrow(total.right, norm.left)
    return norm


def draw() -> None:
    with drawing("transformer_block", 8.8, 8.6) as d:
        source = values(d, 0.45, "a sentence, one vector of 384 numbers for each token")
        start = 0.92
        d.path([source.top, (X, start)])
        columns = [linear(d, x, 1.62, name, "(384, 384)") for x, name in (
            (1.7, "query"), (4.18, "key"), (6.66, "value"))]  # fmt: skip
        attention = d.box(Box(X, 2.72, 7.2, 0.66), "ink")
        d.text(X, 2.84, "attention: query · key says how much each token")
        d.text(X, 2.6, "takes of the values of the others (no weights)")
        for box in columns:
            d.arrow((X, start), (box.x, start), box.bottom)
            d.arrow(box.top, (box.x, attention.bottom[1]))
        output = linear(d, X, 3.65, "output", "(384, 384)")
        d.arrow(attention.top, output.bottom)
        norm = around(d, start, 4.4)
        d.arrow(output.top, (X, 4.24))
        middle = 4.87
        d.path([norm.top, (norm.x, middle), (X, middle)])
        up = linear(d, X, 5.52, "intermediate", "(1536, 384)", 2.6)
        d.arrow((X, middle), up.bottom)
        gelu = d.box(Box(X, 6.2, 1.5, 0.34), "ink")
        d.text(X, gelu.y, "GELU")
        d.arrow(up.top, gelu.bottom)
        down = linear(d, X, 6.88, "output", "(384, 1536)", 2.6)
        d.arrow(gelu.top, down.bottom)
        norm = around(d, middle, 7.62)
        d.arrow(down.top, (X, 7.46))
        end = values(d, 8.2, "the sentence, on to the next of six such blocks")
        d.arrow(norm.top, (norm.x, end.bottom[1]))
        d.text(6.15, 3.78, "six frozen weights,", align="left")
        d.text(6.15, 3.51, "an {A·B|LoRA} beside each", align="left")
        d.text(0.95, 5.6, "feed-forward:", align="left")
        d.text(0.95, 5.33, "each token by itself", align="left")


if __name__ == "__main__":
    draw()
