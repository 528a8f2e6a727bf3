"""The settings of an adapter: what their digest covers, what they mean to PEFT, and how
the work grows with a model."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support import assert_close, linear_layer, move_all, normal
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters import load_adapter, save_adapter
from lowrank_utils.adapters.config import AdapterFileError, parse_config
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA


class Layers(nn.Module):
    """Blocks as transformers have them, with numbers in their names at two depths."""

    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": linear_layer(4, 4, seed=3 * i),
                    "experts": nn.ModuleList([linear_layer(4, 4, seed=3 * i + 1)]),
                }
            )
            for i in range(count)
        )
        self.h = nn.ModuleList([nn.ModuleDict({"q": linear_layer(4, 4, seed=90)})])
        self.q = linear_layer(4, 4, seed=91)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["experts"][0](torch.tanh(layer["q"](x))))
        return self.q(self.h[0]["q"](x))


def adapted(kind=LinearWithLoRA, targets=None):
    model = Layers()
    replace_linear_layers(model, kind, 2, 1.5, targets)
    freeze_linear_layers(move_all(model))
    return model


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(LinearWithDoRA), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **settings):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | settings
    path.write_text(json.dumps(config), encoding="utf-8")


# --- The digest of the settings ----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 4},
        {"use_rslora": True},
        {"alpha_pattern": {"q": 3.5}},
        {"alpha_pattern": {"^layers\\.0\\.q": 2.9999999}},
        {"lora_dropout": 0.5},
    ],
)
def test_a_changed_setting_that_changes_outputs_is_refused(folder, settings):
    change_config(folder, **settings)
    with pytest.raises(
        AdapterFileError,
        match=r"adapter_config\.json: was altered after it was saved: its settings",
    ):
        load_adapter(Layers(), folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_model_name_or_path": "my/model", "task_type": "CAUSAL_LM"},
        {"r": 2, "lora_alpha": 3.0, "rank_pattern": None, "exclude_modules": []},
        {"peft_version": "99", "a_setting_of_the_future": None},
    ],
)
def test_a_setting_that_is_only_written_otherwise_may_be_changed(folder, settings):
    change_config(folder, **settings)
    load_adapter(Layers(), folder)


@pytest.mark.parametrize("kept", [{"format", "sha256"}, {"format"}, set()])
def test_files_without_these_digests_are_loaded(folder, kept):
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata.keys() == {"format", "sha256", "settings_sha256"}
    save_file(tensors, path, {key: metadata[key] for key in kept} or None)
    change_config(folder, lora_alpha=4)
    load_adapter(Layers(), folder)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"lora_alpha"', '"lora_alpha": 9, "lora_alpha"', "lora_alpha"),
        ('"rank_pattern": {', '"rank_pattern": {"q": 2, "q": 3', "q"),
        ('"peft_type"', '"r": 2, "peft_type"', "r"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_by_name(folder, old, new, key):
    path = folder / "adapter_config.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(
        AdapterFileError, match=rf"adapter_config\.json: '{key}' stands there more than"
    ):
        load_adapter(Layers(), folder)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"lora_dropout": 1}, "lora_dropout must be at least 0 and below 1; got 1"),
        ({"lora_dropout": -0.1}, "lora_dropout must be at least 0"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be a finite number"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a whole number"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be a whole"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        (
            {"layers_to_transform": [0], "layers_pattern": "("},
            r"layers_pattern: '\(' isn't a pattern",
        ),
        ({"layers_to_transform": 0, "target_modules": ".*q"}, "go with a list in tar"),
        ({"target_modules": "all-linear"}, "'all-linear' stands for names"),
        ({"bias": "some"}, "bias must be one of 'all', 'lora_only', 'none'; got"),
        ({"bias": ["all"]}, "bias must be a word"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names"),
        ({"modules_to_save": [""]}, "modules_to_save must be a list of names"),
        ({"modules_to_save": ["("]}, r"modules_to_save: '\(' isn't a pattern"),
        # A pattern for itself, and none inside PEFT's expression around it.
        ({"rank_pattern": {"(?i)q": 3}}, r"rank_pattern: '\(\?i\)q' isn't a pattern"),
        (
            {"init_lora_weights": "loftq"},
            "'loftq' changes the base weight too, and the file has only A and B",
        ),
        ({"init_lora_weights": "corda"}, "'corda' changes the base weight too"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weight too"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(folder, settings, pattern):
    change_config(folder, **settings)
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json: .*{pattern}"):
        load_adapter(Layers(), folder)


def test_every_pattern_that_is_taken_is_taken_in_every_name():
    config = parse_config(
        json.dumps(
            {
                "peft_type": "LORA",
                "target_modules": ["q"],
                "layers_to_transform": 0,
                "layers_pattern": ["layers", "h"],
            }
        ).encode()
    )
    assert [n for n in ("q", "h.0.q", "layers.1.q", "layers.0.v") if config.names(n)]
    assert config.layers == [0]


class Negated(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda m: setattr(m, "q", Negated(4, 4, dtype=torch.float64)),
            "q: linear has a forward of its",
        ),
        (lambda m: m.to("meta"), r"layers\.0\.q of the model is on the meta device"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(folder, change, pattern):
    model = Layers()
    change(model)
    with pytest.raises(AdapterFileError, match=pattern):
        load_adapter(model, folder)
    assert not any(isinstance(m, LinearWithDoRA) for m in model.modules())


# --- What PEFT means by them --------------------------------------------------------------------

peft = pytest.importorskip(
    "peft", reason='needs the extra peft: pip install -e ".[peft]"'
)


@pytest.mark.filterwarnings("ignore:.*rank_pattern")
@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": 0},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [0], "layers_pattern": "h"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["nothing", "layers"]},
        {"layers_to_transform": [], "layers_pattern": []},
        {"layers_to_transform": [2], "target_modules": ["layers.0.q", "experts.0"]},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"layers.0.q": 3, "q": 1}, "alpha_pattern": {"^q|h.0": 7}},
    ],
)
def test_pefts_settings_mean_the_same_here(settings, use_dora, tmp_path):
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q"], "use_dora": use_dora, **settings}
    )
    theirs = peft.get_peft_model(Layers(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora_" in name:
                parameter.copy_(parameter + normal(*parameter.shape, seed=index))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = Layers()
    names = load_adapter(ours.eval(), tmp_path / "theirs")
    assert sorted(names) == sorted(theirs.targeted_module_names)
    x = normal(3, 4, seed=60)
    assert_close(ours(x), theirs(x))
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        Layers(), tmp_path / "ours", autocast_adapter_dtype=False
    )
    assert_close(again.eval()(x), theirs(x))


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.filterwarnings("ignore:.*rank_pattern")
def test_what_eva_made_of_the_ranks_is_loaded(tmp_path):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    theirs = peft.get_peft_model(
        Layers().float(), config, low_cpu_mem_usage=True, autocast_adapter_dtype=False
    )
    data = [normal(64, 4, seed=i).float() for i in range(8)]
    peft.initialize_lora_eva_weights(
        theirs,
        dataloader=data,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0],
        show_progress_bar=False,
    )
    with torch.no_grad():
        for index, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(normal(*parameter.shape, seed=index))
    theirs.eval().save_pretrained(tmp_path)
    ours = Layers().float()
    load_adapter(ours, tmp_path)
    assert_close(ours(data[0]), theirs(data[0]), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_layers_of_another_kind_are_named_whatever_pefts_settings_for_them(tmp_path):
    transformers = pytest.importorskip("transformers")

    def gpt2():
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2
            )
        )

    for target, kind in {
        "c_attn": r"transformer\.h\.0\.attn\.c_attn is a Conv1D",
        "wte": r"transformer\.wte is an Embedding",
    }.items():
        config = peft.LoraConfig(
            r=2, target_modules=[target], fan_in_fan_out=target == "c_attn"
        )
        peft.get_peft_model(gpt2(), config).save_pretrained(tmp_path / target)
        with pytest.raises(
            AdapterFileError, match=f"{kind}; only nn.Linear is supported"
        ):
            load_adapter(gpt2(), tmp_path / target)


PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "layers", "x.y"])
NAME = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
PATTERN = NAME | st.sampled_from(
    ["^a", "^a.b", r"a\.b", "a|b", ".*b", "b$", "[ab]", r"layers\.\d", "^a|b"]
)


@given(
    st.dictionaries(PATTERN, st.integers(1, 9), max_size=5),
    st.lists(NAME, min_size=1, max_size=5),
)
def test_a_pattern_gives_each_layer_what_it_gives_in_peft(patterns, names):
    from peft.utils.other import get_pattern_key

    config = parse_config(
        json.dumps({"peft_type": "LORA", "rank_pattern": patterns}).encode()
    )
    for name in names:
        key = get_pattern_key(patterns.keys(), name)
        assert config.rank_of(name) == patterns.get(key, 8), name


@given(
    st.one_of(
        st.lists(NAME, max_size=4),
        PATTERN,
        st.lists(NAME, min_size=2, max_size=4).map("|".join),
    ),
    st.none() | st.lists(NAME, max_size=2) | PATTERN,
    st.none() | st.lists(PATTERN, max_size=2),
    st.none() | st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
    st.none() | st.sampled_from(["layers", "b"]) | st.lists(PATTERN, max_size=2),
    st.lists(NAME, min_size=1, max_size=5),
)
def test_a_layer_is_adapted_if_peft_adapts_it(
    targets, excluded, saved, numbers, patterns, names
):
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    if isinstance(targets, str) or numbers in (None, []):
        numbers, patterns = None, None
    settings = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": numbers,
        "layers_pattern": patterns,
    }
    config = parse_config(json.dumps({"peft_type": "LORA", **settings}).encode())
    theirs = SimpleNamespace(**settings, target_parameters=None)
    for name in names:
        found = check_target_module_exists(theirs, name)
        expected = bool(found) and not isinstance(found, _ExcludedModule)
        assert config.names(name) == expected, name
        ends = any(name.endswith(end) for end in saved or [])
        assert (name in config.saved_modules) == ends


# --- How the work grows --------------------------------------------------------------------------


def calls(function):
    """Return how many calls a function makes in all."""
    count = 0

    def counted(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class Many(nn.Module):
    """Layers of two ranks, trained norms beside them, and a plain layer whose name ends
    like that of an adapted one, so that every setting names each layer."""

    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"linear": nn.Linear(2, 2, bias=False), "norm": nn.LayerNorm(2)}
            )
            for _ in range(count)
        )
        self.more = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.Identity()})})
        self.more["blocks"]["0"].linear = nn.Linear(2, 2)
        self.requires_grad_(False)


def test_four_times_the_layers_are_four_times_the_work(tmp_path):
    work = {}
    for count in (50, 200):
        model = Many(count)
        for parity, rank in enumerate((1, 2)):
            targets = [f"blocks.{i}.linear" for i in range(parity, count, 2)]
            replace_linear_layers(model, LinearWithLoRA, rank, float(rank), targets)
        freeze_linear_layers(model)
        for block in model.blocks:
            block["norm"].requires_grad_(True).weight.data.fill_(2)
        folder, plain = tmp_path / str(count), Many(count)
        work[count] = (
            calls(lambda model=model, folder=folder: save_adapter(model, folder)),
            calls(lambda plain=plain, folder=folder: load_adapter(plain, folder)),
        )
        assert isinstance(plain.blocks[count - 1]["linear"], LinearWithLoRA)
    for few, many in zip(work[50], work[200], strict=True):
        assert many < 4.5 * few
