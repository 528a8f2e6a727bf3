"""What is new in each shift, what the network knows before, and that nothing leaks from
one into the other."""

import pytest
import torch
from support import generator

from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.shifts import ALL, SHIFTS, Shift, shifted_splits
from lowrank_utils.data import Digits, Splits, blur, invert, permute_pixels, rotate

FIRST, LAST = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)

# name → what happens to the pixels, the labels before, the new ones, whether the mean
# image is subtracted.
EXPECTED = {
    "rotation": (lambda digits: rotate(digits, 30.0), ALL, ALL, True),
    "permutation": (lambda digits: permute_pixels(digits, 7), ALL, ALL, True),
    "inversion": (invert, ALL, ALL, True),
    "blur": (blur, ALL, ALL, True),
    "unseen classes": (lambda digits: digits, FIRST, LAST, True),
    "raw inversion": (invert, ALL, ALL, False),
    "unseen classes, frozen head": (lambda digits: digits, FIRST, LAST, True),
}
TRAINED = ("rotation", "permutation", "inversion")
EXPECTED |= {f"{name}, trained last layer": EXPECTED[name] for name in TRAINED}


def noise(count, seed, brightness=1.0):
    images = brightness * torch.rand(
        count, 784, generator=generator(seed), dtype=torch.float64
    )
    return Digits(images, torch.arange(count) % 10)


# Each split is of another brightness, so that the mean of one can't pass for that of
# another.
SPLITS = Splits(noise(40, 1), noise(30, 2, 0.7), noise(20, 3, 0.4))


@pytest.mark.parametrize("name", SHIFTS)
def test_each_split_is_changed_alike_and_centred_by_the_mean_of_its_own_domains_training_images(
    name,
):
    assert set(SHIFTS) == set(EXPECTED)
    change, before, after, centred = EXPECTED[name]

    def chosen(digits, labels):
        places = [
            place
            for place, label in enumerate(digits.labels.tolist())
            if label in labels
        ]
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
        torch.testing.assert_close(
            shifted.images, expected.images - mean, rtol=0, atol=1e-12
        )


def test_the_last_layer_is_trained_where_the_name_says_so_and_where_classes_are_new():
    trained = {name for name, shift in SHIFTS.items() if shift.trains_last_layer}
    assert trained == {
        "unseen classes",
        *(f"{name}, trained last layer" for name in TRAINED),
    }


def test_the_pixels_of_all_splits_change_places_alike_and_those_of_another_network_otherwise():
    same = Splits(*(noise(20, 1) for _ in range(3)))
    permuted = shifted_splits("permutation", same, 0.0, 7)[1]
    for split in permuted:
        assert torch.equal(split.images, permuted.train.images)
    other = shifted_splits("permutation", same, 0.0, 8)[1]
    assert not torch.allclose(other.train.images, permuted.train.images)


@pytest.mark.parametrize(("degrees", "place"), [(90, (5, 13)), (-90, (22, 14))])
def test_positive_degrees_turn_counter_clockwise(degrees, place):
    # A dot at three o'clock, beside a blank picture, so that the mean image leaves it
    # the brightest pixel.
    pictures = torch.zeros(2, 28, 28, dtype=torch.float64)
    pictures[0, 13, 22] = 1
    dots = Digits(pictures.flatten(1), torch.tensor([0, 1]))
    new = shifted_splits("rotation", Splits(dots, dots, dots), degrees, 7)[1]
    for split in new:
        assert divmod(split.images[0].argmax().item(), 28) == place


# --- What nothing may leak from, and what each shift is, without a second table ------------------------------


@pytest.mark.parametrize("name", SHIFTS)
def test_neither_the_pretraining_digits_nor_any_mean_come_from_validation_or_test_images(
    name,
):
    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    others = Splits(SPLITS.train, noise(30, 12, 5.0), noise(20, 13, 9.0))
    familiar_then, then = shifted_splits(name, others, 30.0, 7)
    assert torch.equal(familiar_then.images, familiar.images)
    assert torch.equal(familiar_then.labels, familiar.labels)
    assert torch.equal(then.train.images, new.train.images)
    assert torch.equal(then.train.labels, new.train.labels)
    # Each split by itself, too: the test images are what they are whatever the
    # validation images are, and conversely.
    _, mixed = shifted_splits(name, others._replace(test=SPLITS.test), 30.0, 7)
    assert torch.equal(mixed.test.images, new.test.images)
    assert torch.equal(mixed.validation.images, then.validation.images)
    assert not torch.allclose(then.validation.images, new.validation.images)
    assert not torch.allclose(then.test.images, new.test.images)


@pytest.mark.parametrize("name", SHIFTS)
def test_the_network_knows_some_labels_before_and_meets_some_afterwards(name):
    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    unseen = name.startswith("unseen classes")
    assert (
        set(SHIFTS[name].pretrained_on)
        == set(familiar.labels.tolist())
        == set(FIRST if unseen else ALL)
    )
    for split in new:
        assert set(split.labels.tolist()) == set(LAST if unseen else ALL)
    assert set(SHIFTS[name].adapted_to) == set(new.train.labels.tolist())


