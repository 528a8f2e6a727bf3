"""An adapter on disk: what is written and read back, and every way in which a file can
be wrong."""

import copy
import json
import re
import struct
import threading

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from support import (
    ALL,
    DORA,
    LORA,
    assert_close,
    assert_same_state,
    every_wrapper,
    linear_layer,
    move_all,
    moved,
    normal,
    snapshot,
)
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters import files as adapter_files
from lowrank_utils.adapters.config import AdapterFileError, read_config
from lowrank_utils.adapters.files import load_adapter, save_adapter
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import AdaptedLinear, LinearWithLoRA, LoRALayer

NAMES = ["inner.first", "inner.second", "head"]


class Base(nn.Module):
    """Three layers, no two of the same shape, one without a bias, and one that stays
    plain."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.inner = nn.ModuleDict(
            {
                "first": linear_layer(7, 5, dtype=dtype),
                "second": linear_layer(5, 6, bias=False, dtype=dtype, seed=3),
            }
        )
        self.head = linear_layer(6, 3, dtype=dtype, seed=6)
        self.plain = linear_layer(3, 3, dtype=dtype, seed=9)
        self.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.inner["second"](torch.tanh(self.inner["first"](x))))
        return self.plain(self.head(x))


def adapted(wrapper=LinearWithDoRA, rank=2, alpha=1.7, dtype=torch.float64):
    model = Base(dtype)
    replace_linear_layers(model, wrapper, rank, alpha, NAMES)
    move_all(model)
    freeze_linear_layers(model)
    return model


X = normal(4, 7, seed=50)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


@pytest.fixture
def saved(folder):
    save_adapter(adapted(), folder)
    return folder


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def change_config(folder, **settings):
    config = config_of(folder) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_tensors(folder, tensors):
    """Write tensors as PEFT does, without a digest."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", {"format": "pt"}
    )


def refused(folder, pattern, error=AdapterFileError):
    """Expect an error, and a model that is as before."""
    model = Base()
    before, modules = snapshot(model), list(model.modules())
    with pytest.raises(error, match=pattern):
        load_adapter(model, folder)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


# --- There and back -------------------------------------------------------------------------


@every_wrapper
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_what_is_saved_is_loaded_to_the_last_bit(wrapper, dtype, folder):
    model, fresh = adapted(wrapper, dtype=dtype), Base(dtype)
    save_adapter(model, folder)
    assert load_adapter(fresh, folder) == NAMES
    assert_same_state(fresh, snapshot(model))
    assert [fresh.get_submodule(n).lora.alpha for n in NAMES] == [1.7] * 3
    kind = LinearWithLoRA if wrapper in LORA else LinearWithDoRA
    assert [type(fresh.get_submodule(n)) for n in NAMES] == [kind] * 3
    assert type(fresh.plain) is nn.Linear
    assert_close(
        fresh(X.to(dtype)),
        model(X.to(dtype)),
        rtol=0.05 if dtype.itemsize == 2 else 1e-5,
    )


@settings(max_examples=30)
@given(st.floats(-1e6, 1e6).filter(lambda s: abs(s) > 1e-6), st.integers(1, 70))
def test_the_scaling_comes_back(tmp_path_factory, alpha, rank):
    folder = tmp_path_factory.mktemp("adapter")
    model, fresh = (
        nn.Sequential(LinearWithLoRA(linear_layer(80, 75), rank, alpha)),
        nn.Sequential(linear_layer(80, 75)),
    )
    freeze_linear_layers(model)
    save_adapter(model, folder)
    load_adapter(fresh, folder)
    assert fresh[0].lora.alpha == pytest.approx(alpha, rel=1e-15)
    if rank & (rank - 1) == 0:
        assert fresh[0].lora.alpha == alpha


def test_ranks_and_scalings_may_differ_between_layers(folder):
    model = Base()
    for name, rank, alpha in zip(NAMES, [2, 3, 2], [0.5, 0.5, 4.0], strict=True):
        replace_linear_layers(model, LinearWithDoRA, rank, alpha, name)
    move_all(model)
    freeze_linear_layers(model)
    save_adapter(model, folder)
    config = config_of(folder)
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    assert config["rank_pattern"] == {r"^inner\.second": 3}
    assert config["alpha_pattern"] == {r"^inner\.second": 1.5, "^head": 8}
    fresh = Base()
    load_adapter(fresh, folder)
    assert torch.equal(fresh(X), model(X))


