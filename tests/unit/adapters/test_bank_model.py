"""A bank and the model around which it is: exchanged layers, the batch's dimension,
adapters wider than the base, and models that read a weight instead of calling a
layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import assert_close, linear_layer, move_all, normal
from torch import nn

from lowrank_utils.adapt import (
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank, load_adapter, save_adapter
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

KINDS = pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])


def base(dtype=torch.float64):
    model = nn.Sequential(linear_layer(7, 6), nn.Tanh(), linear_layer(6, 3, seed=3))
    return model.requires_grad_(False).to(dtype).eval()


def adapted(model, kind=LinearWithDoRA, seed=0, targets=None):
    """Put an adapter into ``model``, moved as training would."""
    replace_linear_layers(model.requires_grad_(False), kind, 2, 0.7, targets)
    freeze_linear_layers(move_all(model))
    with torch.no_grad():
        for index, parameter in enumerate(
            p for p in model.parameters() if p.requires_grad
        ):
            factor = 1 + 0.1 * normal(*parameter.shape, seed=100 * seed + index)
            parameter.mul_(factor.to(parameter.dtype))
    return model.requires_grad_(False).eval()


X = normal(3, 7, seed=50)


@pytest.fixture
def bank():
    bank = AdapterBank(base())
    bank.add("anna", adapted(base()))
    return bank


# --- The base weight --------------------------------------------------------------------


def in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(1.5)


def of_other_signs(linear):
    with torch.no_grad():
        linear.weight.neg_()


def loaded(linear):
    linear.load_state_dict(linear_layer(7, 6, seed=8).state_dict())


def exchanged(linear):
    linear.weight = nn.Parameter(linear.weight + 1, requires_grad=False)


@pytest.mark.parametrize("change", [in_place, of_other_signs, loaded, exchanged])
@pytest.mark.parametrize("use", ["active", "rows", "merged"])
def test_a_base_weight_that_changed_under_a_c_is_noticed(bank, change, use):
    bank.add("lora", adapted(base(), LinearWithLoRA, seed=1))
    linear = bank.model[0].linear
    change(linear)
    # LoRA takes the weight as it is.
    bank.activate("lora")
    assert_close(bank.model(X), bank.model[2](torch.tanh(bank.model[0](X))))

    def output(names):
        if use == "rows":
            with bank.rows([*names, None, "lora"]):
                return bank.model(X)
        bank.activate(*names)
        if use == "merged":
            bank.merge()
        return bank.model(X)

    with pytest.raises(RuntimeError, match="a base weight changed while an adapter"):
        output(["anna"])
    with pytest.raises(RuntimeError, match="a base weight changed while an adapter"):
        bank.add("ben", adapted(base(), seed=2))
    assert bank.names == ["anna", "lora"]
    bank.remove("anna")
    model = base()
    model[0].load_state_dict(linear.state_dict())
    bank.add("anna", adapted(model))
    y = output(["anna"])
    count = 1 if use == "rows" else 3
    assert_close(y[:count], model(X)[:count])


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_source_whose_base_was_trained_along_is_refused(part):
    source = base()
    replace_linear_layers(source, LinearWithDoRA, 2, 0.7, targets=["0"])
    getattr(source[0].linear, part).requires_grad_(True)
    AdapterBank(base()).add("anna", source)
    with torch.no_grad():
        getattr(source[0].linear, part)[0].add_(0.1)
    with pytest.raises(ValueError, match=rf"^0\.{part} was trained along, which"):
        AdapterBank(base()).add("anna", source)


def test_a_weight_that_is_given_for_a_call_is_noticed(bank):
    bank.activate("anna")
    y = bank.model(X)
    given = {"0.linear.weight": bank.model[0].linear.weight + 0.1}
    with pytest.raises(RuntimeError, match="a base weight changed while an adapter"):
        torch.func.functional_call(bank.model, given, (X,))
    assert_close(bank.model(X), y)


def test_what_leaves_the_base_weight_as_it_is_is_no_fault(bank):
    bank.activate("anna")
    y = bank.model(X)
    assert_close(copy.deepcopy(bank).model(X), y)
    with torch.no_grad():
        bank.model[0].linear.weight.mul_(1.0)
    assert_close(bank.model(X), y)
    bank.add("ben", adapted(base(), seed=2))
    assert_close(bank.model(X), y)
    assert_close(bank.model.float()(X.float()).double(), y, rtol=1e-4)
    bank.model[0].linear.weight = nn.Parameter(bank.model[0].linear.weight.double())


@pytest.mark.parametrize("names", [{"anna"}, frozenset(["anna"]), {"anna": 1}])
def test_names_without_an_order_are_refused(bank, names):
    with (
        pytest.raises(TypeError, match="names must be a list with one name per row"),
        bank.rows(names),
    ):
        pass


# --- The model as it is -----------------------------------------------------------------


def test_a_layer_that_was_exchanged_before_an_adapter_came_stays():
    model = base()
    bank = AdapterBank(model)
    model[2] = new = linear_layer(6, 3, seed=9)
    y = model(X)
    alone = base()
    alone[2].load_state_dict(new.state_dict())
    adapted(alone, targets="2")
    bank.add("anna", alone)
    assert model[2].linear is new
    assert torch.equal(model(X), y)
    bank.activate("anna")
    assert_close(model(X), alone(X))
    bank.remove("anna")
    assert model[2] is new


@pytest.mark.parametrize("inside", [False, True])
def test_a_banked_layer_that_was_exchanged_stays_and_its_adapters_are_refused(
    bank, inside
):
    model, new = bank.model, linear_layer(6, 3, seed=9)
    bank.add("ben", adapted(base(), LinearWithLoRA, targets="0"))
    bank.activate("anna")
    bank.disable()
    if inside:
        model[2].linear = new
    else:
        model[2] = new
    y = model(X)
    pattern = "^2 was exchanged after 'anna' had been added, which belongs to the old"
    for call in (
        lambda: bank.activate("anna"),
        lambda: bank.rows(["anna", "ben", None]).__enter__(),
    ):
        with pytest.raises(RuntimeError, match=pattern):
            call()
    with pytest.raises(
        RuntimeError, match=r"^2 was exchanged after 'anna' had been added, which be"
    ):
        bank.add("cleo", adapted(base()))
    bank.activate("ben")
    bank.disable()
    assert torch.equal(model(X), y)
    bank.remove("anna")
    assert model[2] is new
    assert torch.equal(model(X), y)
    bank.add("cleo", adapted(base(), LinearWithLoRA))
    bank.activate("cleo")
    assert not torch.allclose(model(X), y)
    bank.remove("cleo")
    assert model[2] is new


def test_an_active_adapter_whose_layer_was_exchanged_is_refused_by_the_pass(bank):
    bank.activate("anna")
    bank.model[2] = linear_layer(6, 3, seed=9)
    with pytest.raises(RuntimeError, match=r"^2 was exchanged after 'anna' had been"):
        bank.model(X)
    with pytest.raises(RuntimeError, match=r"^2 was exchanged after 'anna' had been"):
        bank.merge()
    bank.disable()
    bank.model(X)


def test_adapters_that_somebody_put_in_later_are_refused_by_name():
    model = base()
    bank = AdapterBank(model)
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, "2")
    with pytest.raises(
        ValueError, match=r"^already adapted: 2; a bank needs the plain"
    ):
        bank.add("anna", adapted(base()))
    other = AdapterBank(base())
    second = AdapterBank(other.model)
    second.add("anna", adapted(base(), targets="0"))
    with pytest.raises(
        ValueError, match=r"^already adapted: 0; a bank needs the plain"
    ):
        other.add("ben", adapted(base()))


def test_no_random_number_is_drawn_or_given_back(tmp_path, monkeypatch):
    save_adapter(adapted(base()), tmp_path / "anna")
    bank, source = AdapterBank(base()), adapted(base())
    before = torch.get_rng_state()

    def refused(*_):
        raise AssertionError("the generator of everybody was touched")

    monkeypatch.setattr(torch, "set_rng_state", refused)
    monkeypatch.setattr(torch.random, "set_rng_state", refused)
    bank.add("anna", tmp_path / "anna")
    bank.add("ben", source)
    assert torch.equal(torch.get_rng_state(), before)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    linear = linear_layer(7, 6)
    linear.register_forward_hook(lambda *_: 2 * _[2])
    return linear


def subclass():
    linear = Twice(7, 6, dtype=torch.float64)
    linear.load_state_dict(linear_layer(7, 6).state_dict())
    return linear


@pytest.mark.parametrize("layer", [hooked, subclass])
def test_a_layer_that_computes_more_than_its_weight_takes_lora_alone(layer):
    model = nn.Sequential(layer()).requires_grad_(False)
    plain = nn.Sequential(linear_layer(7, 6)).requires_grad_(False)
    bank = AdapterBank(model)
    lora = adapted(nn.Sequential(linear_layer(7, 6)), LinearWithLoRA)
    bank.add("lora", lora)
    update = lora(X) - plain(X)
    with bank.rows(["lora", None, "lora"]):
        y = model(X)
    assert_close(y[::2], (2 * plain(X) + update)[::2])
    assert torch.equal(y[1], model(X)[1])
    bank.activate("lora")
    assert_close(model(X), 2 * plain(X) + update)
    dora = adapted(nn.Sequential(linear_layer(7, 6)), LinearWithDoRA)
    for call in (bank.merge, model[0].weight.clone, lambda: bank.add("dora", dora)):
        with pytest.raises(TypeError, match="would be passed over where its weight"):
            call()
    assert bank.names == ["lora"]


# --- Which dimension is the batch's -----------------------------------------------------


@KINDS
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_the_batch_is_where_the_caller_says(kind, batch_dim):
    names = ["anna", None, "ben", "anna"]
    models = {name: adapted(base(), kind, seed=len(name)) for name in ("anna", "ben")}
    models["ben"] = adapted(base(), LinearWithLoRA, seed=5)
    bank = AdapterBank(base())
    for name, model in models.items():
        bank.add(name, model)
    x = normal(4, 2, 3, 7, seed=60)
    moved = x.movedim(0, batch_dim)
    with bank.rows(names, batch_dim=batch_dim):
        y = bank.model(moved).movedim(batch_dim, 0)
    for row, name in enumerate(names):
        alone = base() if name is None else models[name]
        assert_close(y[row], alone(x[row]), rtol=1e-12)


class SequenceFirst(nn.Module):
    """An encoder, a recurrent net and a head, all with the sequence in front."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, dtype=torch.float64
        )
        self.rnn = nn.GRU(8, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.rnn(self.encoder(x))[0])


