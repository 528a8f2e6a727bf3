"""The plots draw what they were given."""

from itertools import product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from support import normal

from lowrank_utils.plots import (
    LOOKS,
    PALETTE,
    plot_confusion,
    plot_history,
    show_images,
    use_style,
)
from lowrank_utils.training import History


def luminance(color):
    """Return the relative luminance of the Web Content Accessibility Guidelines 2.2."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in to_rgb(color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    lighter, darker = sorted([luminance(first), luminance(second)], reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_every_colour_that_is_read_has_enough_contrast_to_the_paper():
    # The formula knows black and grey on white.
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.005)
    read = {look.color for look in LOOKS.values()} | {PALETTE["ink"], PALETTE["muted"]}
    assert {color for color in read if contrast(color, PALETTE["paper"]) < 4.5} == set()


def test_no_two_looks_share_a_cue_and_each_can_be_drawn():
    assert [len(set(cue)) for cue in zip(*LOOKS.values(), strict=True)] == [5] * 4
    figure, axes = plt.subplots()
    for i, (color, line, marker, hatch) in enumerate(LOOKS.values()):
        axes.plot([0, 1], [0, i], color=color, linestyle=line, marker=marker)
        axes.bar(i, 1, color=color, hatch=hatch)
    figure.canvas.draw()


def test_the_style_can_be_set_twice_and_draws_on_white_paper_and_on_no_screen():
    assert mpl.get_backend().lower() == "agg"
    use_style()
    once = dict(mpl.rcParams)
    use_style()
    assert dict(mpl.rcParams) == once
    figure, axes = plt.subplots()
    assert to_hex(figure.get_facecolor()) == to_hex(axes.get_facecolor()) == "#ffffff"
    assert not axes.spines["top"].get_visible()
    assert axes.xaxis.label.get_color() == PALETTE["ink"]


# --- plot_history --------------------------------------------------------------------------------


def history(epochs, offset=0.0, validation=True):
    loss = [2.0 / (i + 1) + offset for i in range(epochs)]
    train = [0.5 + 0.1 * i for i in range(epochs)]
    return History(loss, train, [a - 0.05 for a in train] if validation else [], epochs)


def drawn(axes):
    """Return the points of each line by its name, in the order of the lines."""
    return [(line.get_label(), line.get_xydata().tolist()) for line in axes.lines]


# If one run has no validation digits, all show the training accuracy.
@pytest.mark.parametrize("held_out", list(product([True, False], repeat=2)))
def test_loss_and_accuracy_are_drawn_against_epochs_from_one(held_out):
    runs = {
        "LoRA, rank 4": history(3, validation=held_out[0]),
        "DoRA": history(5, offset=0.1, validation=held_out[1]),
    }
    left, right = plot_history(runs).axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("epoch", "epoch")
    assert left.get_ylabel() == "training loss (nats)"
    assert left.get_ylim()[0] == 0
    word = "validation" if all(held_out) else "training"
    assert right.get_ylabel() == f"{word} accuracy (fraction)"
    accuracy = "validation_accuracy" if all(held_out) else "train_accuracy"
    for axes, values in ((left, "loss"), (right, accuracy)):
        assert drawn(axes) == [
            (name, [[i, y] for i, y in enumerate(getattr(run, values), start=1)])
            for name, run in runs.items()
        ]


def cues(line):
    return line.get_color(), line.get_linestyle(), line.get_marker()


@pytest.mark.parametrize("name", LOOKS)
def test_a_run_is_drawn_in_the_look_that_its_name_begins_with(name):
    runs = {"something else": history(2), f"{name}, 0.01": history(2)}
    look = LOOKS[name]
    for axes in plot_history(runs).axes:
        other, line = map(cues, axes.lines)
        style = look.line if isinstance(look.line, str) else "--"
        assert line == (look.color, style, look.marker)
        assert other[0] != line[0]
        assert other[2] != line[2]


@pytest.mark.parametrize("count", [1, 5, 6, 8])
def test_any_number_of_runs_with_other_names_can_be_drawn_and_told_apart(count):
    runs = {f"run {i}": history(2, offset=i) for i in range(count)}
    left, _ = plot_history(runs).axes
    assert len(left.lines) == len(set(map(cues, left.lines))) == count


def test_the_legend_names_all_runs_once_and_lies_outside_the_axes():
    use_style()
    figure = plot_history({"LoRA": history(3), "DoRA": history(3), "full": history(3)})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "DoRA", "full"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_epochs_are_whole_numbers_on_the_axis(epochs):
    figure = plot_history({"LoRA": history(epochs)})
    figure.canvas.draw()
    for axes in figure.axes:
        assert [tick for tick in axes.get_xticks() if tick != round(tick)] == []


# --- show_images ---------------------------------------------------------------------------------


def shown(images, **options):
    """Return the pictures that are drawn of the images."""
    axes = show_images(images, **options).axes
    return [picture for each in axes for picture in each.images]


@pytest.mark.parametrize("titles", [(), list("abcdefg")])
def test_images_are_drawn_in_order_row_by_row_with_one_scale_of_grey(titles):
    images = torch.rand(7, 784, dtype=torch.float64)
    axes = show_images(images, titles, columns=3).axes
    assert [len(each.images) for each in axes] == [1] * 7 + [0] * 2
    for each, image in zip(axes, images, strict=False):
        (picture,) = each.images
        assert np.array_equal(picture.get_array(), image.reshape(28, 28).numpy())
        assert (*picture.get_clim(), picture.cmap.name) == (0, 1, "gray_r")
    rows = [each.get_subplotspec().rowspan.start for each in axes]
    assert rows == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not any(each.axison for each in axes)
    assert [each.get_title() for each in axes] == [*(titles or [""] * 7), "", ""]


def test_signed_images_are_white_at_zero_red_above_and_blue_below():
    image = torch.zeros(1, 784)
    image[0, 0], image[0, 1] = 2.0, -4.0
    (picture,) = shown(image, signed=True)
    assert picture.get_clim() == (-4, 4)
    red, blue, white = (
        picture.to_rgba(np.array([value]))[0][:3] for value in (4.0, -4.0, 0.0)
    )
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.2
    assert white.min() > 0.95


def test_every_signed_image_has_a_scale_of_its_own_and_one_of_zeros_is_white():
    # ΔW before training is zeros. A single pixel shows at any quantile.
    extreme, single = torch.linspace(-1, 1, 784), torch.zeros(784)
    extreme[0], single[5] = -50, 2
    images = torch.stack([torch.full((784,), 0.001), extreme, single, torch.zeros(784)])
    for quantile, limit in ((1.0, 50), (0.98, 0.98)):
        pictures = shown(images, signed=True, quantile=quantile)
        limits = np.array([picture.get_clim() for picture in pictures[:3]])
        assert limits[:, 1] == pytest.approx([0.001, limit, 2], rel=0.01)
        assert np.array_equal(limits[:, 0], -limits[:, 1])
        zeros = pictures[3]
        assert zeros.to_rgba(zeros.get_array())[..., :3].min() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_views_that_need_gradients_can_be_drawn_in_every_floating_dtype(dtype):
    weight = normal(6, 784, dtype=dtype).requires_grad_()
    figure = show_images(weight[::2], signed=True)
    figure.canvas.draw()
    expected = weight[2].detach().double().reshape(28, 28).numpy()
    assert np.array_equal(figure.axes[1].images[0].get_array(), expected)


@pytest.mark.parametrize(
    ("count", "titles", "name"), [(3, ["only one"], "titles"), (0, (), "images")]
)
def test_no_images_and_a_wrong_number_of_titles_are_refused(count, titles, name):
    with pytest.raises(ValueError, match=name):
        show_images(torch.rand(count, 784), titles)


# --- plot_confusion -------------------------------------------------------------------------------


def confusion(labels, predictions, title=""):
    _, axes = plt.subplots()
    plot_confusion(axes, torch.tensor(labels), torch.tensor(predictions), title)
    return axes


def test_the_confusion_counts_true_digits_by_row_and_predicted_ones_by_column():
    axes = confusion([0, 0, 0, 0, 3, 3, 9], [0, 0, 0, 5, 3, 8, 9], "LoRA at 45°")
    cells = [(0, 0, 0.75), (0, 5, 0.25), (3, 3, 0.5), (3, 8, 0.5), (9, 9, 1)]
    expected = np.zeros((10, 10))
    for row, column, share in cells:
        expected[row, column] = share
    (picture,) = axes.images
    assert np.allclose(picture.get_array(), expected)
    assert picture.get_clim() == (0, 1)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "3", (5, 0): "1", (3, 3): "1", (8, 3): "1", (9, 9): "1"}
    words = axes.get_title(), axes.get_xlabel(), axes.get_ylabel()
    assert words == ("LoRA at 45°", "predicted digit", "true digit")
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == list(range(10))


@pytest.mark.parametrize("hits", range(5, 101, 5))
def test_the_numbers_of_a_confusion_stand_out_from_their_cells(hits):
    # In the middle blues neither ink nor paper reaches more than 4.2.
    axes = confusion([0] * 100, [0] * hits + [1] * (100 - hits))
    (picture,) = axes.images
    assert len(axes.texts) == (1 if hits == 100 else 2)
    for text in axes.texts:
        column, row = text.get_position()
        cell = picture.to_rgba(picture.get_array())[row, column]
        assert contrast(text.get_color(), cell[:3]) > 4