def test_saving_again_writes_the_same(folder):
    model = adapted()
    save_adapter(model, folder)
    config, tensors = (folder / "adapter_config.json").read_bytes(), tensors_of(folder)
    save_adapter(model, folder)
    assert (folder / "adapter_config.json").read_bytes() == config
    again = tensors_of(folder)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_files_hold_the_adapter_and_nothing_else(saved):
    layer = adapted().inner["first"]
    tensors = tensors_of(saved)
    assert len(tensors) == 9
    prefix = "base_model.model.inner.first"
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], layer.lora.A.T)
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], layer.lora.B.T)
    assert torch.equal(tensors[f"{prefix}.lora_magnitude_vector"], layer.m)
    numbers = sum(t.numel() for t in tensors.values())
    assert (
        8 * numbers
        < (saved / "adapter_model.safetensors").stat().st_size
        < 8 * numbers + 2000
    )


def test_the_model_is_not_changed_by_saving(folder):
    model = adapted()
    before, state = snapshot(model), torch.get_rng_state()
    save_adapter(model, folder)
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_draws_no_random_numbers_and_keeps_the_mode(saved):
    model = Base().eval()
    state = torch.get_rng_state()
    load_adapter(model, saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_a_loaded_adapter_can_be_trained_and_saved_again(saved, tmp_path):
    model = Base()
    load_adapter(model, saved)
    freeze_linear_layers(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01
    )
    model(X).pow(2).mean().backward()
    optimizer.step()
    save_adapter(model, tmp_path / "next")
    fresh = Base()
    load_adapter(fresh, tmp_path / "next")
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
def test_numbers_are_rounded_only_if_asked_for(wide, folder):
    save_adapter(adapted(dtype=wide), folder)
    model = Base(torch.bfloat16)
    with pytest.raises(
        AdapterFileError, match=r"would be rounded to torch.bfloat16; .*may_round=True"
    ):
        load_adapter(model, folder)
    load_adapter(model, folder, may_round=True)
    assert model.head.lora.A.dtype == torch.bfloat16
    assert torch.equal(
        model.head.lora.A, adapted(dtype=wide).head.lora.A.to(torch.bfloat16)
    )


def test_a_wider_model_takes_narrow_numbers_as_they_are(folder):
    save_adapter(adapted(dtype=torch.float32), folder)
    model = Base()
    load_adapter(model, folder)
    assert torch.equal(
        model.head.lora.A, adapted(dtype=torch.float32).head.lora.A.double()
    )


# --- What can't be saved --------------------------------------------------------------------


class PerInput(AdaptedLinear):
    """A norm along the other axis."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(linear.weight.detach().norm(dim=0))


class ScalesBias(LinearWithDoRA):
    """A bias inside the scaling, which other libraries have."""

    def forward(self, x):
        return super().forward(x) * 1.01


class NotebookLoRA(nn.Module):
    """A class as a notebook writes it."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            dtype=linear.weight.dtype,
        )

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def test_a_notebooks_own_class_is_saved_if_it_computes_the_same(folder):
    model = adapted(NotebookLoRA)
    save_adapter(model, folder)
    fresh = Base()
    load_adapter(fresh, folder)
    assert_close(fresh(X), model(X))


def spoilt(change):
    model = adapted()
    change(model)
    return model


def share(model):
    model.inner["third"] = model.head


def mix(model):
    model.head = moved(LinearWithLoRA, model.head.linear)
    freeze_linear_layers(model)


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (
            lambda: Base(),
            "Base has no adapters inside; put them in with replace_linear_layers",
        ),
        (lambda: moved(LinearWithLoRA), "LinearWithLoRA has no adapters inside"),
        (
            lambda: adapted(PerInput),
            r"inner.first \(PerInput\) has m of shape \(7,\); .* one number per output, \(5,\)",
        ),
        (
            lambda: adapted(ScalesBias),
            r"ScalesBias\) doesn't compute DoRA's .* can't be saved",
        ),
        (lambda: spoilt(mix), "LoRA and DoRA adapters; PEFT's config names one kind"),
        (lambda: spoilt(share), r"one layer under several names: inner.third .*head"),
        (
            lambda: spoilt(lambda m: m.head.linear.requires_grad_(True)),
            r"trainable, .* files: head.linear.weight\. Freeze what wasn't trained",
        ),
        (
            lambda: spoilt(lambda m: m.head.m.data.fill_(float("nan"))),
            "m of head holds NaN",
        ),
        (
            lambda: spoilt(lambda m: m.head.lora.A.data.fill_(float("inf"))),
            "A of head holds NaN or infinite",
        ),
        (lambda: adapted().to("meta"), "inner.first is on the meta device"),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_nothing_is_written(
    model, pattern, folder
):
    with pytest.raises(ValueError, match=pattern):
        save_adapter(model(), folder)
    assert not folder.exists()


