"""Disks that are full or read-only: a clear error, and what was there before is still
there, whole."""

import contextlib
import errno
import io
import os
from pathlib import Path

import pytest
import torch
from mirror import TINY, assert_tiny, contents, load_tiny, message_of, serving
from support import assert_same_state, linear_layer, move_all, snapshot
from test_tables import SCORES, result
from torch import nn

from lowrank_utils import _mnist
from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters import folders as _folders
from lowrank_utils.adapters.files import load_adapter, save_adapter
from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.comparison.report import write_report
from lowrank_utils.comparison.store import Store
from lowrank_utils.dora import LinearWithDoRA

pytestmark = pytest.mark.slow

SIDE = 60


def plain():
    return nn.Sequential(linear_layer(SIDE, SIDE))


def adapted(rank):
    model = plain()
    replace_linear_layers(model, LinearWithDoRA, rank, 1.0)
    freeze_linear_layers(model)
    return move_all(model)


def names(folder):
    return [path.name for path in folder.iterdir()]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Full --------------------------------------------------------------------------------------------------


def test_saving_to_a_full_disk_keeps_the_older_adapter_and_leaves_no_half(mount):
    disk = mount("size=48k")
    folder = disk / "adapter"
    save_adapter(adapted(rank=1), folder)
    before, large = files(folder), adapted(rank=SIDE)
    state = snapshot(large)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_adapter(large, folder)
    assert caught.value.errno == errno.ENOSPC
    assert files(folder) == before
    assert names(disk) == ["adapter"]
    assert_same_state(large, state)
    assert load_adapter(plain(), folder) == ["0"]
    # Once there is space, the same call does it.
    mount("size=1m")
    save_adapter(large, folder)
    fresh = plain()
    load_adapter(fresh, folder)
    assert torch.equal(fresh[0].lora.A, large[0].lora.A)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class Full(io.FileIO):
    """A file that takes a few bytes and then no more."""

    def write(self, content):
        super().write(content[:10])
        no_space()


# An exchange is one step and renames nothing.
STEPS = ["make the folder", "open", "write", "sync"]


@pytest.mark.parametrize(
    ("exchange", "step"),
    [(True, step) for step in STEPS]
    + [(False, step) for step in [*STEPS, "first rename", "second rename"]],
)
def test_whichever_step_finds_no_space_the_older_adapter_is_there(
    tmp_path, monkeypatch, step, exchange
):
    folder = tmp_path / "adapter"
    save_adapter(adapted(rank=1), folder)
    before, make, rename, renamed = files(folder), Path.mkdir, Path.rename, []

    def makes(self, *arguments, **options):
        if self.suffix == ".new":
            no_space()
        make(self, *arguments, **options)

    def renames(self, target):
        renamed.append(self)
        if len(renamed) == (1 if step == "first rename" else 2):
            no_space()
        return rename(self, target)

    replaced = {
        "make the folder": (Path, "mkdir", makes),
        "open": (Path, "open", no_space),
        "write": (Path, "open", lambda path, mode: Full(path, mode)),
        "sync": (os, "fsync", no_space),
    }
    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(_folders, "_exchange", lambda *_: False)
        patch.setattr(*replaced.get(step, (Path, "rename", renames)))
        with pytest.raises(OSError, match="No space left on device"):
            save_adapter(adapted(rank=2), folder)
    assert load_adapter(plain(), folder) == ["0"]
    assert files(folder) == before
    assert names(tmp_path) == ["adapter"]


def test_a_download_onto_a_full_disk_leaves_nothing_and_says_why(
    mount, cache, tiny_is_published, monkeypatch
):
    place = mount("size=16k") / "lowrank"
    monkeypatch.setattr(_mnist, "user_cache_path", lambda *_: place)
    with serving(tiny_is_published, monkeypatch):
        message = message_of()
        assert message.startswith("MNIST could not be downloaded.")
        assert "No space left on device" in message
        assert contents(place) == []
        mount("size=1m")
        assert_tiny(load_tiny())
    assert not cache.exists()


def test_a_report_onto_a_full_disk_leaves_the_older_one_and_no_half(mount):
    folder = mount("size=2m")
    results = [("a", result(SCORES))]
    write_report(results, "abc123", folder, "sweep")
    before = files(folder)
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match="No space left on device"):
        write_report(results, "def456", folder, "sweep")
    filler.unlink()
    assert files(folder) == before
    write_report(results, "def456", folder, "sweep")
    assert b"def456" in files(folder)["sweep.md"]


# --- Read-only ---------------------------------------------------------------------------------------------


def test_saving_to_a_read_only_disk_is_an_error_and_the_adapter_there_can_be_loaded(
    mount,
):
    folder = mount("size=1m") / "adapter"
    save_adapter(adapted(rank=1), folder)
    before = files(folder)
    mount("ro")
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="Read-only file system"):
            save_adapter(adapted(rank=2), target)
    assert files(folder) == before
    assert load_adapter(plain(), folder) == ["0"]


def test_an_empty_cache_that_is_read_only_is_one_clear_line(mount, cache, monkeypatch):
    place = mount("ro")
    for root in (place, place / "lowrank"):
        monkeypatch.setattr(_mnist, "user_cache_path", lambda *_, root=root: root)
        reason = f"MNIST can't be stored in {root} (Read-only file system). "
        assert message_of().startswith(f"{reason}Set LOWRANK_DATA_DIR")
    assert not cache.exists()


def test_a_read_only_cache_that_holds_the_files_is_as_good_as_another(
    mount, tiny_is_published, monkeypatch
):
    place = mount("size=1m")
    monkeypatch.delenv("LOWRANK_DATA_DIR", raising=False)
    monkeypatch.setattr(_mnist, "user_cache_path", lambda *_: place)
    with serving(tiny_is_published, monkeypatch):
        load_tiny()
    mount("ro")
    assert_tiny(load_tiny())
    assert set(TINY) <= {path.name for path in (place / "MNIST" / "raw").iterdir()}


@pytest.mark.parametrize("prepared", [False, True])
def test_a_sweep_into_a_read_only_folder_is_one_clear_line(mount, prepared):
    disk = mount("size=1m")
    if prepared:
        with Store(disk / "out").locked():
            pass
    mount("ro")
    message = r"out can't be written \(Read-only file system\); choose another --out"
    with pytest.raises(SweepError, match=message), Store(disk / "out").locked():
        pytest.fail("it can't be locked")
