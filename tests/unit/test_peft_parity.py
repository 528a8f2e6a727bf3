"""The same numbers as PEFT: outputs and gradients with copied weights, and files in
both directions."""

import copy
import json
import warnings

import pytest
import torch
from support import (
    ALL,
    assert_close,
    assert_equal_but_for_rounding,
    linear_layer,
    move_all,
    normal,
)
from torch import nn

from lowrank_utils.adapt import (
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank, load_adapter, save_adapter
from lowrank_utils.adapters.config import AdapterFileError
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA

pytestmark = pytest.mark.slow

peft = pytest.importorskip(
    "peft", reason='needs the extra peft: pip install -e ".[peft]"'
)

KINDS = pytest.mark.parametrize("kind", ALL)
TWO_KINDS = pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
TARGETS = ["0", "2", "4"]
X = normal(6, 40)


def base(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    # Scaled as layers are at the start of training, so that the bounds below which
    # nothing has changed mean something.
    first, second = nn.Linear(40, 24, bias=bias), nn.Linear(24, 33, bias=bias)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(33, 10))
    return model.to(dtype).requires_grad_(False)


def adapted(kind, rank=3, scaling=1.7, dtype=torch.float64, bias=True):
    model = base(dtype, bias)
    replace_linear_layers(model, kind, rank, scaling, TARGETS)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith((".A", ".B")):
                parameter.copy_(0.2 * normal(*parameter.shape, seed=index))
            elif name.endswith(".m"):
                parameter.mul_(1 + 0.5 * normal(*parameter.shape, seed=index).to(dtype))
    freeze_linear_layers(model)
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def wrapped(plain, kind, rank=3, scaling=1.7, **settings):
    """Return PEFT's model around a plain one."""
    settings = {"lora_alpha": scaling * rank, "target_modules": TARGETS} | settings
    dora = issubclass(kind, LinearWithDoRAMerged)
    config = peft.LoraConfig(r=rank, use_dora=dora, **settings)
    return peft.get_peft_model(plain, config, autocast_adapter_dtype=False)


def moved(theirs):
    with torch.no_grad():
        for index, parameter in enumerate(trainable(theirs)):
            change = 0.2 * normal(*parameter.shape, seed=index)
            parameter.add_(change.to(parameter.dtype))
    return theirs


def pairs(ours, theirs, names):
    """Return the parameters of our layers, in PEFT's orientation, beside PEFT's."""
    found = []
    for name in names:
        mine = ours.get_submodule(name)
        its = theirs.base_model.model.get_submodule(name)
        found += [(mine.lora.A, its.lora_A), (mine.lora.B, its.lora_B)]
        found += [(mine.m, its.lora_magnitude_vector)] if hasattr(mine, "m") else []
    return [(mine, its["default"].weight) for mine, its in found]


def copied(ours, plain, *arguments, names=TARGETS):
    """Return PEFT's model with the weights of ours copied in, tensor by tensor."""
    theirs = wrapped(plain, *arguments, target_modules=names)
    with torch.no_grad():
        for mine, its in pairs(ours, theirs, names):
            its.copy_(mine.T if mine.ndim == 2 else mine)
    return theirs


def run(model, x, G):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * G).sum().backward()
    return y, x.grad


@KINDS
@DTYPES
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(kind, dtype, rank, bias):
    ours = adapted(kind, rank, 1.7, dtype, bias)
    theirs = copied(ours, base(dtype, bias), kind, rank, 1.7)
    # The gradient of a mean, as a loss is one.
    G, x = normal(6, 10, seed=21).to(dtype) / 60, normal(6, 40, seed=20).to(dtype)
    for mine, its in zip(run(ours, x, G), run(theirs, x, G), strict=True):
        assert_equal_but_for_rounding(mine, its)
    for mine, its in pairs(ours, theirs, TARGETS):
        gradient = mine.grad.T if mine.ndim == 2 else mine.grad
        assert gradient.abs().max() > 0.001
        assert_equal_but_for_rounding(gradient, its.grad)
    assert (ours(x) - base(dtype, bias)(x)).abs().max() > 0.1


