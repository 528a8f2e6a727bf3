"""A picture with sliders follows them, and leaves one sentence in the file of a
notebook."""

import io

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ipywidgets import FloatSlider, IntSlider

from lowrank_utils.interactive import WITHOUT_A_KERNEL, PictureWithSliders


@pytest.fixture
def drawn():
    """What ``draw`` was called with."""
    return []


@pytest.fixture
def shown(drawn):
    def draw(height, width):
        drawn.append((height, width))
        figure, axes = plt.subplots(figsize=(2, 2))
        axes.barh([0], [width], height)
        axes.set(xlim=(0, 4), ylim=(-2, 2))
        return figure

    return PictureWithSliders(
        draw,
        height=IntSlider(1, 1, 4, description="height of the bar"),
        width=FloatSlider(1.0, max=4),
    )


def pixels(shown):
    return matplotlib.image.imread(io.BytesIO(shown.picture.value), format="png")


def test_it_starts_with_the_sliders_values(shown, drawn):
    assert drawn == [(1, 1.0)]
    assert pixels(shown).shape[:2] == (200, 200)


@pytest.mark.parametrize(
    ("name", "value", "call"), [("height", 3, (3, 1.0)), ("width", 2.5, (1, 2.5))]
)
def test_moving_a_slider_draws_another_picture(shown, drawn, name, value, call):
    before = pixels(shown)
    shown.sliders[name].value = value
    assert drawn[-1] == call
    assert len(drawn) == 2
    after = pixels(shown)
    assert before.shape == after.shape
    assert not np.array_equal(before, after)


def test_moving_back_gives_the_first_picture_again(shown):
    first = shown.picture.value
    shown.sliders["height"].value = 3
    shown.sliders["height"].value = 1
    assert shown.picture.value == first


def test_no_figure_is_left_open(shown):
    assert plt.get_fignums() == []
    shown.sliders["height"].value = 2
    assert plt.get_fignums() == []


def test_the_sliders_stand_above_the_picture(shown):
    assert shown.children == (
        shown.sliders["height"],
        shown.sliders["width"],
        shown.picture,
    )


def test_a_front_end_gets_the_widget_and_a_page_without_one_a_sentence(shown):
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == WITHOUT_A_KERNEL
    assert (
        bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.model_id
    )
