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
from lowrank_utils.adapters import AdapterBank, files as adapter_files
from lowrank_utils.adapters.config import CONFIG, AdapterFileError, read_config
from lowrank_utils.adapters.files import TENSORS, load_adapter, save_adapter
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import AdaptedLinear, LinearWithLoRA, LoRALayer

NAMES = ["inner.first", "inner.second", "head"]
X = normal(4, 7, seed=50)


class Base(nn.Module):
    """Three layers, no two of the same shape, one without a bias, and one that stays
    plain. ``others`` are put in besides, or in their places."""

    def __init__(self, dtype=torch.float64, **others):
        super().__init__()
        first = linear_layer(7, 5, dtype=dtype)
        second = linear_layer(5, 6, bias=False, dtype=dtype, seed=3)
        self.inner = nn.ModuleDict({"first": first, "second": second})
        self.head = linear_layer(6, 3, dtype=dtype, seed=6)
        self.plain = linear_layer(3, 3, dtype=dtype, seed=9)
        for name, module in others.items():
            setattr(self, name, module)
        self.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.inner["second"](torch.tanh(self.inner["first"](x))))
        return self.plain(self.head(x))


def trained(model, wrapper=LinearWithDoRA, rank=2, alpha=1.7, targets=NAMES):
    """Put adapters in where training could have left them, with all else frozen."""
    replace_linear_layers(model, wrapper, rank, alpha, targets)
    freeze_linear_layers(move_all(model))
    return model


def adapted(wrapper=LinearWithDoRA, dtype=torch.float64):
    return trained(Base(dtype), wrapper)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


@pytest.fixture
def saved(folder):
    save_adapter(adapted(), folder)
    return folder


