"""What was trained beside the adapters: the same files and outputs as PEFT's, in both
directions."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import assert_close, assert_same_state, move_all, normal, snapshot
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters import AdapterBank
from lowrank_utils.adapters.config import AdapterFileError
from lowrank_utils.adapters.files import (
    load_adapter,
    names_trained_along,
    read_adapter,
    save_adapter,
)
from lowrank_utils.adapters.names import plain_modules
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

peft = pytest.importorskip(
    "peft", reason='needs the extra peft: pip install -e ".[peft]"'
)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`is_gradient_checkpointing` is deprecated",
        "Model has `tie_word_embeddings",
        "Model with `tie_word_embeddings",
        "Setting `save_embedding_layers`",
    )
]
TOKENS = torch.arange(6).reshape(2, 3)


class Block(nn.Module):
    """Two layers and a norm with running statistics."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x)))
        return self.norm((x + y).flatten(0, 1)).view(x.shape)


class Head(nn.Module):
    """A head of several modules."""

    def __init__(self):
        super().__init__()
        self.dense, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.dense(x)))


class Base(nn.Module):
    """Words, two blocks, a norm and a head, everything frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.final_norm = nn.LayerNorm(4)
        self.classifier = Head()
        self.double().requires_grad_(False).eval()

    def forward(self, tokens):
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.final_norm(x))


def trained(*parts, kind=LinearWithDoRA, base=Base, targets=("*.up", "*.down")):
    """Return an adapted model, of which ``parts`` too are as training leaves them."""
    model = base()
    replace_linear_layers(model, kind, 2, 1.5, targets)
    move_all(model)
    freeze_linear_layers(model)
    for index, part in enumerate(parts):
        named = model.named_parameters(remove_duplicate=False)
        found = [p for n, p in named if n.startswith(part)]
        assert found, part
        for parameter in found:
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(normal(*parameter.shape, seed=80 + index))
    for name, buffer in model.named_buffers():
        if any(name.startswith(part) for part in parts):
            buffer.add_(1)
    return model


def loaded_by_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(
            base, folder, autocast_adapter_dtype=False
        ).eval()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def change_tensors(folder, **changes):
    """Change tensors by the ends of their names; None takes them away."""
    tensors = tensors_of(folder)
    for end, value in changes.items():
        (key,) = (key for key in tensors if key.endswith(end.replace("__", ".")))
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", {"format": "pt"}
    )


STATISTICS = pytest.mark.filterwarnings("ignore:.*the running statistics are no part")


@STATISTICS
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
@pytest.mark.parametrize(
    ("parts", "modules", "bias"),
    [
        ((), None, "none"),
        (("classifier",), ["classifier.dense", "classifier.out"], "none"),
        (("classifier.out",), ["classifier.out"], "none"),
        (("classifier.out.weight",), ["classifier.out"], "none"),
        (
            ("final_norm", "layers.0.norm", "words"),
            ["words", "layers.0.norm", "final_norm"],
            "none",
        ),
        (("layers.1.up.linear.bias",), None, "lora_only"),
        (("layers.1.up.linear.bias", "final_norm"), ["final_norm"], "lora_only"),
        (("final_norm.bias",), None, "all"),
        (
            ("layers.0.norm.bias", "layers.1.up.linear.bias", "classifier.out"),
            ["classifier.out"],
            "all",
        ),
    ],
)
def test_what_was_trained_along_comes_back_here_and_in_peft(
    kind, parts, modules, bias, tmp_path
):
    model = trained(*parts, kind=kind)
    save_adapter(model, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert (config["modules_to_save"], config["bias"]) == (modules, bias)
    theirs, ours = loaded_by_peft(Base(), tmp_path / "adapter"), Base()
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(ours(TOKENS), model(TOKENS))
    assert_close(theirs(TOKENS), model(TOKENS))
    # Frozen as it is now, it's still part of the adapter.
    save_adapter(freeze(ours), tmp_path / "again")
    again = Base()
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(TOKENS), model(TOKENS))


def freeze(model):
    freeze_linear_layers(model)
    for name, parameter in model.named_parameters():
        if ".lora." not in name and not name.endswith(".m"):
            parameter.requires_grad_(False)
    return model


@STATISTICS
@pytest.mark.filterwarnings("ignore:PEFT currently supports many biases")
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["classifier"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["words", "score"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"bias": "all", "modules_to_save": ["classifier", "norm"]},
        {"bias": "lora_only", "modules_to_save": ["classifier.out"]},
        {"target_modules": ["up", "dense"], "modules_to_save": ["classifier"]},
    ],
)
def test_what_peft_trained_along_is_loaded_and_saved_again(
    settings, use_dora, tmp_path
):
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["up", "down"], "use_dora": use_dora, **settings}
    )
    theirs = peft.get_peft_model(Base(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            if parameter.requires_grad:
                parameter.add_(normal(*parameter.shape, seed=index))
    theirs.train()(TOKENS)  # moves the running statistics of what is trained
    for name, module in theirs.named_modules():
        if isinstance(module, nn.BatchNorm1d) and "modules_to_save" not in name:
            module.reset_running_stats()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = Base()
    load_adapter(ours, tmp_path / "theirs")
    assert_close(ours(TOKENS), theirs(TOKENS))
    save_adapter(freeze(ours), tmp_path / "ours")
    assert_close(loaded_by_peft(Base(), tmp_path / "ours")(TOKENS), theirs(TOKENS))


class TiedBias(Base):
    """A bias in two places, as BERT's for predicting words."""

    def __init__(self):
        super().__init__()
        self.bias = self.classifier.out.bias

    def forward(self, tokens):
        return super().forward(tokens) + self.bias