@pytest.mark.parametrize("training", [False, True])
def test_sequence_first_modules_are_named_unless_the_dimension_was_said(training):
    torch.manual_seed(1)
    model = SequenceFirst().requires_grad_(False).train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    models = {}
    for name, kind in {"anna": LinearWithDoRA, "ben": LinearWithLoRA}.items():
        models[name] = SequenceFirst().train(training)
        models[name].load_state_dict(state)
        targets = ["encoder.linear1", "encoder.linear2", "head"]
        adapted(models[name], kind, len(name), targets).train(training)
    bank = AdapterBank(model)
    for name, alone in models.items():
        bank.add(name, alone)
    x, names = normal(5, 3, 8, seed=61), ["ben", None, "anna"]
    with pytest.raises(ValueError, match=r"^batch_first is False in ") as refusal:
        bank.rows(names).__enter__()
    for found in ("encoder.self_attn (MultiheadAttention)", "rnn (GRU)"):
        assert found in str(refusal.value)
    plain = model(x)
    with bank.rows(names, batch_dim=1):
        y = model(x)
    assert_close(y[:, 1], plain[:, 1])
    assert_close(y[:, 0], models["ben"](x[:, :1])[:, 0], rtol=1e-12)
    assert_close(y[:, 2], models["anna"](x[:, 2:])[:, 0], rtol=1e-12)


