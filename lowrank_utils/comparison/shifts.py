"""The shifts of the comparison: what a network is pretrained on, and what is new when
it is adapted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lowrank_utils.data import Digits, Splits, blur, invert, permute_pixels, rotate

ALL = tuple(range(10))


class Shift(NamedTuple):
    """One kind of task.

    Attributes:
        change: called with digits, an angle in degrees and a seed, for the digits that
            are new. Angle and seed are the experiment's; most shifts need neither.
        pretrained_on: the labels that the network knows beforehand.
        adapted_to: the labels of the new digits.
        centred: subtract from all images the mean image of their own domain.
        trains_last_layer: train the weight and the bias of the last layer too, in every
            method.
    """

    change: Callable[[Digits, float, int], Digits]
    pretrained_on: tuple[int, ...] = ALL
    adapted_to: tuple[int, ...] = ALL
    centred: bool = True
    trains_last_layer: bool = False


SHIFTS: dict[str, Shift] = {
    "rotation": Shift(lambda digits, degrees, _: rotate(digits, degrees)),
    "permutation": Shift(lambda digits, _, seed: permute_pixels(digits, seed)),
    "inversion": Shift(lambda digits, *_: invert(digits)),
    "blur": Shift(lambda digits, *_: blur(digits)),
    # The last layer's rows of classes that the network has never seen hold nothing to
    # build on.
    "unseen classes": Shift(
        lambda digits, *_: digits,
        pretrained_on=(0, 1, 2, 3, 4),
        adapted_to=(5, 6, 7, 8, 9),
        trains_last_layer=True,
    ),
    # These two show what goes wrong without centred inputs, and with a last layer that
    # stays.
    "raw inversion": Shift(lambda digits, *_: invert(digits), centred=False),
    "unseen classes, frozen head": Shift(
        lambda digits, *_: digits,
        pretrained_on=(0, 1, 2, 3, 4),
        adapted_to=(5, 6, 7, 8, 9),
    ),
}

# The last layer is trained as well, in every method: what is then left for an adapter
# to do?
SHIFTS |= {
    f"{name}, trained last layer": SHIFTS[name]._replace(trains_last_layer=True)
    for name in ("rotation", "permutation", "inversion")
}


def shifted_splits(
    name: str, splits: Splits, degrees: float, seed: int
) -> tuple[Digits, Splits]:
    """Return the digits to pretrain on, and the new ones to adapt to, to choose by and
    to report.

    Args:
        name: in ``SHIFTS``.
        splits: grey values from 0 to 1.
        degrees: counter-clockwise, for ``"rotation"``.
        seed: of the pixels' order, for ``"permutation"``.

    Raises:
        ValueError: ``name`` is unknown.
    """
    if name not in SHIFTS:
        raise ValueError(
            f"unknown shift {name!r}; there are {', '.join(map(repr, SHIFTS))}"
        )
    shift = SHIFTS[name]
    familiar = _with_labels(splits.train, shift.pretrained_on)
    chosen = [_with_labels(digits, shift.adapted_to) for digits in splits]
    new = Splits(*(shift.change(digits, degrees, seed) for digits in chosen))
    if not shift.centred:
        return familiar, new
    # The mean is the training images' in all three splits: a model never learns from
    # the others.
    mean = new.train.images.mean(dim=0)
    return _minus(familiar, familiar.images.mean(dim=0)), Splits(
        *(_minus(digits, mean) for digits in new)
    )


def _with_labels(digits: Digits, labels: tuple[int, ...]) -> Digits:
    chosen = torch.isin(digits.labels, digits.labels.new_tensor(labels))
    return Digits(digits.images[chosen], digits.labels[chosen])


def _minus(digits: Digits, mean: torch.Tensor) -> Digits:
    return Digits(digits.images - mean, digits.labels)