def test_a_refusal_leaves_the_older_adapter(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(Base(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("call", [save_adapter, load_adapter])
def test_what_is_no_model_is_refused(call, saved):
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got str"):
        call("model", saved)


# --- Damaged files --------------------------------------------------------------------------


def test_every_flipped_bit_of_the_header_is_refused(folder):
    # One layer: its header is short enough to try every bit.
    model = nn.Sequential(moved(LinearWithDoRA, linear_layer(7, 5)))
    freeze_linear_layers(model)
    save_adapter(model, folder)
    plain = nn.Sequential(linear_layer(7, 5))
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(end):
        for bit in range(8):
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
            )
            with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors"):
                load_adapter(plain, folder)
    assert type(plain[0]) is nn.Linear
    path.write_bytes(whole)
    load_adapter(plain, folder)


@given(st.data())
def test_a_flipped_bit_of_the_numbers_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(), folder)
    path = folder / "adapter_model.safetensors"
    whole = bytearray(path.read_bytes())
    place = data.draw(
        st.integers(8 + struct.unpack("<Q", whole[:8])[0], len(whole) - 1)
    )
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    refused(folder, "was altered after it was saved")


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, -1, -8, -400])
def test_a_truncated_file_is_refused(saved, left):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(saved, r"adapter_model\.safetensors: is damaged or cut off")


def test_more_bytes_than_the_header_says_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(saved, "damaged or cut off")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "isn't JSON"),
        ("{", "isn't JSON"),
        ("[]", "must hold an object with settings; got list"),
        ("{}", "peft_type must be 'LORA', .* got None, another tuner"),
        ('{"peft_type": "LORA", "r": NaN}', "isn't JSON .*NaN"),
        ("[" * 100_000, "isn't JSON"),
        ("\udcff", "isn't JSON"),
    ],
)
def test_a_config_that_is_no_json_is_refused(saved, text, pattern):
    (saved / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, rf"adapter_config\.json: .*{pattern}")


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        read_config(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "use_dora",
            "bias",
        ]
    ),
    JSON,
)
def test_no_value_of_a_setting_makes_anything_but_a_config_or_a_clear_error(
    tmp_path_factory, key, value
):
    path = tmp_path_factory.mktemp("config") / "adapter_config.json"
    path.write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["head"], key: value}),
        encoding="utf-8",
    )
    try:
        config = read_config(path)
    except AdapterFileError as error:
        words = (key, "Infinity isn't a number of JSON")
        assert any(word in str(error) for word in words)  # noqa: PT017 (both outcomes are right)
    else:
        assert config.rank >= 1


