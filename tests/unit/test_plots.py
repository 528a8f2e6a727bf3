"""The plots draw what they were given."""

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


def test_the_contrast_formula_knows_black_on_white():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize(
    "color",
    [look.color for look in LOOKS.values()] + [PALETTE["ink"], PALETTE["muted"]],
)
def test_every_colour_that_is_read_has_enough_contrast_to_the_paper(color):
    assert contrast(color, PALETTE["paper"]) >= 4.5


def test_no_two_looks_share_a_colour_a_line_a_marker_or_a_hatch():
    for cue in range(4):
        assert len({look[cue] for look in LOOKS.values()}) == len(LOOKS)


def test_every_look_can_be_drawn():
    figure, axes = plt.subplots()
    for i, look in enumerate(LOOKS.values()):
        axes.plot(
            [0, 1], [0, i], color=look.color, linestyle=look.line, marker=look.marker
        )
        axes.bar(i, 1, color=look.color, hatch=look.hatch)
    figure.canvas.draw()


def test_the_style_can_be_set_twice_and_draws_on_white_paper():
    use_style()
    once = dict(mpl.rcParams)
    use_style()
    assert dict(mpl.rcParams) == once
    figure, axes = plt.subplots()
    assert to_hex(figure.get_facecolor()) == to_hex(axes.get_facecolor()) == "#ffffff"
    assert not axes.spines["top"].get_visible()
    assert axes.xaxis.label.get_color() == PALETTE["ink"]


def test_the_tests_draw_on_no_screen():
    assert mpl.get_backend().lower() == "agg"


# --- plot_history --------------------------------------------------------------------------------


def history(epochs, offset=0.0, validation=True):
    loss = [2.0 / (i + 1) + offset for i in range(epochs)]
    train = [0.5 + 0.1 * i for i in range(epochs)]
    return History(loss, train, [a - 0.05 for a in train] if validation else [], epochs)


def drawn(axes):
    return {line.get_label(): line for line in axes.lines}


def test_loss_and_validation_accuracy_are_drawn_against_epochs_from_one():
    runs = {"LoRA, rank 4": history(3), "DoRA": history(5, offset=0.1)}
    left, right = plot_history(runs).axes
    for axes in (left, right):
        assert list(drawn(axes)) == ["LoRA, rank 4", "DoRA"]
        assert axes.get_xlabel() == "epoch"
    assert left.get_ylabel() == "training loss (nats)"
    assert right.get_ylabel() == "validation accuracy (fraction)"
    for name, run in runs.items():
        epochs = list(range(1, len(run.loss) + 1))
        assert (
            list(drawn(left)[name].get_xdata())
            == list(drawn(right)[name].get_xdata())
            == epochs
        )
        assert list(drawn(left)[name].get_ydata()) == run.loss
        assert list(drawn(right)[name].get_ydata()) == run.validation_accuracy
    assert left.get_ylim()[0] == 0


def test_without_validation_the_training_accuracy_is_drawn_and_named():
    _, right = plot_history({"LoRA": history(3, validation=False)}).axes
    assert right.get_ylabel() == "training accuracy (fraction)"
    assert list(drawn(right)["LoRA"].get_ydata()) == history(3).train_accuracy


def test_if_one_run_has_no_validation_all_show_the_training_accuracy():
    _, right = plot_history(
        {"LoRA": history(3), "DoRA": history(3, validation=False)}
    ).axes
    assert right.get_ylabel() == "training accuracy (fraction)"
    assert list(drawn(right)["LoRA"].get_ydata()) == history(3).train_accuracy


@pytest.mark.parametrize("name", LOOKS)
def test_a_run_is_drawn_in_the_look_that_its_name_begins_with(name):
    for axes in plot_history(
        {"something else": history(2), f"{name}, 0.01": history(2)}
    ).axes:
        line, other = drawn(axes)[f"{name}, 0.01"], drawn(axes)["something else"]
        look = LOOKS[name]
        assert (line.get_color(), line.get_marker()) == (look.color, look.marker)
        assert line.get_linestyle() == (
            look.line if isinstance(look.line, str) else "--"
        )
        assert other.get_color() != line.get_color()
        assert other.get_marker() != line.get_marker()


@pytest.mark.parametrize("count", [1, 5, 6, 8])
def test_any_number_of_runs_with_other_names_can_be_drawn_and_told_apart(count):
    left, _ = plot_history(
        {f"run {i}": history(2, offset=i) for i in range(count)}
    ).axes
    assert len(left.lines) == count
    cues = {
        (line.get_color(), line.get_linestyle(), line.get_marker())
        for line in left.lines
    }
    assert len(cues) == count


def test_the_legend_names_all_runs_once_and_lies_outside_the_axes():
    use_style()
    figure = plot_history({"LoRA": history(3), "DoRA": history(3), "full": history(3)})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "DoRA", "full"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_epochs_are_whole_numbers_on_the_axis(epochs):
    figure = plot_history({"LoRA": history(epochs)})
    figure.canvas.draw()
    for axes in figure.axes:
        assert [tick for tick in axes.get_xticks() if tick != round(tick)] == []


# --- show_images ---------------------------------------------------------------------------------


def visible(figure):
    return [axes for axes in figure.axes if axes.images]