def test_rows_that_do_not_fit_the_batch_are_refused_whoever_they_are(bank):
    bank.add("ben", adapted(base(), targets="2"))
    for names in ([None], ["ben"], [None] * 4, []):
        with (
            bank.rows(names),
            pytest.raises(ValueError, match=f"^rows names {len(names)} adapters, and"),
        ):
            bank.model(X)
    pattern = r"shape \(3, 7\): dimension 1 must be the batch's .* and the last the fea"
    for count in (3, 7):
        with (
            bank.rows([None] * count, batch_dim=1),
            pytest.raises(ValueError, match=pattern),
        ):
            bank.model(X)
    for wrong in (-1, 1.0, True, "0"):
        with pytest.raises(
            (TypeError, ValueError), match=r"^batch_dim must be a whole"
        ):
            bank.rows([None], batch_dim=wrong).__enter__()


def test_an_empty_bank_compares_the_rows_with_the_models_inputs():
    model = base()
    bank, y = AdapterBank(model), model(X)
    with bank.rows([None] * 3):
        assert torch.equal(model(X), y)
        with bank.rows([None] * 2), pytest.raises(ValueError, match=r"\(3, 7\)"):
            model(input=X)
    assert not model._forward_hooks
    with bank.rows([None] * 6):
        assert model(torch.stack([X, X])).shape == (2, 3, 3)