# --- Settings that aren't supported, or wrong ------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"peft_type": "IA3"}, "got 'IA3', another tuner"),
        ({"peft_type": "ADALORA"}, "got 'ADALORA', another tuner"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True isn't supported"),
        ({"lora_bias": True}, "lora_bias=True isn't supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora=True isn't supported"),
        ({"a_setting_of_the_future": 2}, "a_setting_of_the_future=2 isn't supported"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' changes the base weight",
        ),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights='olora' changes the base weight",
        ),
        ({"r": 0}, "r must be a whole number, 1 or more; got 0"),
        ({"r": 2.5}, r"r must be a whole number, 1 or more; got 2\.5"),
        ({"r": "2"}, "r must be a whole number"),
        ({"lora_alpha": "2"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number"),
        ({"use_dora": 1}, "use_dora must be true or false; got 1"),
        (
            {"rank_pattern": {"head": -1}},
            r"rank_pattern\['head'\] must be a whole number",
        ),
        (
            {"alpha_pattern": {"head": "x"}},
            r"alpha_pattern\['head'\] must be a finite number",
        ),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '\\(' isn't a pattern"),
        ({"target_modules": "("}, "target_modules: '\\(' isn't a pattern"),
        (
            {"target_modules": [3]},
            r"target_modules must be a list of names or one pattern; got \[3\]",
        ),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(saved, settings, pattern):
    change_config(saved, **settings)
    refused(
        saved, rf"adapter_config\.json: {pattern}|adapter_config\.json: .*{pattern}"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {
            "lora_dropout": 0,
            "modules_to_save": None,
            "layers_to_transform": None,
            "loftq_config": {},
        },
        {
            "init_lora_weights": "gaussian",
            "task_type": "CAUSAL_LM",
            "peft_version": "9",
            "base_model_name_or_path": "x",
        },
        {"a_setting_of_the_future": None, "another": False, "a_third": []},
    ],
)
def test_settings_that_are_off_or_only_tell_something_are_fine(saved, settings):
    change_config(saved, **settings)
    assert load_adapter(Base(), saved) == NAMES


# --- Tensors that don't fit ------------------------------------------------------------------

KEY = "base_model.model.head"


def replace(key, value):
    return lambda tensors: tensors | {key: value}


def without(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def renamed(old, new):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def ones(*shape, dtype=torch.float64):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            replace(f"{KEY}.lora_A.weight", ones(2, 7)),
            r"head.lora_A.weight has the shape \(2, 7\); rank 2 .*\(2, 6\)",
        ),
        (replace(f"{KEY}.lora_A.weight", ones(6, 2)), r"shape \(6, 2\).*need \(2, 6\)"),
        (replace(f"{KEY}.lora_A.weight", ones(3, 6)), r"shape \(3, 6\); rank 2"),
        (
            replace(f"{KEY}.lora_B.weight", ones(3, 3)),
            r"head.lora_B.weight has the shape \(3, 3\); rank 2",
        ),
        (replace(f"{KEY}.lora_B.weight", ones(3, 2, 1)), r"shape \(3, 2, 1\)"),
        (
            replace(f"{KEY}.lora_magnitude_vector", ones(6)),
            r"lora_magnitude_vector has the shape \(6,\).*\(3,\)",
        ),
        (
            replace(f"{KEY}.lora_A.weight", ones(2, 6, dtype=torch.int64)),
            r"dtype torch.int64; allowed are float16",
        ),
        (
            replace(f"{KEY}.lora_A.weight", ones(2, 6, dtype=torch.bool)),
            "dtype torch.bool",
        ),
        (
            replace(f"{KEY}.lora_A.weight", ones(2, 6) * float("nan")),
            "head.lora_A.weight holds NaN or infinite",
        ),
        (without(f"{KEY}.lora_A.weight"), "head.lora_A.weight is missing"),
        (without(f"{KEY}.lora_B.weight"), "head.lora_B.weight is missing"),
        (
            without(f"{KEY}.lora_magnitude_vector"),
            "head.lora_magnitude_vector is missing",
        ),
        (
            renamed(f"{KEY}.", "base_model.model.tail."),
            "the model has no layer 'tail'; is it the base model",
        ),
        (
            renamed(f"{KEY}.", "base_model.model.plain."),
            r"shape|doesn't name|no tensors",
        ),
        (
            renamed("base_model.model.", ""),
            r"unknown tensor 'head.lora_A.weight'; allowed are base_model.model.<layer>",
        ),
        (
            replace(f"{KEY}.lora_A.bias", ones(2)),
            "unknown tensor 'base_model.model.head.lora_A.bias'",
        ),
        (
            replace(f"{KEY}.weight", ones(3, 6)),
            "unknown tensor 'base_model.model.head.weight'",
        ),
        (
            replace("base_model.model.words.lora_embedding_A", ones(2, 6)),
            "unknown tensor .*no embeddings",
        ),
        (replace("../../etc.lora_A.weight", ones(2, 6)), "unknown tensor '../../etc"),
        (
            lambda _: {},
            "no tensors for inner.first, inner.second, head, which target_modules names",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, change, pattern):
    write_tensors(saved, change(tensors_of(saved)))
    refused(
        saved,
        rf"adapter_model\.safetensors: .*{pattern}|adapter_model\.safetensors: {pattern}",
    )


def test_layers_beside_the_targets_are_refused_in_both_directions(saved):
    change_config(saved, target_modules=["head", "inner.first"])
    refused(saved, "tensors for inner.second, which target_modules doesn't name")
    change_config(saved, target_modules=[*NAMES, "plain"])
    refused(saved, "no tensors for plain, which target_modules names")
    change_config(saved, target_modules=[*NAMES, "inner"])
    refused(saved, "inner is a ModuleDict; only nn.Linear is supported")
    change_config(saved, target_modules=NAMES, exclude_modules=["head"])
    refused(saved, "tensors for head, which target_modules doesn't name")
    change_config(saved, target_modules=None, exclude_modules=None)
    refused(
        saved,
        "tensors for head, inner.first, inner.second, which target_modules doesn't name",
    )
    write_tensors(saved, {})
    refused(saved, r"target_modules=\[\] names no layer of this model")


def test_a_magnitude_without_use_dora_and_use_dora_without_a_magnitude(saved):
    change_config(saved, use_dora=False)
    refused(saved, "lora_magnitude_vector is a magnitude, but use_dora is false")
    change_config(saved, use_dora=True)
    write_tensors(
        saved, {k: v for k, v in tensors_of(saved).items() if "magnitude" not in k}
    )
    refused(saved, "lora_magnitude_vector is missing")


def test_a_rank_that_is_not_the_configs_is_refused(saved):
    change_config(saved, r=4)
    refused(saved, r"inner.first.lora_A.weight has the shape \(2, 7\); rank 4")
    change_config(saved, r=2, rank_pattern={"head": 1})
    refused(saved, r"head.lora_[AB].weight has the shape .*; rank 1")


class Other(Base):
    """A base whose adapted names belong to other kinds of layers."""

    def __init__(self, kind):
        super().__init__()
        self.head = kind


@pytest.mark.parametrize(
    "kind",
    [nn.Conv1d(6, 3, 1), nn.Embedding(3, 6), nn.Bilinear(2, 3, 3), nn.Identity()],
)
def test_layers_of_another_kind_are_refused_by_name(saved, kind):
    model = Other(kind)
    with pytest.raises(
        AdapterFileError,
        match=f"head is an? {type(kind).__name__}; only nn.Linear is supported",
    ):
        load_adapter(model, saved)
    assert type(model.inner["first"]) is nn.Linear


def test_a_shared_layer_is_refused(saved):
    model = Base()
    model.again = model.head
    with pytest.raises(AdapterFileError, match="head is used in several places"):
        load_adapter(model, saved)


def test_an_adapted_model_is_refused(saved):
    model = adapted()
    before = snapshot(model)
    with pytest.raises(
        AdapterFileError, match=r"head is already adapted: load into the plain model"
    ):
        load_adapter(model, saved)
    assert_same_state(model, before)


# --- Paths ----------------------------------------------------------------------------------


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    refused(
        tmp_path / "nowhere",
        "nowhere isn't a folder; an adapter is a folder with",
        FileNotFoundError,
    )
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, r"has no adapter_model\.safetensors$", FileNotFoundError)
    (saved / "adapter_model.bin").write_bytes(b"")
    refused(
        saved, r"adapter_model\.bin, a pickle, .* never read here", FileNotFoundError
    )
    (saved / "adapter_config.json").unlink()
    refused(saved, r"has no adapter_config\.json", FileNotFoundError)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_path_that_leaves_the_folder_is_refused(saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    refused(
        saved,
        rf"{re.escape(name)}: leads out of .*; put the file itself into the folder",
    )


def test_a_link_to_the_folder_itself_is_fine(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    assert load_adapter(Base(), tmp_path / "link") == NAMES


def test_an_adapter_that_a_crash_left_under_its_second_name_is_found(saved):
    saved.rename(saved.with_name(f".{saved.name}.old"))
    assert load_adapter(Base(), saved) == NAMES


def test_a_folder_that_another_process_is_replacing_is_waited_for(saved):
    new = saved.with_name(f".{saved.name}.0123abcd.new")
    saved.rename(new)
    arrival = threading.Timer(0.2, new.rename, [saved])
    arrival.start()
    assert load_adapter(Base(), saved) == NAMES
    arrival.join()


def test_a_new_folder_that_a_crash_left_is_not_waited_for_without_end(
    saved, monkeypatch
):
    monkeypatch.setattr(adapter_files, "PATIENCE", 0.1)
    saved.rename(saved.with_name(f".{saved.name}.0123abcd.new"))
    refused(saved, "isn't a folder; an adapter is a folder with", FileNotFoundError)


def test_names_that_end_like_others_are_written_as_a_pattern(folder):
    # In a list, "head" would also mean "inner.head".
    model = Base()
    model.inner["head"] = linear_layer(6, 3)
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, ["head"])
    move_all(model)
    freeze_linear_layers(model)
    save_adapter(model, folder)
    assert config_of(folder)["target_modules"] == "head"
    assert load_adapter(plain, folder) == ["head"]
    assert torch.equal(plain(X), model(X))


def test_a_bank_is_refused_and_told_what_to_do(saved, tmp_path):
    from lowrank_utils.adapters import AdapterBank

    model = Base()
    AdapterBank(model).add("anna", saved)
    with pytest.raises(
        ValueError,
        match="no A and B of one adapter; save each adapter from a model of its own",
    ):
        save_adapter(model, tmp_path / "other")


def test_both_kinds_of_wrappers_are_covered():
    assert {*ALL} == {*LORA, *DORA}
