"""What is new in each shift, what the network knows before, and that nothing leaks from one into the other."""

import pytest
import torch
from support import generator

from lowrank_utils.data import Digits, Splits, blur, invert, permute_pixels, rotate
from lowrank_utils.shifts import ALL, SHIFTS, shifted_splits

FIRST, LAST = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)

# name → what happens to the pixels, the labels before, the new ones, whether the mean image is subtracted.
EXPECTED = {
    "rotation": (lambda digits: rotate(digits, 30.0), ALL, ALL, True),
    "permutation": (lambda digits: permute_pixels(digits, 7), ALL, ALL, True),
    "inversion": (invert, ALL, ALL, True),
    "blur": (blur, ALL, ALL, True),
    "unseen classes": (lambda digits: digits, FIRST, LAST, True),
    "raw inversion": (invert, ALL, ALL, False),
    "unseen classes, frozen head": (lambda digits: digits, FIRST, LAST, True),
}


def noise(count, seed, brightness=1.0):
    images = brightness * torch.rand(count, 784, generator=generator(seed), dtype=torch.float64)
    return Digits(images, torch.arange(count) % 10)


# Each split is of another brightness, so that the mean of one can't pass for that of another.
SPLITS = Splits(noise(40, 1), noise(30, 2, 0.7), noise(20, 3, 0.4))


@pytest.mark.parametrize("name", SHIFTS)
def test_each_split_is_changed_alike_and_centred_by_the_mean_of_its_own_domains_training_images(name):
    assert set(SHIFTS) == set(EXPECTED)
    change, before, after, centred = EXPECTED[name]

    def chosen(digits, labels):
        places = [place for place, label in enumerate(digits.labels.tolist()) if label in labels]
        return Digits(digits.images[places], digits.labels[places])

    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    known = chosen(SPLITS.train, before)
    assert familiar.labels.tolist() == known.labels.tolist()
    mean = sum(known.images) / len(known.images) if centred else 0
    torch.testing.assert_close(familiar.images, known.images - mean, rtol=0, atol=1e-12)
    learnt = change(chosen(SPLITS.train, after)).images
    mean = sum(learnt) / len(learnt) if centred else 0
    for original, shifted in zip(SPLITS, new, strict=True):
        expected = change(chosen(original, after))
        assert shifted.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(shifted.images, expected.images - mean, rtol=0, atol=1e-12)


def test_the_pixels_of_all_splits_change_places_alike_and_those_of_another_network_otherwise():
    same = Splits(*(noise(20, 1) for _ in range(3)))
    permuted = shifted_splits("permutation", same, 0.0, 7)[1]
    for split in permuted:
        assert torch.equal(split.images, permuted.train.images)
    other = shifted_splits("permutation", same, 0.0, 8)[1]
    assert not torch.allclose(other.train.images, permuted.train.images)


@pytest.mark.parametrize(("degrees", "place"), [(90, (5, 13)), (-90, (22, 14))])
def test_positive_degrees_turn_counter_clockwise(degrees, place):
    # A dot at three o'clock, beside a blank picture, so that the mean image leaves it the brightest pixel.
    pictures = torch.zeros(2, 28, 28, dtype=torch.float64)
    pictures[0, 13, 22] = 1
    dots = Digits(pictures.flatten(1), torch.tensor([0, 1]))
    new = shifted_splits("rotation", Splits(dots, dots, dots), degrees, 7)[1]
    for split in new:
        assert divmod(split.images[0].argmax().item(), 28) == place


def test_only_where_classes_are_unseen_is_the_last_layer_trained():
    assert [name for name, shift in SHIFTS.items() if shift.trains_last_layer] == ["unseen classes"]


def test_an_unknown_shift_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown shift 'mirror'; there are 'rotation', .*'blur'"):
        shifted_splits("mirror", SPLITS, 30.0, 7)