# --- Adapters wider than the base -------------------------------------------------------


@KINDS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_beside_a_half_base_are_rounded_once(kind, half, autocast):
    layer = nn.Sequential(linear_layer(7, 6)).requires_grad_(False).to(half)
    exact = nn.Sequential(linear_layer(7, 6)).requires_grad_(False)
    exact.load_state_dict(layer.state_dict())
    alone = adapted(exact, kind).float()
    x = X.to(half)
    bank = AdapterBank(layer)
    bank.add("anna", alone)
    assert bank.size("anna") == 4 * sum(
        p.numel() for n, p in alone.named_parameters() if "linear" not in n
    )
    part = alone[0]
    A, B, s = part.lora.A, part.lora.B, part.lora.alpha
    c = (
        part.m / (part.linear.weight + s * (A @ B).T).norm(dim=1)
        if kind is (LinearWithDoRA)
        else torch.ones(6)
    )
    W, b = layer[0].weight, layer[0].bias
    with torch.autocast("cpu", dtype=half, enabled=autocast):
        update = s * (x.to(A.dtype) @ A @ B)
        if kind is LinearWithLoRA:
            expected = (F.linear(x, W, b) + update).to(half)
        else:
            inner = F.linear(x, W) + update
            expected = (c * inner.float() + b.float()).to(half)
        bank.activate("anna")
        outputs = {"one": layer(x)}
        with bank.rows(["anna", None, "anna"]):
            mixed = layer(x)
        bank.disable()
        plain = layer(x)
    assert plain.dtype == half
    assert torch.equal(mixed[1], plain[1])
    outputs["rows"] = torch.cat([mixed[:1], outputs["one"][1:2], mixed[2:]])
    for y in outputs.values():
        assert y.dtype == half
        # Sums in another order may round to the other neighbour.
        assert_close(y.float(), expected.float(), rtol=torch.finfo(half).eps)
    weight = (c.unsqueeze(1) * (W.float() + s * (A @ B).T)).to(half)
    bank.activate("anna")
    assert_close(layer[0].weight.float(), weight.float(), rtol=torch.finfo(half).eps)
    bank.merge()
    assert layer[0].weight.dtype == layer(x).dtype == half
    assert_close(layer(x).float(), F.linear(x, weight, b).float(), rtol=0.02)