@STATISTICS
def test_a_trained_bias_in_two_places_stays_one(tmp_path):
    model = trained("bias", base=TiedBias)
    save_adapter(model, tmp_path / "adapter")
    theirs, ours = loaded_by_peft(TiedBias(), tmp_path / "adapter"), TiedBias()
    load_adapter(ours, tmp_path / "adapter")
    assert ours.bias is ours.classifier.out.bias
    assert torch.equal(ours(TOKENS), model(TOKENS))
    assert_close(theirs(TOKENS), model(TOKENS))


# --- What PEFT has no place for ---------------------------------------------------------------


class WithToken(Base):
    """A parameter of the model itself, and names that PEFT takes for others."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.extra_classifier = nn.Linear(4, 3).double()
        self.up = nn.LayerNorm(4).double()
        self.odd = nn.ModuleDict({"a+b": nn.LayerNorm(4)}).double()
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.words.weight
        self.requires_grad_(False)


@STATISTICS
@pytest.mark.parametrize(
    ("parts", "pattern"),
    [
        (["token"], r"token: is trained, but belongs to the WithToken itself"),
        (
            ["classifier.out", "up"],
            r"up is trained, .* modules_to_save PEFT would .*layers\.0\.up",
        ),
        (["odd"], r"odd\.a\+b is trained, .* a pattern that means something else"),
        (["tied"], r"words\.weight, tied\.weight are one tensor \(tied\)"),
        (["words"], r"words\.weight, tied\.weight are one tensor \(tied\)"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_by_name(parts, pattern, tmp_path):
    with pytest.raises(ValueError, match=rf"{pattern}.*Freeze what wasn't trained"):
        save_adapter(trained(*parts, base=WithToken), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Named(nn.Module):
    """One module that is trained along, and a longer name with its end."""

    def __init__(self, trained, other):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.set_submodule(trained, nn.LayerNorm(4))
        self.set_submodule(other, nn.LayerNorm(4))
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "other", "taken"),
    [
        ("head", "overhead", "overhead"),
        ("A", "other", r"first\.lora_A"),
        ("out", "other", r"first\.lora_dropout"),
        ("lora_B", "other", r"first\.lora_B"),
        ("default", "other", r"first\.lora_A\.default"),
        ("first_norm", "other", None),
    ],
)
def test_a_name_that_would_mean_others_too_is_refused(name, other, taken, tmp_path):
    model = Named(name, other)
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0)
    freeze_linear_layers(model)
    model.get_submodule(name).requires_grad_(True)
    if taken is None:
        save_adapter(model, tmp_path / "adapter")
        assert config_of(tmp_path / "adapter")["modules_to_save"] == [name]
    else:
        with pytest.raises(
            ValueError, match=rf"{name} is trained, .* PEFT would take {taken}"
        ):
            save_adapter(model, tmp_path / "adapter")


class Gated(nn.Module):
    """A parameter beside an adapted layer, in one module."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"linear_layer": nn.Linear(4, 4)})
        self.block.register_parameter("gate", nn.Parameter(torch.ones(4)))


class Outer(nn.Module):
    """Such a module inside another."""

    def __init__(self):
        super().__init__()
        self.gated = Gated().requires_grad_(False)


def test_a_module_with_an_adapted_layer_inside_is_not_saved_whole(tmp_path):
    model = Outer()
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0)
    freeze_linear_layers(model)
    model.gated.block.gate.requires_grad_(True)
    with pytest.raises(
        ValueError,
        match=r"parameters of gated are trained, and gated\.block\.linear_layer inside",
    ):
        save_adapter(model, tmp_path / "adapter")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = trained("final_norm")
    model.final_norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"final_norm\.weight holds NaN or infinite"):
        save_adapter(model, tmp_path / "adapter")


# --- Files that don't fit ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained("classifier", "final_norm.bias"), tmp_path / "adapter")
    return tmp_path / "adapter"


