"""What is new in each shift, what the network knows before, and that nothing leaks from
one into the other."""

import functools

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

each = pytest.mark.parametrize("name", SHIFTS)
assert_close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def noise(count, seed, brightness=1.0):
    images = torch.rand(count, 784, generator=generator(seed), dtype=torch.float64)
    return Digits(brightness * images, torch.arange(count) % 10)


# Each split is of another brightness, so that the mean of one can't pass for that of
# another.
SPLITS = Splits(noise(40, 1), noise(30, 2, 0.7), noise(20, 3, 0.4))


def chosen(digits, labels):
    places = [n for n, label in enumerate(digits.labels.tolist()) if label in labels]
    return Digits(digits.images[places], digits.labels[places])


def beside_a_blank(picture):
    """Return three splits of a picture and a blank one, so that the mean image leaves
    what is bright in it the brightest."""
    images = torch.stack([picture, torch.zeros(28, 28, dtype=torch.float64)])
    return Splits(*[Digits(images.flatten(1), torch.tensor([0, 1]))] * 3)


@each
def test_each_split_is_changed_alike_and_centred_by_its_domains_mean(name):
    assert set(SHIFTS) == set(EXPECTED)
    change, before, after, centred = EXPECTED[name]
    given = [split.images.clone() for split in SPLITS]
    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    known = chosen(SPLITS.train, before)
    learnt, *others = (change(chosen(split, after)) for split in SPLITS)
    pairs = [(familiar, known, known), (new.train, learnt, learnt)]
    pairs += [(new.validation, others[0], learnt), (new.test, others[1], learnt)]
    for found, expected, domain in pairs:
        mean = sum(domain.images) / len(domain.images) if centred else 0
        assert found.labels.tolist() == expected.labels.tolist()
        assert_close(found.images, expected.images - mean)
    assert SHIFTS[name][1:4] == (before, after, centred)
    # What was given stays as it was.
    assert all(map(torch.equal, (split.images for split in SPLITS), given))


def test_the_last_layer_is_trained_where_the_name_says_so_and_where_classes_are_new():
    trained = {name for name, shift in SHIFTS.items() if shift.trains_last_layer}
    names = {f"{name}, trained last layer" for name in TRAINED}
    assert trained == {"unseen classes"} | names


@pytest.mark.parametrize(("degrees", "place"), [(90, (5, 13)), (-90, (22, 14))])
def test_positive_degrees_turn_counter_clockwise(degrees, place):
    # A dot at three o'clock.
    picture = torch.zeros(28, 28, dtype=torch.float64)
    picture[13, 22] = 1
    for split in shifted_splits("rotation", beside_a_blank(picture), degrees, 7)[1]:
        assert divmod(split.images[0].argmax().item(), 28) == place


# --- What nothing may leak from, and what each shift is, without a second table ------------------------------


@each
def test_neither_the_pretraining_digits_nor_any_mean_come_from_validation_or_test_images(
    name,
):
    familiar, new = shifted_splits(name, SPLITS, 30.0, 7)
    others = Splits(SPLITS.train, noise(30, 12, 5.0), noise(20, 13, 9.0))
    familiar_then, then = shifted_splits(name, others, 30.0, 7)
    for found, expected in ((familiar_then, familiar), (then.train, new.train)):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
    # Each split by itself, too: the test images are what they are whatever the
    # validation images are, and conversely.
    _, mixed = shifted_splits(name, others._replace(test=SPLITS.test), 30.0, 7)
    assert torch.equal(mixed.test.images, new.test.images)
    assert torch.equal(mixed.validation.images, then.validation.images)
    for found, expected in zip(then[1:], new[1:], strict=True):
        assert not torch.allclose(found.images, expected.images)


def test_a_rotation_by_90_degrees_is_a_quarter_turn_to_the_left():
    turned = torch.rot90(SPLITS.train.images.unflatten(1, (28, 28)), 1, dims=(1, 2))
    new = shifted_splits("rotation", SPLITS, 90.0, 7)[1]
    assert_close(new.train.images, (turned - turned.mean(dim=0)).flatten(1))


def test_the_rotation_of_the_comparison_turns_to_the_right():
    # A bar from the centre to twelve o'clock comes to half past one.
    picture = torch.zeros(28, 28, dtype=torch.float64)
    picture[4:6, 13:15] = 1
    assert Settings.rotation == -45
    splits = beside_a_blank(picture)
    new = shifted_splits("rotation", splits, Settings.rotation, 7)[1]
    row, column = divmod(new.train.images[0].argmax().item(), 28)
    # Nine pixels from the centre, half of their square upwards and half to the right.
    assert abs(row - (13.5 - 9 / 2**0.5)) < 1.5
    assert abs(column - (13.5 + 9 / 2**0.5)) < 1.5


def test_the_inversion_is_the_centred_original_with_its_sign_changed_and_the_raw_one_is_not_centred():
    familiar, new = shifted_splits("inversion", SPLITS, 30.0, 7)
    assert_close(new.train.images, -familiar.images)
    familiar, new = shifted_splits("raw inversion", SPLITS, 30.0, 7)
    assert torch.equal(familiar.images, SPLITS.train.images)
    for original, split in zip(SPLITS, new, strict=True):
        assert torch.equal(split.images, 1 - original.images)


def test_a_permutation_moves_each_pixel_and_another_seed_moves_it_elsewhere():
    # Each pixel has a grey value of its own.
    pixels = torch.arange(784, dtype=torch.float64).view(28, 28)
    splits = beside_a_blank(pixels)
    new, other = (shifted_splits("permutation", splits, 0.0, s)[1] for s in (7, 8))
    order = (new.train.images[0] * 2).round().int().tolist()
    assert order != sorted(order) == list(range(784))
    for split in new:
        assert torch.equal(split.images, new.train.images)
    assert (other.train.images[0] == new.train.images[0]).double().mean() < 0.1


@pytest.mark.parametrize("name", [n for n in SHIFTS if not n.startswith("rotation")])
def test_only_the_rotation_goes_by_the_angle(name):
    first, second = (shifted_splits(name, SPLITS, d, 7)[1] for d in (10.0, 80.0))
    assert torch.equal(first.train.images, second.train.images)


def test_an_unknown_shift_is_refused_with_all_the_names():
    names = ", ".join(repr(name) for name in SHIFTS)
    said = f"^unknown shift 'blurred'; there are {names}$"
    with pytest.raises(ValueError, match=said):
        shifted_splits("blurred", SPLITS, 30.0, 7)


def test_a_row_in_the_table_is_all_that_a_new_shift_needs(monkeypatch):
    name = "fainter even digits"
    settings = {"shift": name, "networks": [1], "methods": ["LoRA"], "ranks": [2]}
    settings |= {"steps": [16], "tuning_seeds": [101], "seeds": [1]}
    with pytest.raises(ValueError, match="shift must be one of"):
        Settings(**settings)

    def fainter(digits, degrees, seed):
        return Digits(digits.images * degrees / seed, digits.labels)

    row = Shift(fainter, pretrained_on=(1, 3), adapted_to=(0, 2), centred=False)
    monkeypatch.setitem(SHIFTS, name, row)
    assert Settings(**settings).shift == name
    familiar, new = shifted_splits(name, SPLITS, 3.0, 6)
    assert set(familiar.labels.tolist()) == {1, 3}
    faint = chosen(SPLITS.test, (0, 2)).images / 2
    assert_close(new.test.images, faint, atol=1e-15)
