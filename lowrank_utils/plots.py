"""The palette, the style, and the few plots that several notebooks draw."""

from collections.abc import Sequence
from itertools import cycle, permutations
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lowrank_utils.training import History


class Look(NamedTuple):
    """How one thing is drawn everywhere: a colour and, so that nothing hangs on it
    alone, a second cue.
    """

    color: str
    line: str
    marker: str
    hatch: str


# Every colour has a contrast of at least 4.5 : 1 to white, and no two are confused by
# readers with a colour vision deficiency: they come from the set of Okabe and Ito,
# darkened.
PALETTE = {
    "ink": "#1F2328",
    "muted": "#59636E",
    "paper": "#FFFFFF",
    "shade": "#EEF1F4",
}
LOOKS = {
    "frozen": Look("#59636E", ":", "s", ""),
    "full": Look("#00735A", "--", "^", "//"),
    "LoRA": Look("#0067A8", "-", "o", "\\\\"),
    "DoRA": Look("#B34700", "-.", "D", "xx"),
    "magnitude": Look("#8F3F7A", (0, (1, 1)), "v", ".."),  # type: ignore[arg-type]
}


def use_style() -> None:
    """Set matplotlib's defaults for the series: white paper in every theme, readable
    from the back row.
    """
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.dpi": 100,
            "figure.facecolor": PALETTE["paper"],
            "figure.constrained_layout.use": True,
            "axes.facecolor": PALETTE["paper"],
            "axes.edgecolor": PALETTE["muted"],
            "axes.labelcolor": PALETTE["ink"],
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": PALETTE["shade"],
            "text.color": PALETTE["ink"],
            "xtick.color": PALETTE["ink"],
            "ytick.color": PALETTE["ink"],
            "lines.linewidth": 2,
            "lines.markersize": 5,
            "legend.frameon": False,
            "image.cmap": "gray_r",
            "font.family": "DejaVu Sans",
            "svg.hashsalt": "lowrank",
        }
    )


def legend_above(figure: Figure) -> None:
    """Put the legend above all axes, where no line can run through it.

    Args:
        figure: the names are those of its first axes.
    """
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))


def _mixed_looks() -> list[Look]:
    """Return further looks: the colour of one with the line and the marker of
    another.
    """
    looks = list(LOOKS.values())
    return [
        first._replace(line=second.line, marker=second.marker)
        for first, second in permutations(looks, 2)
    ]


def plot_history(histories: dict[str, History]) -> Figure:
    """Draw loss and accuracy against epochs, a line per training run.

    A name that begins with a key of ``LOOKS`` ("LoRA, rank 4") is drawn in that look.
    Accuracy is the validation accuracy where there is one, else the training accuracy.

    Args:
        histories: name → what ``train`` returned.

    Returns:
        The figure, with the loss on the left and the accuracy on the right.
    """
    figure, (left, right) = plt.subplots(1, 2)
    held_out = all(history.validation_accuracy for history in histories.values())
    unused = [
        look
        for name, look in LOOKS.items()
        if not any(key.startswith(name) for key in histories)
    ]
    spare = cycle([*unused, *_mixed_looks()])
    for name, history in histories.items():
        look = next(
            (look for key, look in LOOKS.items() if name.startswith(key)), None
        ) or next(spare)
        style = {
            "color": look.color,
            "linestyle": look.line,
            "marker": look.marker,
            "label": name,
        }
        epochs = range(1, len(history.loss) + 1)
        left.plot(epochs, history.loss, **style)
        right.plot(
            epochs,
            history.validation_accuracy if held_out else history.train_accuracy,
            **style,
        )
    left.set(xlabel="epoch", ylabel="training loss (nats)", ylim=(0, None))
    right.set(
        xlabel="epoch",
        ylabel=f"{'validation' if held_out else 'training'} accuracy (fraction)",
    )
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_above(figure)
    return figure


def show_images(
    images: Tensor,
    titles: Sequence[str] = (),
    columns: int = 10,
    signed: bool = False,
    quantile: float = 1.0,
) -> Figure:
    """Draw images of 784 pixels in a grid.

    Args:
        images: (n, 784). Grey values from 0 to 1 or, with ``signed``, numbers of either
            sign.
        titles: one per image, or none.
        columns: images per row.
        signed: colour each image from blue (most negative) over white (zero) to red
            (most positive).
        quantile: of the absolute values of a signed image, the one from which on its
            colour is full. Below 1, a few extreme pixels don't make all others pale.

    Returns:
        The figure.
    """
    if len(images) == 0:
        raise ValueError("images is empty; there is nothing to draw")
    if titles and len(titles) != len(images):
        raise ValueError(
            f"titles must be as many as images, {len(images)}, or none; got {len(titles)}"
        )
    rows = -(-len(images) // columns)
    height = 7.2 / columns + (0.3 if titles else 0.05)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7.2, rows * height), squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    pictures = images.detach().double().cpu().numpy().reshape(-1, 28, 28)
    for index, (axes, picture) in enumerate(zip(grid.flat, pictures, strict=False)):
        # A picture of zeros is white, whatever the scale.
        limit = (
            (np.quantile(abs(picture), quantile) or abs(picture).max() or 1.0)
            if signed
            else 1.0
        )
        axes.imshow(
            picture,
            cmap="RdBu_r" if signed else "gray_r",
            vmin=-limit if signed else 0,
            vmax=limit,
        )
        if titles:
            axes.set_title(titles[index], fontsize=10)
    return figure


def plot_confusion(axes: Axes, labels: Tensor, predictions: Tensor, title: str) -> None:
    """Draw on ``axes`` how often each true digit (row) was taken for each digit
    (column).

    Args:
        axes: where to draw.
        labels: (n,), whole numbers from 0 to 9.
        predictions: (n,), the same for what the model says.
        title: shown above.
    """
    counts = (
        torch.bincount(labels * 10 + predictions, minlength=100)
        .reshape(10, 10)
        .cpu()
        .numpy()
    )
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(10):
        for column in range(10):
            if counts[row, column]:
                color = (
                    PALETTE["paper"] if share[row, column] > 0.67 else PALETTE["ink"]
                )
                axes.text(
                    column,
                    row,
                    str(int(counts[row, column])),
                    ha="center",
                    va="center",
                    fontsize=10,
                    color=color,
                )
    axes.set(
        title=title,
        xlabel="predicted digit",
        ylabel="true digit",
        xticks=range(10),
        yticks=range(10),
    )
    axes.grid(False)