def test_a_kept_norm_gives_other_gradients_than_peft():
    # Which shows that the test above would notice.
    ours = adapted(LinearWithDoRA)
    theirs = copied(ours, base(), LinearWithDoRA)
    for name in TARGETS:
        ours.get_submodule(name).detach_norm = False
    for model in (ours, theirs):
        model(X).pow(2).sum().backward()
    its = theirs.base_model.model[0].lora_B["default"].weight.grad
    assert (ours[0].lora.B.grad.T - its).abs().max() > 0.01 * its.abs().max()


@TWO_KINDS
@DTYPES
def test_a_large_layer_with_the_factored_norm_is_pefts_too(kind, dtype):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(600, 512)).to(dtype).requires_grad_(False)
    ours = copy.deepcopy(plain)
    replace_linear_layers(ours, kind, 8, 2.0)
    move_all(ours)
    with torch.no_grad():
        ours[0].lora.A.mul_(0.02)
        ours[0].lora.B.mul_(0.2)
    theirs = copied(ours, plain, kind, 8, 2.0, names=["0"])
    x, G = normal(6, 600, seed=20).to(dtype), normal(6, 512, seed=21).to(dtype)
    # 600 terms are summed up, in another order each: some rounding errors of the
    # largest output.
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(run(ours, x, G)[0], run(theirs, x, G)[0], rtol)
    for mine, its in pairs(ours, theirs, ["0"])[:2]:
        assert_close(mine.grad.T, its.grad, rtol)


# --- Files in both directions ---------------------------------------------------------------


def loaded_by_peft(plain, folder, **options):
    with warnings.catch_warnings():
        # PEFT only warns of a tensor that it didn't find, and computes something else.
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(
            plain, folder, autocast_adapter_dtype=False, **options
        )


@KINDS
@DTYPES
@pytest.mark.parametrize(("rank", "scaling"), [(1, 2.0), (3, 1.7), (8, 0.3)])
def test_peft_loads_what_we_save(kind, dtype, rank, scaling, tmp_path):
    ours = adapted(kind, rank, scaling, dtype)
    save_adapter(ours, tmp_path)
    theirs = loaded_by_peft(base(dtype), tmp_path)
    assert_equal_but_for_rounding(theirs(X.to(dtype)), ours(X.to(dtype)))


@TWO_KINDS
@DTYPES
@pytest.mark.parametrize("rslora", [True, False])
def test_we_load_what_peft_saves(kind, dtype, rslora, tmp_path):
    theirs = moved(wrapped(base(dtype), kind, 4, 1.5, use_rslora=rslora))
    theirs.save_pretrained(tmp_path)
    ours, x = base(dtype), X.to(dtype)
    assert load_adapter(ours, tmp_path) == TARGETS
    assert ours[0].lora.alpha == (3.0 if rslora else 1.5)
    assert_equal_but_for_rounding(ours(x), theirs(x))
    assert (ours(x) - base(dtype)(x)).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"2": 5}, "alpha_pattern": {"4": 9}},
        {"rank_pattern": {"^0": 1, "[24]": 2}},
        {"target_modules": "[024]"},
        {"target_modules": ["0", "2", "4"], "exclude_modules": ["2"]},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"2": 5}, "use_rslora": True},
    ],
)
@TWO_KINDS
@pytest.mark.filterwarnings("ignore:.*rslora")
@pytest.mark.filterwarnings("ignore:.*rank_pattern")
def test_pefts_patterns_mean_the_same_here(kind, settings, tmp_path):
    theirs, ours = moved(wrapped(base(), kind, 4, **settings)), base()
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_equal_but_for_rounding(ours(X), theirs(X))


class Names(nn.Module):
    """Names that are easily taken for others: by their ends, by a pattern's dot, or for
    parts of a file's keys."""

    def __init__(self):
        super().__init__()
        layers = (linear_layer(5, 5, seed=seed) for seed in range(6))
        self.dense = next(layers)
        self.block = nn.ModuleDict({"dense": next(layers), "xdense": next(layers)})
        self.blockxdense, self.weight_proj, self.lora_head = layers
        self.requires_grad_(False)

    def forward(self, x):
        for layer in [self.dense, *self.block.values(), self.blockxdense]:
            x = torch.tanh(layer(x))
        return torch.tanh(self.lora_head(torch.tanh(self.weight_proj(x))))


