"""The same numbers as PEFT: outputs and gradients with copied weights, and files in
both directions."""

import copy
import json
import warnings

import pytest
import torch
from support import (
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
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged

peft = pytest.importorskip(
    "peft", reason='needs the extra peft: pip install -e ".[peft]"'
)

KINDS = pytest.mark.parametrize(
    "kind", [LinearWithLoRA, LinearWithLoRAMerged, LinearWithDoRA, LinearWithDoRAMerged]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
TARGETS = ["0", "2", "4"]


def base(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    # Scaled as layers are at the start of training, so that the bounds below which
    # nothing has changed mean something.
    model = nn.Sequential(
        nn.Linear(40, 24, bias=bias),
        nn.ReLU(),
        nn.Linear(24, 33, bias=bias),
        nn.ReLU(),
        nn.Linear(33, 10),
    )
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


def peft_config(kind, rank=3, scaling=1.7, **settings):
    settings = {
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": TARGETS,
        **settings,
    }
    return peft.LoraConfig(use_dora=issubclass(kind, LinearWithDoRAMerged), **settings)


def copied(model, kind, rank, scaling, dtype, bias):
    """Return PEFT's model with the weights of ours copied in, tensor by tensor."""
    theirs = peft.get_peft_model(
        base(dtype, bias),
        peft_config(kind, rank, scaling),
        autocast_adapter_dtype=False,
    )
    for name in TARGETS:
        mine, its = (
            model.get_submodule(name),
            theirs.base_model.model.get_submodule(name),
        )
        with torch.no_grad():
            its.lora_A["default"].weight.copy_(mine.lora.A.T)
            its.lora_B["default"].weight.copy_(mine.lora.B.T)
            if hasattr(mine, "m"):
                its.lora_magnitude_vector["default"].weight.copy_(mine.m)
    return theirs


@KINDS
@DTYPES
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(kind, dtype, rank, bias):
    ours = adapted(kind, rank, 1.7, dtype, bias)
    theirs = copied(ours, kind, rank, 1.7, dtype, bias)
    # The gradient of a mean, as a loss is one.
    G, found = normal(6, 10, seed=21).to(dtype) / 60, []
    for model in (ours, theirs):
        x = normal(6, 40, seed=20).to(dtype).requires_grad_()
        y = model(x)
        (y * G).sum().backward()
        found.append((y, x.grad))
    for mine, its in zip(*found, strict=True):
        assert_equal_but_for_rounding(mine, its)
    for name in TARGETS:
        mine, its = (
            ours.get_submodule(name),
            theirs.base_model.model.get_submodule(name),
        )
        pairs = [(mine.lora.A.grad.T, its.lora_A), (mine.lora.B.grad.T, its.lora_B)]
        pairs += (
            [(mine.m.grad, its.lora_magnitude_vector)] if hasattr(mine, "m") else []
        )
        for gradient, module in pairs:
            assert gradient.abs().max() > 0.001
            assert_equal_but_for_rounding(gradient, module["default"].weight.grad)
    assert (
        ours(normal(6, 40).to(dtype)) - base(dtype, bias)(normal(6, 40).to(dtype))
    ).abs().max() > 0.1


def test_a_kept_norm_gives_other_gradients_than_peft():
    # Which shows that the test above would notice.
    ours = adapted(LinearWithDoRA)
    theirs = copied(ours, LinearWithDoRA, 3, 1.7, torch.float64, True)
    for name in TARGETS:
        ours.get_submodule(name).detach_norm = False
    for model in (ours, theirs):
        model(normal(6, 40)).pow(2).sum().backward()
    its = theirs.base_model.model[0].lora_B["default"].weight.grad
    assert (ours[0].lora.B.grad.T - its).abs().max() > 0.01 * its.abs().max()


@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
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
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft_config(kind, 8, 2.0, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    its = theirs.base_model.model[0]
    with torch.no_grad():
        its.lora_A["default"].weight.copy_(ours[0].lora.A.T)
        its.lora_B["default"].weight.copy_(ours[0].lora.B.T)
        if hasattr(ours[0], "m"):
            its.lora_magnitude_vector["default"].weight.copy_(ours[0].m)
    x, G = normal(6, 600, seed=20).to(dtype), normal(6, 512, seed=21).to(dtype)
    outputs = [model(x) for model in (ours, theirs)]
    # 600 terms are summed up, in another order each: some rounding errors of the
    # largest output.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(*outputs, rtol=tolerance)
    for y in outputs:
        (y * G).sum().backward()
    assert_close(
        ours[0].lora.A.grad.T, its.lora_A["default"].weight.grad, rtol=tolerance
    )
    assert_close(
        ours[0].lora.B.grad.T, its.lora_B["default"].weight.grad, rtol=tolerance
    )


# --- Files in both directions ---------------------------------------------------------------


def loaded_by_peft(plain, folder):
    with warnings.catch_warnings():
        # PEFT only warns of a tensor that it didn't find, and computes something else.
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(
            plain, folder, autocast_adapter_dtype=False
        )


@KINDS
@DTYPES
@pytest.mark.parametrize(("rank", "scaling"), [(1, 2.0), (3, 1.7), (8, 0.3)])
def test_peft_loads_what_we_save(kind, dtype, rank, scaling, tmp_path):
    ours = adapted(kind, rank, scaling, dtype)
    save_adapter(ours, tmp_path / "adapter")
    theirs = loaded_by_peft(base(dtype), tmp_path / "adapter")
    x = normal(6, 40).to(dtype)
    assert_equal_but_for_rounding(theirs(x), ours(x))


@KINDS
@DTYPES
@pytest.mark.parametrize("rslora", [True, False])
def test_we_load_what_peft_saves(kind, dtype, rslora, tmp_path):
    theirs = peft.get_peft_model(
        base(dtype),
        peft_config(kind, 4, use_rslora=rslora, lora_alpha=6),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for index, parameter in enumerate(
            p for p in theirs.parameters() if p.requires_grad
        ):
            parameter.add_(0.2 * normal(*parameter.shape, seed=index).to(dtype))
    theirs.save_pretrained(tmp_path)
    ours = base(dtype)
    assert load_adapter(ours, tmp_path) == TARGETS
    assert ours[0].lora.alpha == (3.0 if rslora else 1.5)
    x = normal(6, 40).to(dtype)
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
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
@pytest.mark.filterwarnings("ignore:.*rslora")
@pytest.mark.filterwarnings("ignore:.*rank_pattern")
def test_pefts_patterns_mean_the_same_here(kind, settings, tmp_path):
    theirs = peft.get_peft_model(
        base(), peft_config(kind, 4, **settings), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for index, parameter in enumerate(
            p for p in theirs.parameters() if p.requires_grad
        ):
            parameter.add_(0.2 * normal(*parameter.shape, seed=index))
    theirs.save_pretrained(tmp_path)
    ours = base()
    load_adapter(ours, tmp_path)
    assert_equal_but_for_rounding(ours(normal(6, 40)), theirs(normal(6, 40)))


class Names(nn.Module):
    """Names that are easily taken for others: by their ends, by a pattern's dot, or for
    parts of a file's keys."""

    def __init__(self):
        super().__init__()
        self.dense = linear_layer(5, 5)
        self.block = nn.ModuleDict(
            {"dense": linear_layer(5, 5, seed=1), "xdense": linear_layer(5, 5, seed=2)}
        )
        self.blockxdense = linear_layer(5, 5, seed=3)
        self.weight_proj = linear_layer(5, 5, seed=4)
        self.lora_head = linear_layer(5, 5, seed=5)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in [
            self.dense,
            *self.block.values(),
            self.blockxdense,
            self.weight_proj,
            self.lora_head,
        ]:
            x = torch.tanh(layer(x))
        return x


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
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_names_that_are_easily_taken_for_others(kind, names, tmp_path):
    ours = Names()
    for rank, name in enumerate(names, start=1):
        replace_linear_layers(ours, kind, rank, 0.5 + rank, name)
    freeze_linear_layers(move_all(ours))
    save_adapter(ours, tmp_path / "adapter")
    theirs, again = loaded_by_peft(Names(), tmp_path / "adapter"), Names()
    assert sorted(load_adapter(again, tmp_path / "adapter")) == sorted(names)
    x = normal(3, 5)
    assert_close(theirs(x), ours(x))
    assert torch.equal(again(x), ours(x))


def test_an_adapter_goes_to_peft_is_trained_there_and_comes_back(tmp_path):
    ours = adapted(LinearWithDoRA)
    save_adapter(ours, tmp_path / "there")
    theirs = peft.PeftModel.from_pretrained(
        base(), tmp_path / "there", is_trainable=True, autocast_adapter_dtype=False
    )
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=0.01
        )
        for step in range(5):
            optimizer.zero_grad()
            model(normal(6, 40, seed=step)).pow(2).mean().backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "back")
    back = base()
    load_adapter(back, tmp_path / "back")
    assert_close(back(normal(6, 40)), theirs(normal(6, 40)))
    assert_close(back(normal(6, 40)), ours(normal(6, 40)), rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*invalid shape")
def test_what_peft_saves_and_cannot_be_carried_over_is_refused_by_name(
    settings, name, tmp_path
):
    config = peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **settings})
    peft.get_peft_model(base(torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json: {name}="):
        load_adapter(base(torch.float32), tmp_path)


def test_other_tuners_are_refused_by_name(tmp_path):
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    peft.get_peft_model(base(torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="'IA3', another tuner"):
        load_adapter(base(torch.float32), tmp_path)


def test_convolutions_and_embeddings_are_refused_by_name(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.head = (
                nn.Embedding(5, 4),
                nn.Conv1d(4, 4, 1),
                nn.Linear(4, 2),
            )

    for target, kind in {
        "conv": "Conv1d",
        "words": "words is an Embedding; only nn.Linear is supported",
    }.items():
        folder = tmp_path / target
        peft.get_peft_model(
            Mixed(), peft.LoraConfig(r=2, target_modules=[target])
        ).save_pretrained(folder)
        with pytest.raises(AdapterFileError, match=kind):
            load_adapter(Mixed(), folder)


# --- A bank, beside PEFT's several adapters ----------------------------------------------------


def test_peft_refuses_dora_per_row_and_the_bank_gives_pefts_numbers_row_by_row(
    tmp_path,
):
    bank, rows = AdapterBank(base()), normal(3, 40)
    theirs = None
    for name, rank in {"anna": 2, "ben": 4}.items():
        ours = adapted(LinearWithDoRA, rank, 0.5 * rank)
        save_adapter(ours, tmp_path / name)
        bank.add(name, tmp_path / name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(
                base(), tmp_path / name, name, autocast_adapter_dtype=False
            )
        else:
            theirs.load_adapter(tmp_path / name, name, autocast_adapter_dtype=False)
    theirs.eval()
    # On a copy, because after the error PEFT's hooks stay in.
    with pytest.raises(ValueError, match="DoRA"):
        copy.deepcopy(theirs)(rows, adapter_names=["anna", "__base__", "ben"])
    with bank.rows(["anna", None, "ben"]):
        y = bank.model(rows)
    for row, name in enumerate(["anna", None, "ben"]):
        if name is None:
            with theirs.disable_adapter():
                expected = theirs(rows[row : row + 1])
        else:
            theirs.set_adapter(name)
            expected = theirs(rows[row : row + 1])
        assert_close(y[row : row + 1], expected)


def test_the_merged_model_is_pefts_merged_model(tmp_path):
    ours = adapted(LinearWithDoRA)
    save_adapter(ours, tmp_path / "adapter")
    theirs = loaded_by_peft(base(), tmp_path / "adapter").merge_and_unload()
    mine = merge_adapters(ours)
    for name in TARGETS:
        assert_close(mine.get_submodule(name).weight, theirs.get_submodule(name).weight)


def test_the_config_says_what_pefts_own_says(tmp_path):
    save_adapter(adapted(LinearWithDoRA, 4, 2.0), tmp_path / "ours")
    peft.get_peft_model(base(), peft_config(LinearWithDoRA, 4, 2.0)).save_pretrained(
        tmp_path / "theirs"
    )
    mine, its = (
        json.loads((tmp_path / w / "adapter_config.json").read_text())
        for w in ("ours", "theirs")
    )
    assert mine.keys() <= its.keys()
    for key in mine.keys() - {"target_modules"}:
        assert mine[key] == its[key], key
    assert sorted(mine["target_modules"]) == sorted(its["target_modules"])