def test_images_are_drawn_in_order_row_by_row_with_one_scale_of_grey():
    images = torch.rand(7, 784, dtype=torch.float64)
    figure = show_images(images, columns=3)
    assert len(figure.axes) == 9
    assert len(visible(figure)) == 7
    for axes, image in zip(figure.axes, images, strict=False):
        (picture,) = axes.images
        assert np.array_equal(picture.get_array(), image.reshape(28, 28).numpy())
        assert picture.get_clim() == (0, 1)
        assert picture.cmap.name == "gray_r"
    rows = [axes.get_subplotspec().rowspan.start for axes in visible(figure)]
    assert rows == [0, 0, 0, 1, 1, 1, 2]
    assert not any(axes.axison for axes in figure.axes)


def test_titles_are_set_above_their_images():
    figure = show_images(torch.rand(3, 784), titles=["a", "b", "c"], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    assert [
        axes.get_title() for axes in show_images(torch.rand(3, 784), columns=3).axes
    ] == ["", "", ""]


def test_signed_images_are_white_at_zero_red_above_and_blue_below():
    image = torch.zeros(1, 784)
    image[0, 0], image[0, 1] = 2.0, -4.0
    (picture,) = visible(show_images(image, signed=True))[0].images
    assert picture.get_clim() == (-4, 4)
    red, blue, white = (
        picture.to_rgba(np.array([value]))[0][:3] for value in (4.0, -4.0, 0.0)
    )
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.2
    assert white.min() > 0.95


def test_a_signed_image_of_zeros_is_white():
    # ΔW before training is one.
    (picture,) = visible(show_images(torch.zeros(1, 784), signed=True))[0].images
    assert picture.to_rgba(picture.get_array())[..., :3].min() > 0.95


def test_every_signed_image_has_a_scale_of_its_own():
    images = torch.stack([torch.full((784,), 0.001), torch.full((784,), -50.0)])
    limits = [
        axes.images[0].get_clim()[1]
        for axes in visible(show_images(images, signed=True))
    ]
    assert limits == pytest.approx([0.001, 50.0])


def test_a_few_extreme_pixels_need_not_set_the_scale():
    image = torch.linspace(-1, 1, 784)
    image[0] = -50
    limits = [
        visible(show_images(image[None], signed=True, quantile=q))[0]
        .images[0]
        .get_clim()
        for q in (1.0, 0.98)
    ]
    assert limits[0] == (-50, 50)
    assert limits[1] == pytest.approx((-0.98, 0.98), abs=0.01)


def test_a_signed_image_with_one_pixel_shows_it_at_any_quantile():
    image = torch.zeros(1, 784)
    image[0, 5] = 2.0
    assert visible(show_images(image, signed=True, quantile=0.98))[0].images[
        0
    ].get_clim() == (-2, 2)


def test_views_and_tensors_that_need_gradients_can_be_drawn():
    weight = normal(6, 784).requires_grad_()
    figure = show_images(weight[::2], signed=True)
    assert np.array_equal(
        visible(figure)[1].images[0].get_array(),
        weight[2].detach().reshape(28, 28).numpy(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_images_of_every_floating_dtype_can_be_drawn(dtype):
    images = torch.rand(2, 784).to(dtype)
    figure = show_images(images)
    figure.canvas.draw()
    assert np.allclose(
        visible(figure)[0].images[0].get_array(),
        images[0].float().reshape(28, 28).numpy(),
    )


def test_a_wrong_number_of_titles_is_refused():
    with pytest.raises(ValueError, match="titles"):
        show_images(torch.rand(3, 784), titles=["only one"])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="images"):
        show_images(torch.rand(0, 784))


# --- plot_confusion -------------------------------------------------------------------------------


def test_the_confusion_counts_true_digits_by_row_and_predicted_ones_by_column():
    labels = torch.tensor([0, 0, 0, 0, 3, 3, 9])
    predictions = torch.tensor([0, 0, 0, 5, 3, 8, 9])
    _, axes = plt.subplots()
    plot_confusion(axes, labels, predictions, "LoRA on digits turned by 45°")
    expected = np.zeros((10, 10))
    expected[0, 0], expected[0, 5], expected[3, 3], expected[3, 8], expected[9, 9] = (
        0.75,
        0.25,
        0.5,
        0.5,
        1,
    )
    (picture,) = axes.images
    assert np.allclose(picture.get_array(), expected)
    assert picture.get_clim() == (0, 1)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "3", (5, 0): "1", (3, 3): "1", (8, 3): "1", (9, 9): "1"}
    assert axes.get_title() == "LoRA on digits turned by 45°"
    assert axes.get_xlabel() == "predicted digit"
    assert axes.get_ylabel() == "true digit"
    assert list(axes.get_xticks()) == list(axes.get_yticks()) == list(range(10))


@pytest.mark.parametrize("hits", range(5, 101, 5))
def test_the_numbers_of_a_confusion_stand_out_from_their_cells(hits):
    # In the middle blues neither ink nor paper reaches more than 4.2.
    labels = torch.zeros(100, dtype=torch.int64)
    predictions = torch.cat([torch.zeros(hits), torch.ones(100 - hits)]).long()
    _, axes = plt.subplots()
    plot_confusion(axes, labels, predictions, "")
    (picture,) = axes.images
    assert len(axes.texts) == (1 if hits == 100 else 2)
    for text in axes.texts:
        column, row = text.get_position()
        cell = picture.to_rgba(picture.get_array())[row, column]
        assert contrast(text.get_color(), cell[:3]) > 4