@pytest.mark.parametrize(
    "names",
    [
        ["dense"],
        ["block.dense"],
        ["dense", "weight_proj"],
        ["block.xdense", "lora_head"],
        ["block.dense", "blockxdense"],
    ],
)
@TWO_KINDS
def test_names_that_are_easily_taken_for_others(kind, names, tmp_path):
    ours, again, x = Names(), Names(), normal(3, 5)
    for rank, name in enumerate(names, start=1):
        replace_linear_layers(ours, kind, rank, 0.5 + rank, name)
    freeze_linear_layers(move_all(ours))
    save_adapter(ours, tmp_path)
    assert_close(loaded_by_peft(Names(), tmp_path)(x), ours(x))
    assert sorted(load_adapter(again, tmp_path)) == sorted(names)
    assert torch.equal(again(x), ours(x))


def test_an_adapter_goes_to_peft_is_trained_there_and_comes_back(tmp_path):
    ours, back = adapted(LinearWithDoRA), base()
    save_adapter(ours, tmp_path / "there")
    theirs = loaded_by_peft(base(), tmp_path / "there", is_trainable=True)
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(trainable(model), lr=0.01)
        for step in range(5):
            optimizer.zero_grad()
            model(normal(6, 40, seed=step)).pow(2).mean().backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "back")
    load_adapter(back, tmp_path / "back")
    assert_close(back(X), theirs(X))
    assert_close(back(X), ours(X), rtol=1e-9)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 2)


def lora(targets=TARGETS, **settings):
    return peft.LoraConfig(r=2, target_modules=targets, **settings)


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (lambda: lora(lora_bias=True), r"adapter_config\.json: lora_bias="),
        (lambda: lora(init_lora_weights="pissa"), r"_config\.json: init_lora_weights="),
        (lambda: lora(init_lora_weights="olora"), r"_config\.json: init_lora_weights="),
        (
            lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
            "'IA3', another tuner",
        ),
        (lambda: lora(["conv"]), "Conv1d"),
        (lambda: lora(["words"]), "words is an Embedding; only nn.Linear"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_what_peft_saves_and_cannot_be_carried_over_is_refused_by_name(
    config, pattern, tmp_path
):
    mixed = {*config().target_modules} <= {"conv", "words"}
    theirs, ours = (Mixed() if mixed else base(torch.float32) for _ in range(2))
    peft.get_peft_model(theirs, config()).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=pattern):
        load_adapter(ours, tmp_path)


# --- A bank, beside PEFT's several adapters ----------------------------------------------------


def test_peft_refuses_dora_per_row_and_the_bank_gives_pefts_numbers_row_by_row(
    tmp_path,
):
    bank, rows, names = AdapterBank(base()), normal(3, 40), ["anna", None, "ben"]
    for name, rank in {"anna": 2, "ben": 4}.items():
        save_adapter(adapted(LinearWithDoRA, rank, 0.5 * rank), tmp_path / name)
        bank.add(name, tmp_path / name)
    theirs = loaded_by_peft(base(), tmp_path / "anna", adapter_name="anna")
    theirs.load_adapter(tmp_path / "ben", "ben", autocast_adapter_dtype=False)
    theirs.eval()
    # On a copy, because after the error PEFT's hooks stay in.
    with pytest.raises(ValueError, match="DoRA"):
        copy.deepcopy(theirs)(rows, adapter_names=["anna", "__base__", "ben"])
    with bank.rows(names):
        y = bank.model(rows)
    for row, name in enumerate(names):
        if name is None:
            with theirs.disable_adapter():
                expected = theirs(rows[row : row + 1])
        else:
            theirs.set_adapter(name)
            expected = theirs(rows[row : row + 1])
        assert_close(y[row : row + 1], expected)


def test_the_merged_model_is_pefts_merged_model(tmp_path):
    ours = adapted(LinearWithDoRA)
    save_adapter(ours, tmp_path)
    theirs = loaded_by_peft(base(), tmp_path).merge_and_unload()
    mine = merge_adapters(ours)
    for name in TARGETS:
        assert_close(mine.get_submodule(name).weight, theirs.get_submodule(name).weight)


def test_the_config_says_what_pefts_own_says(tmp_path):
    save_adapter(adapted(LinearWithDoRA, 4, 2.0), tmp_path / "ours")
    wrapped(base(), LinearWithDoRA, 4, 2.0).save_pretrained(tmp_path / "theirs")
    mine, its = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    for config in (mine, its):
        config["target_modules"].sort()
    assert its | mine == its