@pytest.mark.parametrize("name", SHIFTS)
def test_the_mean_image_of_both_domains_is_zero_after_centring_and_only_then(name):
    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    for domain in (familiar, new.train):
        assert (domain.images.mean(dim=0).abs().max() < 1e-12) == (
            name != "raw inversion"
        )
    # Those that aren't learnt from keep what is left of theirs.
    for split in (new.validation, new.test):
        assert split.images.mean(dim=0).abs().max() > 0.01


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_leaves_the_digits_that_it_was_given_as_they_were(name):
    images = [split.images.clone() for split in SPLITS]
    shifted_splits(name, SPLITS, 30.0, 7)
    assert all(
        torch.equal(split.images, image)
        for split, image in zip(SPLITS, images, strict=True)
    )


def pictures_less_their_mean(pictures):
    return (pictures - pictures.mean(dim=0)).flatten(1)


def test_a_rotation_by_90_degrees_is_a_quarter_turn_to_the_left():
    turned = torch.rot90(SPLITS.train.images.unflatten(1, (28, 28)), 1, dims=(1, 2))
    new = shifted_splits("rotation", SPLITS, 90.0, 7)[1]
    torch.testing.assert_close(
        new.train.images, pictures_less_their_mean(turned), rtol=0, atol=1e-12
    )


def test_the_rotation_of_the_comparison_turns_to_the_right():
    # A bar from the centre to twelve o'clock, beside a blank picture, comes to half
    # past one.
    pictures = torch.zeros(2, 28, 28, dtype=torch.float64)
    pictures[0, 4:6, 13:15] = 1
    dots = Digits(pictures.flatten(1), torch.tensor([0, 1]))
    assert Settings.rotation == -45
    new = shifted_splits("rotation", Splits(dots, dots, dots), Settings.rotation, 7)[1]
    row, column = divmod(new.train.images[0].argmax().item(), 28)
    # Nine pixels from the centre, half of their square upwards and half to the right.
    assert abs(row - (13.5 - 9 / 2**0.5)) < 1.5
    assert abs(column - (13.5 + 9 / 2**0.5)) < 1.5


def test_the_inversion_is_the_centred_original_with_its_sign_changed_and_the_raw_one_is_not_centred():
    familiar, new = shifted_splits("inversion", SPLITS, 30.0, 7)
    torch.testing.assert_close(new.train.images, -familiar.images, rtol=0, atol=1e-12)
    familiar, new = shifted_splits("raw inversion", SPLITS, 30.0, 7)
    assert torch.equal(familiar.images, SPLITS.train.images)
    for original, split in zip(SPLITS, new, strict=True):
        assert torch.equal(split.images, 1 - original.images)


def test_a_permutation_moves_each_pixel_and_another_seed_moves_it_elsewhere():
    # Each pixel has a grey value of its own, and the second picture none.
    pixels = torch.stack([torch.arange(784, dtype=torch.float64), torch.zeros(784)])
    numbered = Digits(pixels, torch.tensor([0, 1]))
    new = shifted_splits("permutation", Splits(numbered, numbered, numbered), 0.0, 7)[1]
    order = (new.train.images[0] * 2).round().int().tolist()
    assert sorted(order) == list(range(784))
    assert order != list(range(784))
    for split in new:
        assert torch.equal(split.images, new.train.images)
    other = shifted_splits("permutation", Splits(numbered, numbered, numbered), 0.0, 8)[
        1
    ]
    assert (other.train.images[0] == new.train.images[0]).double().mean() < 0.1


@pytest.mark.parametrize(
    "name", [name for name in SHIFTS if not name.startswith("rotation")]
)
def test_only_the_rotation_goes_by_the_angle(name):
    first, second = (
        shifted_splits(name, SPLITS, degrees, 7)[1] for degrees in (10.0, 80.0)
    )
    assert torch.equal(first.train.images, second.train.images)


def test_an_unknown_shift_is_refused_with_all_the_names():
    names = ", ".join(repr(name) for name in SHIFTS)
    with pytest.raises(
        ValueError, match=f"^unknown shift 'blurred'; there are {names}$"
    ):
        shifted_splits("blurred", SPLITS, 30.0, 7)


def test_a_row_in_the_table_is_all_that_a_new_shift_needs(monkeypatch):
    settings = {
        "shift": "fainter even digits",
        "networks": [1],
        "methods": ["LoRA"],
        "ranks": [2],
        "steps": [16],
        "tuning_seeds": [101],
        "seeds": [1],
    }
    with pytest.raises(ValueError, match="shift must be one of"):
        Settings(**settings)

    def fainter(digits, degrees, seed):
        return Digits(digits.images * degrees / seed, digits.labels)

    row = Shift(fainter, pretrained_on=(1, 3), adapted_to=(0, 2), centred=False)
    monkeypatch.setitem(SHIFTS, settings["shift"], row)
    assert Settings(**settings).shift == "fainter even digits"
    familiar, new = shifted_splits("fainter even digits", SPLITS, 3.0, 6)
    assert set(familiar.labels.tolist()) == {1, 3}
    chosen = (SPLITS.test.labels == 0) | (SPLITS.test.labels == 2)
    torch.testing.assert_close(
        new.test.images, SPLITS.test.images[chosen] / 2, rtol=0, atol=1e-15
    )