def test_several_float32_adapters_beside_a_half_base_are_rounded_once():
    layer = base(torch.bfloat16)
    bank = AdapterBank(layer)
    models = [adapted(base(), kind, 3).float() for kind in (LinearWithLoRA,) * 2]
    for name, model in zip("ab", models, strict=True):
        bank.add(name, model)
    bank.activate("a", "b")
    x = X.to(torch.bfloat16)
    update = sum(model[0].lora(x.float()) for model in models)
    expected = (base(torch.bfloat16)[0](x) + update).to(torch.bfloat16)
    assert torch.equal(layer[0](x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_rows_of_the_base_are_its_own_to_the_last_bit_beside_dora(dtype):
    model = nn.Sequential(nn.Linear(256, 128)).requires_grad_(False).to(dtype)
    alone = nn.Sequential(nn.Linear(256, 128)).to(dtype)
    alone.load_state_dict(model.state_dict())
    x = normal(16, 256, dtype=dtype)
    plain = model(x)
    bank = AdapterBank(model)
    bank.add("anna", adapted(alone))
    with bank.rows(["anna", None] * 8):
        y = model(x)
    assert torch.equal(y[1::2], plain[1::2])
    assert not torch.allclose(y[::2], plain[::2])


# --- Where a weight is read -------------------------------------------------------------


class LooksAtWeight(nn.Module):
    """As T5's feed-forward layer does, it asks the dtype of a layer's weight."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = linear_layer(7, 6), linear_layer(6, 3, seed=3)

    def forward(self, x):
        hidden = torch.relu(self.wi(x))
        if isinstance(self.wo.weight, torch.Tensor):
            hidden = hidden.to(self.wo.weight.dtype)
        return self.wo(hidden)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_looks_at_a_weight_serves_mixed_batches(compiled, monkeypatch):
    plain, alone = LooksAtWeight(), adapted(LooksAtWeight())
    bank = AdapterBank(LooksAtWeight().requires_grad_(False))
    bank.add("anna", alone)
    expected = alone(X)
    torch.compiler.reset()
    model = torch.compile(bank.model, backend="eager") if compiled else bank.model
    if not compiled:
        layer = type(bank.model.wo)
        monkeypatch.delattr(layer, "formed_weight")
    with bank.rows(["anna", None, "anna"]):
        y = model(X)
    assert_close(y[::2], expected[::2])
    assert_close(y[1], plain(X)[1])
    bank.activate("anna")
    if not compiled:
        assert_close(model(X), expected)


def test_an_encoder_with_banked_feed_forward_layers_serves_mixed_batches():
    torch.manual_seed(1)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64), 2
    ).requires_grad_(False).eval()  # fmt: skip
    alone = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64), 2
    ).eval()
    alone.load_state_dict(model.state_dict())
    adapted(alone, targets="*.linear?")
    x = normal(3, 4, 8)
    plain = model(x)
    bank = AdapterBank(model)
    bank.add("anna", alone)
    assert_close(model(x), plain)
    with bank.rows(["anna", None, "anna"]):
        y = model(x)
    assert_close(y[1], plain[1])
    assert_close(y[::2], alone(x)[::2])
    merged = merge_adapters(alone)
    bank.activate("anna")
    assert_close(model(x), merged(x))


def test_a_bank_and_a_loaded_adapter_agree_after_conversion(bank, tmp_path):
    bank.model.float()
    save_adapter(adapted(base()).float(), tmp_path / "ben")
    bank.add("ben", tmp_path / "ben")
    loaded = base().float()
    load_adapter(loaded, tmp_path / "ben")
    bank.activate("ben")
    assert_close(bank.model(X.float()), loaded(X.float()), rtol=1e-5)
    bank.remove("anna")
    bank.remove("ben")
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in bank.model)
    assert bank.model[0].weight.dtype == torch.float32