@STATISTICS
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (
            {"classifier__out__weight": None},
            r"no tensors for classifier\.out\.weight, which modules_to_save names",
        ),
        (
            {"final_norm__bias": None},
            r"no tensors for final_norm\.bias, which bias='all' names",
        ),
        (
            {"layers__0__up__base_layer__bias": None},
            r"no tensors for layers\.0\.up\.bias, which bias='all' names",
        ),
        (
            {"classifier__out__weight": torch.ones(4, 3, dtype=torch.float64)},
            r"classifier\.out\.weight has the shape \(4, 3\); the model's .*\(3, 4\)",
        ),
        (
            {"final_norm__bias": torch.full((4,), float("inf"), dtype=torch.float64)},
            r"final_norm\.bias holds NaN or infinite numbers",
        ),
        (
            {"final_norm__bias": torch.ones(4, dtype=torch.int64)},
            r"final_norm\.bias has the dtype torch\.int64; allowed are",
        ),
    ],
)
def test_other_weights_that_do_not_fit_are_refused_and_nothing_changes(
    folder, changes, pattern
):
    change_tensors(folder, **changes)
    model = Base()
    before, modules = snapshot(model), list(model.modules())
    with pytest.raises(AdapterFileError, match=pattern):
        load_adapter(model, folder)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@STATISTICS
def test_other_weights_are_rounded_only_if_asked_for(folder):
    model = Base().float()
    with pytest.raises(AdapterFileError, match=r"rounded to torch\.float32"):
        load_adapter(model, folder)
    load_adapter(model, folder, may_round=True)
    assert torch.equal(
        model.classifier.out.weight,
        tensors_of(folder)["base_model.model.classifier.out.weight"].float(),
    )


@STATISTICS
def test_a_bank_refuses_them_by_name_unless_they_are_the_base_models_own(folder):
    model = Base()
    before = snapshot(model)
    with pytest.raises(
        AdapterFileError,
        match=r"classifier\.out\.weight, final_norm\.bias of the base model was trained al",
    ):
        AdapterBank(model).add("anna", folder)
    assert_same_state(model, before)
    own = snapshot(model)
    change_tensors(
        folder,
        **{
            name.replace(".", "__"): own[name]
            for name in own
            if name.startswith("classifier") or name == "final_norm.bias"
        },
    )
    AdapterBank(model).add("anna", folder)
    assert len(read_adapter(folder, plain_modules(Base()))) == 4


def test_a_models_own_trained_weights_can_be_asked_for():
    model = trained("final_norm.bias", "layers.0.up.linear.bias")
    assert names_trained_along(model) == ["layers.0.up.bias", "final_norm.bias"]


# --- Embeddings and heads of language models --------------------------------------------------

transformers = pytest.importorskip("transformers")


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False).eval()


def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_an_adapted_head_goes_to_peft_and_comes_back(tied, targets, tmp_path):
    theirs = peft.get_peft_model(
        llama(tied),
        peft.LoraConfig(r=2, target_modules=targets),
    )
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            if parameter.requires_grad:
                parameter.add_(normal(*parameter.shape, seed=index))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert any("base_layer" in key for key in tensors_of(tmp_path / "theirs"))
    ours = llama(tied)
    assert "lm_head" in load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours), logits(theirs), rtol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours").eval()
    assert_close(logits(again), logits(ours), rtol=1e-5)
    change_tensors(tmp_path / "theirs", lm_head__base_layer__weight=torch.ones(20, 16))
    with pytest.raises(
        AdapterFileError,
        match=r"lm_head\.base_layer\.weight isn't the model's own lm_head\.weight",
    ):
        load_adapter(llama(tied), tmp_path / "theirs")


def test_embeddings_in_the_file_are_taken_if_they_are_the_models_own(tmp_path):
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in tensors_of(tmp_path))
    load_adapter(llama(), tmp_path)
    resized = llama()
    resized.resize_token_embeddings(24, mean_resizing=False)
    with pytest.raises(
        AdapterFileError, match=r"lm_head\.weight isn't the model's own"
    ):
        load_adapter(resized, tmp_path)


def test_a_head_that_peft_trained_apart_from_tied_embeddings_is_refused(tmp_path):
    def theirs(tied):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
        )
        return peft.get_peft_model(llama(tied), config)

    model = theirs(tied=True)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        AdapterFileError,
        match=r"lm_head\.weight was trained, and is one tensor with model\.embed_token",
    ):
        load_adapter(llama(tied=True), tmp_path)
    ours = llama(tied=False)
    load_adapter(ours, tmp_path)
    assert_close(logits(ours), logits(model.eval()), rtol=1e-5)


@STATISTICS
def test_a_copied_model_keeps_what_belongs_to_its_adapter(tmp_path):
    save_adapter(trained("final_norm"), tmp_path / "adapter")
    model = Base()
    load_adapter(model, tmp_path / "adapter")
    assert names_trained_along(copy.deepcopy(freeze(model))) == [
        "final_norm.bias",
        "final_norm.weight",
    ]
