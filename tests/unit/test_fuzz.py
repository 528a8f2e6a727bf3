"""Whatever bytes a file holds, what comes out is the right thing or a documented error,
and nothing else changes."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings, strategies as st
from mirror import TINY, assert_tiny, load_tiny, publish
from support import assert_same_state, linear_layer, move_all, snapshot
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters.config import AdapterFileError
from lowrank_utils.adapters.files import load_adapter, save_adapter
from lowrank_utils.data import DataError
from lowrank_utils.dora import LinearWithDoRA

pytestmark = pytest.mark.slow

# 300 examples each; at night as many as the profile says.
FUZZ = settings(max_examples=max(300, settings().max_examples))

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def plain():
    return nn.Sequential(
        linear_layer(7, 5), nn.Tanh(), linear_layer(5, 3, seed=3)
    ).requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter, its files' bytes, and the outputs that it gives."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    model = plain()
    replace_linear_layers(model, LinearWithDoRA, 2, 1.5)
    freeze_linear_layers(model)
    save_adapter(move_all(model), folder)
    return (
        folder,
        {name: (folder / name).read_bytes() for name in FILES},
        snapshot(model),
    )


@st.composite
def changes(draw):
    """Return a function that changes bytes: some are flipped, cut off, put in, taken
    out or put elsewhere."""
    kind = draw(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat", "overwrite"])
    )
    # Most of what a reader has to understand stands at the beginning.
    place = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000)))
    length = draw(st.integers(1, 40))
    new = draw(st.binary(min_size=1, max_size=40))
    bit = draw(st.integers(0, 7))

    def change(content):
        at = place % (len(content) + 1)
        before, after = content[:at], content[at:]
        return {
            "flip": before + bytes([after[0] ^ (1 << bit)]) + after[1:]
            if after
            else before,
            "cut": before,
            "insert": before + new + after,
            "remove": before + after[length:],
            "repeat": before + after[:length] + after,
            "overwrite": before + new + after[len(new) :],
        }[kind]

    return change


# Headers of safetensors with any names, dtypes, shapes and places, before any numbers.
KEYS = st.sampled_from(
    [
        "__metadata__",
        *(f"base_model.model.{n}.lora_{p}.weight" for n in "02" for p in "AB"),
        "0.weight",
        "",
    ]
) | st.text(max_size=8)
WHOLE = st.integers(-2, 70) | st.integers(-(2**65), 2**65)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F64", "F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"]
        ),
        "shape": st.lists(WHOLE, max_size=3),
        "data_offsets": st.lists(WHOLE, max_size=3),
    }
) | st.dictionaries(st.text(max_size=5), st.text(max_size=5) | WHOLE, max_size=2)


@st.composite
def invented_safetensors(draw):
    header = json.dumps(draw(st.dictionaries(KEYS, ENTRIES, max_size=5))).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=200))


def check_adapter(adapter, changed):
    """Load an adapter of which some files are ``changed``: all is as it was saved, or
    it is refused."""
    folder, whole, loaded = adapter
    for name in FILES:
        (folder / name).write_bytes(changed.get(name, whole[name]))
    model = plain()
    before, modules, state = (
        snapshot(model),
        list(model.modules()),
        torch.get_rng_state(),
    )
    try:
        names = load_adapter(model, folder)
    except AdapterFileError as error:
        assert str(error).startswith(tuple(f"{name}: " for name in FILES))  # noqa: PT017 (both outcomes are right)
        assert_same_state(model, before)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    else:
        # Only what doesn't touch the numbers gets through: the digest holds them.
        assert names == ["0", "2"]
        if FILES[1] in changed:
            assert_same_state(model, loaded)
        assert all(
            torch.equal(model.state_dict()[f"{n}.linear.weight"], before[f"{n}.weight"])
            for n in names
        )
        assert all(
            torch.isfinite(tensor).all() for tensor in model.state_dict().values()
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert {path.name for path in folder.iterdir()} == set(FILES)


@FUZZ
@given(st.lists(changes(), min_size=1, max_size=4), st.sampled_from(FILES))
def test_an_adapter_with_changed_bytes_is_as_saved_or_refused(adapter, several, name):
    content = adapter[1][name]
    for change in several:
        content = change(content)
    check_adapter(adapter, {name: content})


@FUZZ
@given(st.binary(max_size=300), st.sampled_from(FILES))
def test_an_adapter_of_any_bytes_is_refused(adapter, content, name):
    check_adapter(adapter, {name: content})


@FUZZ
@given(invented_safetensors())
def test_an_adapter_with_any_header_is_refused(adapter, content):
    check_adapter(adapter, {"adapter_model.safetensors": content})


# --- IDX --------------------------------------------------------------------------------------------------


@st.composite
def idx_files(draw):
    """Return a name of a file and bytes for it: changed ones, any, or with a header
    that lies."""
    name = draw(st.sampled_from(sorted(TINY)))
    kind = draw(st.sampled_from(["changed", "any bytes", "any header"]))
    content = TINY[name]
    if kind == "changed":
        for change in draw(st.lists(changes(), min_size=1, max_size=3)):
            content = change(content)
    elif kind == "any bytes":
        content = draw(st.binary(max_size=200))
    else:
        numbers = draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
        content = (
            struct.pack(f">{len(numbers)}I", *numbers) + content[4 * len(numbers) :]
        )
    return name, content


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder for the four files, which ``LOWRANK_DATA_DIR`` leads to and for which
    they are the published ones."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        publish(patch)
        patch.setenv("LOWRANK_DATA_DIR", str(folder))
        yield folder / "MNIST" / "raw"


@FUZZ
@given(idx_files())
def test_mnist_files_of_any_bytes_are_the_published_ones_or_refused(raw, spoilt):
    name, content = spoilt
    for file, published in TINY.items():
        (raw / file).write_bytes(content if file == name else published)
    if content == TINY[name]:
        assert_tiny(load_tiny())
        return
    with pytest.raises(DataError) as caught:
        load_tiny()
    assert str(caught.value).startswith(
        f"{raw / name} is not the published file ({len(content):,} bytes, "
    )
    assert (raw / name).read_bytes() == content
    assert len(list(raw.iterdir())) == 4