def config_of(folder):
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def tensors_of(folder):
    with safe_open(folder / TENSORS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def change_config(folder, **settings):
    text = json.dumps(config_of(folder) | settings)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def write_tensors(folder, tensors):
    """Write tensors as PEFT does, without a digest."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / TENSORS, {"format": "pt"})


def refused(folder, pattern, error=AdapterFileError, model=None):
    """Expect an error, and a model that is as before."""
    model = model or Base()
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
    model, fresh = adapted(wrapper, dtype), Base(dtype).eval()
    before, state = snapshot(model), torch.get_rng_state()
    save_adapter(model, folder)
    assert load_adapter(fresh, folder) == NAMES
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(model, before)
    assert_same_state(fresh, before)
    layers = [fresh.get_submodule(name) for name in NAMES]
    kind = LinearWithLoRA if wrapper in LORA else LinearWithDoRA
    assert [(type(layer), layer.lora.alpha) for layer in layers] == [(kind, 1.7)] * 3
    assert type(fresh.plain) is nn.Linear
    assert not any(module.training for module in fresh.modules())
    rtol = 0.05 if dtype.itemsize == 2 else 1e-5
    assert_close(fresh(X.to(dtype)), model(X.to(dtype)), rtol)


@settings(max_examples=30)
@given(st.floats(-1e6, 1e6).filter(lambda s: abs(s) > 1e-6), st.integers(1, 70))
def test_the_scaling_comes_back(tmp_path_factory, alpha, rank):
    folder = tmp_path_factory.mktemp("adapter")
    model, fresh = (nn.Sequential(linear_layer(80, 75)) for _ in range(2))
    save_adapter(trained(model, LinearWithLoRA, rank, alpha, None), folder)
    load_adapter(fresh, folder)
    assert fresh[0].lora.alpha == pytest.approx(alpha, rel=1e-15)
    if rank & (rank - 1) == 0:
        assert fresh[0].lora.alpha == alpha


def test_ranks_and_scalings_may_differ_between_layers(folder):
    model, fresh = Base(), Base()
    for name, rank, alpha in zip(NAMES, [2, 3, 2], [0.5, 0.5, 4.0], strict=True):
        trained(model, LinearWithDoRA, rank, alpha, name)
    save_adapter(model, folder)
    expected = {
        "r": 2,
        "lora_alpha": 1,
        "rank_pattern": {r"^inner\.second": 3},
        "alpha_pattern": {r"^inner\.second": 1.5, "^head": 8},
    }
    assert config_of(folder) | expected == config_of(folder)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(X), model(X))


def test_the_files_hold_the_adapter_and_nothing_else(saved):
    layer, tensors = adapted().inner["first"], tensors_of(saved)
    assert len(tensors) == 9
    prefix = "base_model.model.inner.first"
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], layer.lora.A.T)
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], layer.lora.B.T)
    assert torch.equal(tensors[f"{prefix}.lora_magnitude_vector"], layer.m)
    size = 8 * sum(t.numel() for t in tensors.values())
    assert size < (saved / TENSORS).stat().st_size < size + 2000
    config = (saved / CONFIG).read_bytes()
    save_adapter(adapted(), saved)
    assert {path.name for path in saved.iterdir()} == {CONFIG, TENSORS}
    assert (saved / CONFIG).read_bytes() == config
    again = tensors_of(saved)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_loaded_adapter_can_be_trained_and_saved_again(saved):
    model, fresh = Base(), Base()
    load_adapter(model, saved)
    freeze_linear_layers(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    model(X).pow(2).mean().backward()
    torch.optim.SGD(trainable, lr=0.01).step()
    assert not torch.equal(model(X), adapted()(X))
    save_adapter(model, saved)
    load_adapter(fresh, saved)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_numbers_are_rounded_only_if_asked_for(narrow, folder):
    A = adapted(dtype=torch.float64).head.lora.A
    save_adapter(adapted(dtype=torch.float64), folder)
    model, wider = Base(narrow), Base()
    # Beside half precision an adapter is float32.
    refused(folder, r"be rounded to torch.float32; .*may_round=True", model=model)
    load_adapter(model, folder, may_round=True)
    assert torch.equal(model.head.lora.A, A.to(torch.float32))
    # A wider model takes narrow numbers as they are.
    load_adapter(wider, folder)
    assert torch.equal(wider.head.lora.A, A.double())


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
        sizes = linear.in_features, linear.out_features
        self.lora = LoRALayer(*sizes, rank, alpha, dtype=linear.weight.dtype)

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def test_a_notebooks_own_class_is_saved_if_it_computes_the_same(folder):
    model, fresh = adapted(NotebookLoRA), Base()
    save_adapter(model, folder)
    load_adapter(fresh, folder)
    assert_close(fresh(X), model(X))


def share(model):
    model.inner["third"] = model.head


def mix(model):
    model.head = moved(LinearWithLoRA, model.head.linear)
    freeze_linear_layers(model)


@pytest.mark.parametrize(
    ("make", "spoil", "pattern"),
    [
        (adapted, mix, "LoRA and DoRA adapters; PEFT's config names one kind"),
        (adapted, share, "one layer under several names: inner.third .*head"),
        (
            adapted,
            lambda m: m.head.linear.requires_grad_(),
            "files: head.linear.weight",
        ),
        (adapted, lambda m: m.head.m.data.fill_(float("nan")), "m of head holds NaN"),
        (adapted, lambda m: m.head.lora.A.data.fill_(float("inf")), "or infinite"),
        (adapted, lambda m: m.to("meta"), "inner.first is on the meta device"),
        (Base, None, "Base has no adapters inside; .* replace_linear_layers"),
        (lambda: moved(LinearWithLoRA), None, "LinearWithLoRA has no adapters inside"),
        (lambda: adapted(PerInput), None, r"inner.first .*m of shape \(7,\).* \(5,\)"),
        (lambda: adapted(ScalesBias), None, r"ScalesBias\) doesn't compute DoRA's"),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_nothing_is_written(
    make, spoil, pattern, folder
):
    model = make()
    if spoil:
        spoil(model)
    with pytest.raises(ValueError, match=pattern):
        save_adapter(model, folder)
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


@pytest.mark.slow
def test_every_flipped_bit_of_the_header_is_refused(folder):
    # One layer: its header is short enough to try every bit.
    plain = nn.Sequential(linear_layer(7, 5))
    save_adapter(trained(copy.deepcopy(plain), targets=None), folder)
    path = folder / TENSORS
    whole = path.read_bytes()
    for place in range(8 + struct.unpack("<Q", whole[:8])[0]):
        for bit in range(8):
            flipped = bytes([whole[place] ^ (1 << bit)])
            path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors"):
                load_adapter(plain, folder)
    assert type(plain[0]) is nn.Linear
    path.write_bytes(whole)
    load_adapter(plain, folder)


@given(st.data())
def test_a_flipped_bit_of_the_numbers_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(), folder)
    whole = bytearray((folder / TENSORS).read_bytes())
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[data.draw(st.integers(start, len(whole) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    (folder / TENSORS).write_bytes(whole)
    refused(folder, "was altered after it was saved")


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, -1, -8, -400, None])
def test_a_file_that_is_cut_off_or_too_long_is_refused(saved, left):
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole + b"\0" if left is None else whole[:left])
    refused(saved, r"adapter_model\.safetensors: is damaged or cut off")


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
    (saved / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, rf"adapter_config\.json: .*{pattern}")


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / CONFIG
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        read_config(path)


JSON = st.recursive(
    st.one_of(
        *[st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)],
        st.text(max_size=5),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NUMBERS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern"]


@given(st.sampled_from([*NUMBERS, "target_modules", "use_dora", "bias"]), JSON)
def test_no_value_of_a_setting_makes_anything_but_a_config_or_a_clear_error(
    tmp_path_factory, key, value
):
    path = tmp_path_factory.mktemp("config") / CONFIG
    config = {"peft_type": "LORA", "target_modules": ["head"], key: value}
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        rank = read_config(path).rank
    except AdapterFileError as error:
        words = (key, "Infinity isn't a number of JSON")
        assert any(word in str(error) for word in words)  # noqa: PT017 (both outcomes are right)
    else:
        assert rank >= 1


# --- Settings that aren't supported, or wrong ------------------------------------------------

UNSUPPORTED = {
    "fan_in_fan_out": True,
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [3],
    "target_parameters": ["w"],
    "use_qalora": True,
    "a_setting_of_the_future": 2,
}


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        *[(*row, "={} isn't supported") for row in UNSUPPORTED.items()],
        ("peft_type", "IA3", " .*got {}, another tuner"),
        ("peft_type", "ADALORA", " .*got {}, another tuner"),
        ("init_lora_weights", "pissa", "={} changes the base weight"),
        ("init_lora_weights", "olora", "={} changes the base weight"),
        ("r", 0, " must be a whole number, 1 or more; got {}"),
        ("r", 2.5, " must be a whole number, 1 or more; got {}"),
        ("r", "2", " must be a whole number"),
        ("lora_alpha", "2", " must be a finite number"),
        ("lora_alpha", None, " must be a finite number"),
        ("use_dora", 1, " must be true or false; got {}"),
        ("rank_pattern", {"head": -1}, r"\['head'\] must be a whole number"),
        ("alpha_pattern", {"head": "x"}, r"\['head'\] must be a finite number"),
        ("rank_pattern", {"(": 2}, r": '\(' isn't a pattern"),
        ("target_modules", "(", ": {} isn't a pattern"),
        ("target_modules", [3], " must be a list of names or one pattern; got {}"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(saved, key, value, pattern):
    change_config(saved, **{key: value})
    words = pattern.format(re.escape(repr(value)))
    refused(saved, rf"adapter_config\.json: {key}{words}")


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0, "modules_to_save": None, "loftq_config": {}},
        {"layers_to_transform": None, "init_lora_weights": "gaussian"},
        {"task_type": "CAUSAL_LM", "peft_version": "9", "base_model_name_or_path": "x"},
        {"a_setting_of_the_future": None, "another": False, "a_third": []},
    ],
)
def test_settings_that_are_off_or_only_tell_something_are_fine(saved, settings):
    change_config(saved, **settings)
    assert load_adapter(Base(), saved) == NAMES


# --- Tensors that don't fit ------------------------------------------------------------------

KEY = "base_model.model.head."
A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
ones = torch.ones


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        (KEY + A, ones(2, 7), r"head.{} has the shape \(2, 7\); rank 2 .*\(2, 6\)"),
        (KEY + A, ones(6, 2), r"head.{} has the shape \(6, 2\).*need \(2, 6\)"),
        (KEY + B, ones(3, 3), r"head.{} has the shape \(3, 3\); rank 2"),
        (KEY + B, ones(3, 2, 1), r"shape \(3, 2, 1\)"),
        (KEY + M, ones(6), r"head.{} has the shape \(6,\).*\(3,\)"),
        (KEY + A, ones(2, 6).long(), "dtype torch.int64; allowed are float16"),
        (KEY + A, ones(2, 6).bool(), "dtype torch.bool"),
        (KEY + A, ones(2, 6) * float("nan"), "head.{} holds NaN or infinite"),
        (KEY + A, None, "head.{} is missing"),
        (KEY + B, None, "head.{} is missing"),
        (KEY + M, None, "head.{} is missing"),
        (
            "base_model.model.tail." + A,
            ones(2, 6),
            "has no layer 'tail'; is it the base",
        ),
        ("head." + A, ones(2, 6), "tensor '{}'; allowed are base_model.model.<l"),
        (
            KEY + "lora_A.bias",
            ones(2),
            "unknown tensor 'base_model.model.head.lora_A.b",
        ),
        (KEY + "weight", ones(3, 6), "unknown tensor 'base_model.model.head.weight'"),
        (KEY + "lora_embedding_A", ones(2, 6), "unknown tensor .*no embeddings"),
        ("../../etc." + A, ones(2, 6), "unknown tensor '../../etc"),
        ("", None, "no tensors for inner.first, inner.second, head, which target_mod"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, key, value, pattern):
    tensors = {k: v for k, v in tensors_of(saved).items() if key and k != key}
    write_tensors(saved, tensors | ({} if value is None else {key: value}))
    refused(
        saved, rf"adapter_model\.safetensors: .*{pattern}".format(key.removeprefix(KEY))
    )


def test_layers_beside_the_targets_are_refused_in_both_directions(saved):
    for targets, excluded, pattern in (
        (
            ["head", "inner.first"],
            None,
            "tensors for inner.second, which target_modules d",
        ),
        ([*NAMES, "plain"], None, "no tensors for plain, which target_modules names"),
        ([*NAMES, "inner"], None, "inner is a ModuleDict; only nn.Linear is supported"),
        (NAMES, ["head"], "tensors for head, which target_modules doesn't name"),
        (
            None,
            None,
            "for head, inner.first, inner.second, which target_modules doesn't",
        ),
    ):
        change_config(saved, target_modules=targets, exclude_modules=excluded)
        refused(saved, pattern)
    write_tensors(saved, {})
    refused(saved, r"target_modules=\[\] names no layer of this model")


def test_a_magnitude_without_use_dora_and_use_dora_without_a_magnitude(saved, folder):
    change_config(saved, use_dora=False)
    refused(saved, "lora_magnitude_vector is a magnitude, but use_dora is false")
    save_adapter(adapted(LinearWithLoRA), folder)
    change_config(saved, use_dora=True)
    refused(saved, "lora_magnitude_vector is missing")


def test_a_rank_that_is_not_the_configs_is_refused(saved):
    change_config(saved, r=4)
    refused(saved, r"inner.first.lora_A.weight has the shape \(2, 7\); rank 4")
    change_config(saved, r=2, rank_pattern={"head": 1})
    refused(saved, r"head.lora_[AB].weight has the shape .*; rank 1")


HEAD = linear_layer(6, 3)


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (Base(head=nn.Conv1d(6, 3, 1)), "head is a Conv1d; only nn.Linear"),
        (Base(head=nn.Embedding(3, 6)), "head is an Embedding; only nn.Linear"),
        (Base(head=nn.Bilinear(2, 3, 3)), "head is a Bilinear; only nn.Linear"),
        (Base(head=nn.Identity()), "head is an Identity; only nn.Linear"),
        (Base(head=HEAD, again=HEAD), "head is used in several places"),
        (adapted(), "already adapted: load into the plain model"),
    ],
)
def test_a_model_that_the_adapter_does_not_belong_to_is_refused(saved, model, pattern):
    refused(saved, pattern, model=model)


# --- Paths ----------------------------------------------------------------------------------


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    missing = "nowhere isn't a folder; an adapter is a folder with"
    refused(tmp_path / "nowhere", missing, FileNotFoundError)
    (saved / TENSORS).unlink()
    refused(saved, r"has no adapter_model\.safetensors$", FileNotFoundError)
    (saved / "adapter_model.bin").write_bytes(b"")
    pickle = r"adapter_model\.bin, a pickle, .* never read here"
    refused(saved, pickle, FileNotFoundError)
    (saved / CONFIG).unlink()
    refused(saved, r"has no adapter_config\.json$", FileNotFoundError)
    (saved / "ben").mkdir()
    (saved / "ben" / "adapter_config.json").write_text("{}")
    refused(saved, "one folder deeper: there is one in ben$", FileNotFoundError)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_path_that_leaves_the_folder_is_refused(saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    refused(saved, rf"{re.escape(name)}: leads out of .*; put the file itself into")


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
    model.inner["head"] = linear_layer(6, 3).requires_grad_(False)
    plain = copy.deepcopy(model)
    save_adapter(trained(model, LinearWithLoRA, targets="head"), folder)
    assert config_of(folder)["target_modules"] == "head"
    assert load_adapter(plain, folder) == ["head"]
    assert torch.equal(plain(X), model(X))


def test_a_bank_is_refused_and_told_what_to_do(saved, tmp_path):
    model = Base()
    AdapterBank(model).add("anna", saved)
    with pytest.raises(ValueError, match="save each adapter from a model of its own"):
        save_adapter(model, tmp_path / "other")
