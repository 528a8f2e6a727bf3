"""A bank: several adapters around one model, switched, together, per row, merged, and
gone without a trace."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from support import (
    Reference,
    assert_close,
    assert_equal_but_for_rounding,
    assert_same_state,
    linear_layer,
    move_all,
    normal,
    snapshot,
)
from torch import nn

from lowrank_utils.adapt import (
    count_parameters,
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank, load_adapter, save_adapter
from lowrank_utils.adapters.config import AdapterFileError
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.promises import constant_weights

KINDS = pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])


def base(dtype=torch.float64):
    first, second, third = (
        linear_layer(7, 6, dtype=dtype),
        linear_layer(6, 5, bias=False, dtype=dtype, seed=3),
        linear_layer(5, 3, dtype=dtype, seed=6),
    )
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    return model.requires_grad_(False).eval()


def customer(number, kind=LinearWithDoRA, dtype=torch.float64, targets=None):
    """Return the base model with an adapter of its own, moved as training would."""
    model = base()
    replace_linear_layers(model, kind, 1 + number % 3, 0.3 + number, targets)
    freeze_linear_layers(move_all(model))
    with torch.no_grad():
        for index, parameter in enumerate(trainable(model)):
            factors = normal(*parameter.shape, seed=100 * number + index)
            parameter.mul_(1 + 0.1 * factors)
    return model.to(dtype).eval()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


X = normal(6, 7, seed=50)
CUSTOMERS = {
    "anna": customer(1),
    "ben": customer(2, LinearWithLoRA),
    "cleo": customer(3, targets=["0", "4"]),
    "dora/../x y.": customer(4, LinearWithLoRA, targets="2"),
}


def bank_of(customers, dtype=torch.float64):
    bank = AdapterBank(base(dtype))
    for name, model in customers.items():
        bank.add(name, model)
    return bank


@pytest.fixture
def bank():
    return bank_of(CUSTOMERS)


def test_adapters_are_added_switched_disabled_and_removed(bank):
    plain = base()
    expected = plain(X)
    assert bank.names == list(CUSTOMERS)
    assert torch.equal(bank.model(X), expected)
    for _ in range(2):
        for name, model in CUSTOMERS.items():
            bank.activate(name)
            assert bank.active == [name]
            assert_close(bank.model(X), model(X))
            assert not torch.allclose(bank.model(X), expected)
        bank.disable()
        assert bank.active == []
        assert torch.equal(bank.model(X), expected)
    bank.remove("anna")
    assert bank.names == ["ben", "cleo", "dora/../x y."]
    for name in bank.names:
        bank.remove(name)
    assert [type(m) for m in bank.model.modules()] == [type(m) for m in plain.modules()]
    assert_same_state(bank.model, snapshot(plain))
    assert torch.equal(bank.model(X), expected)


def test_an_active_adapter_can_be_removed(bank):
    bank.activate("anna", "ben")
    bank.remove("anna")
    assert bank.active == ["ben"]
    assert_close(bank.model(X), CUSTOMERS["ben"](X))


def test_an_adapter_comes_from_a_folder_as_well(tmp_path):
    bank, loaded = AdapterBank(base()), base()
    save_adapter(CUSTOMERS["anna"], tmp_path / "anna")
    bank.add("anna", tmp_path / "anna")
    bank.activate("anna")
    load_adapter(loaded, str(tmp_path / "anna"))
    assert_close(bank.model(X), loaded(X))


def test_the_bank_holds_copies(bank):
    model = customer(5)
    bank.add("eve", model)
    bank.activate("eve")
    expected = bank.model(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert torch.equal(bank.model(X), expected)


# --- A different adapter for each row ---------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([None, *CUSTOMERS]), min_size=1, max_size=8),
    st.integers(0, 1000),
)
def test_every_row_gets_its_own_adapter(names, seed):
    bank, x = bank_of(CUSTOMERS), normal(len(names), 7, seed=seed)
    with bank.rows(names):
        y = bank.model(x)
    for row, name in enumerate(names):
        alone = base() if name is None else CUSTOMERS[name]
        assert_close(y[row], alone(x[row]), rtol=1e-12)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_sequences_and_gradients(kind, dtype):
    customers = {str(i): customer(i, kind, dtype) for i in range(3)}
    bank, names = bank_of(customers, dtype), ["2", None, "0", "2"]
    # Small, for where tanh is saturated a gradient loses two digits to rounding.
    x = (0.02 * normal(4, 2, 3, 7, dtype=dtype)).requires_grad_()
    with bank.rows(names):
        y = bank.model(x)
    y.pow(2).sum().backward()
    for row, name in enumerate(names):
        single = x[row].detach().clone().requires_grad_()
        expected = customers.get(name, base(dtype))(single)
        assert_equal_but_for_rounding(y[row], expected)
        expected.pow(2).sum().backward()
        assert_equal_but_for_rounding(x.grad[row], single.grad)


def test_after_the_block_what_was_active_is_active_again_also_after_an_error(bank):
    bank.activate("ben")
    expected = bank.model(X)
    with bank.rows(["anna"] * 6):
        assert_close(bank.model(X), CUSTOMERS["anna"](X))
        with bank.rows([None] * 6):
            assert torch.equal(bank.model(X), base()(X))
        assert_close(bank.model(X), CUSTOMERS["anna"](X))
    assert torch.equal(bank.model(X), expected)
    with pytest.raises(ZeroDivisionError), bank.rows(["anna"]):
        raise ZeroDivisionError
    assert torch.equal(bank.model(X), expected)


@pytest.mark.parametrize(
    ("names", "x", "error", "pattern"),
    [
        (
            ["anna"],
            X,
            ValueError,
            r"rows names 1 adapters, .*shape \(6, 7\): the first",
        ),
        (["anna"] * 7, X[0], ValueError, "the first dimension must be the batch's"),
        ("anna", X, TypeError, "one name per row; got the text 'anna'"),
        (["zoe"], X, ValueError, "no adapter 'zoe'; the bank has 'anna', 'ben'"),
    ],
)
def test_rows_must_fit_the_batch(bank, names, x, error, pattern):
    with pytest.raises(error, match=pattern), bank.rows(names):
        bank.model(x)


class Attention(nn.Module):
    """A model that reads the weight of a layer instead of calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_where_a_weight_is_read_one_adapter_works_and_rows_are_refused():
    torch.manual_seed(1)
    model = Attention().requires_grad_(False)
    adapted = copy.deepcopy(model)
    replace_linear_layers(adapted, LinearWithDoRA, 2, 1.0)
    freeze_linear_layers(move_all(adapted))
    bank, x = AdapterBank(model), normal(2, 3, 8)
    bank.add("anna", adapted)
    plain = bank.model(x)
    bank.activate("anna")
    assert_close(bank.model(x), adapted(x))
    assert not torch.allclose(bank.model(x), plain)
    message = (
        r"^this model reads a layer's weight .* \(nn\.MultiheadAttention does, and torch's "
        r"fast path .* a weight can't differ between the rows of a batch. Adapt the layers that are called alone, or serve one adapter at a time with activate$"
    )
    with bank.rows(["anna", None]), pytest.raises(RuntimeError, match=message):
        bank.model(x)


# --- Several at once, and merging -------------------------------------------------------------


def change(name, layer):
    """Return how adapter ``name`` changes one layer's weight, DoRA's in NumPy."""
    module = CUSTOMERS[name].get_submodule(layer)
    if isinstance(module, nn.Linear):
        return 0
    if isinstance(module, LinearWithLoRA):
        return module.lora.delta_weight()
    reference = Reference.of(module)
    return torch.from_numpy(reference.c[:, None] * reference.V - reference.W)


@pytest.mark.parametrize(
    "names",
    [("anna", "cleo"), ("anna", "ben"), ("ben", "dora/../x y."), tuple(CUSTOMERS)],
)
def test_several_at_once_each_change_the_base_weight_as_if_they_were_alone(bank, names):
    bank.activate(*names)
    expected = bank.model(X)
    for name, plain in base().named_children():
        if not isinstance(plain, nn.Linear):
            continue
        W = plain.weight + sum(change(adapter, name) for adapter in names)
        layer, x = bank.model.get_submodule(name), normal(3, plain.in_features)
        assert_close(layer.weight, W)
        assert_close(layer(x), F.linear(x, W, plain.bias))
    bank.activate(*reversed(names))
    assert_close(bank.model(X), expected)
    bank.merge()
    assert_close(bank.model(X), expected)
    # A merged layer makes one product and nothing else.
    layer = bank.model[0]
    assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias))


@KINDS
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_merging_and_restoring_many_times_changes_no_bit(kind, dtype):
    plain, x = base(dtype), X.to(dtype)
    bank = bank_of({"anna": customer(1, kind, dtype)}, dtype)
    assert torch.equal(bank.model(x), plain(x))
    bank.activate("anna")
    unmerged = bank.model(x)
    assert not torch.equal(unmerged, plain(x))
    merged = None
    for _ in range(10):
        bank.merge()
        assert bank.is_merged
        assert merged is None or torch.equal(bank.model(x), merged)
        merged = bank.model(x)
        bank.restore()
        assert not bank.is_merged
        assert torch.equal(bank.model(x), unmerged)
    assert_close(merged, unmerged, rtol={2: 0.05, 4: 1e-5, 8: 1e-12}[dtype.itemsize])
    bank.disable()
    assert torch.equal(bank.model(x), plain(x))
    bank.remove("anna")
    assert_same_state(bank.model, snapshot(plain))


def test_a_merged_bank_refuses_to_change(bank):
    message = (
        "^no adapter is active, so there is nothing to merge; call activate first$"
    )
    with pytest.raises(ValueError, match=message):
        bank.merge()
    bank.activate("anna")
    bank.merge()
    for name, call in {
        "merge": bank.merge,
        "activate": lambda: bank.activate("ben"),
        "(activate|disable)": bank.disable,
        "remove": lambda: bank.remove("anna"),
        "rows": bank.rows(["ben"] * 6).__enter__,
    }.items():
        message = f"^{name}: the weights are merged; call restore first$"
        with pytest.raises(RuntimeError, match=message):
            call()
    assert bank.active == ["anna"]
    bank.restore()
    bank.restore()
    bank.activate("ben")
    assert bank.active == ["ben"]


# --- Memory ---------------------------------------------------------------------------------


def tensor_bytes():
    """Return the bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter)
    }
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@KINDS
def test_a_customer_costs_the_bytes_of_its_adapter(kind, tmp_path):
    save_adapter(customer(2, kind), tmp_path)
    size = 8 * sum(p.numel() for p in trainable(customer(2, kind)))
    bank = AdapterBank(base())
    bank.add("first", tmp_path)
    before, names = tensor_bytes(), ["one", "two", "three"]
    for count, name in enumerate(names, start=1):
        bank.add(name, tmp_path)
        assert tensor_bytes() - before == count * size
        assert bank.size(name) == size
    for name in names:
        bank.remove(name)
    assert tensor_bytes() == before


# --- A module like any other ----------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_the_state_dict_is_the_base_models_and_none_can_be_loaded(bank, merged):
    if merged:
        bank.activate("anna")
        bank.merge()
    state, expected = bank.model.state_dict(), base().state_dict()
    names = {name.replace(".linear.", "."): tensor for name, tensor in state.items()}
    assert names.keys() == expected.keys()
    assert all(torch.equal(names[name], expected[name]) for name in expected)
    message = (
        "^the base model's weights can't be loaded .* each c was computed from the weights "
        "as they are. Remove the adapters, load, and add them again$"
    )
    with pytest.raises(RuntimeError, match=message):
        bank.model.load_state_dict(state)


def test_the_adapters_follow_the_model_to_another_dtype(bank):
    bank.activate("anna")
    expected = bank.model(X)
    bank.model.float()
    assert_close(bank.model(X.float()), expected, rtol=1e-5)
    bank.merge()
    bank.model.double()
    assert_close(bank.model(X), expected, rtol=1e-5)


def test_the_adapters_follow_the_model_to_another_device_by_rows_too(bank):
    bank.model.to("meta")
    with bank.rows(["anna", None, "ben"] * 2):
        y = bank.model(X.to("meta"))
    assert y.is_meta
    assert y.shape == (6, 3)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_requires_grad_of_the_base_stay(training):
    plain = base().train(training)
    plain[4].weight.requires_grad_(True)
    bank = AdapterBank(plain)
    bank.add("anna", CUSTOMERS["anna"])
    assert {module.training for module in plain.modules()} == {training}
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    assert [name for name in flags if flags[name]] == ["4.linear.weight"]
    bank.remove("anna")
    assert {module.training for module in plain.modules()} == {training}


def test_under_autocast_the_dtype_is_that_of_a_linear_layer():
    bank = bank_of({"anna": customer(1, dtype=torch.float32)}, torch.float32)
    bank.activate("anna")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bank.model[0](X.float()).dtype == torch.bfloat16
        with bank.rows(["anna", None] * 3):
            assert bank.model[0](X.float()).dtype == torch.bfloat16


def test_the_functions_of_adapt_know_a_banked_layer(bank):
    with pytest.raises(ValueError, match="already adapted: 0, 2, 4"):
        replace_linear_layers(bank.model, LinearWithLoRA, 2, 1.0)
    assert count_parameters(bank.model).per_layer.keys() == {"0", "2", "4"}
    bank.activate("anna")
    merged = merge_adapters(bank.model)
    assert [type(m) for m in merged] == [type(m) for m in base()]
    assert_close(merged(X), CUSTOMERS["anna"](X))
    with torch.no_grad(), constant_weights(bank.model):
        assert_close(bank.model(X), CUSTOMERS["anna"](X))


# --- Refusals -------------------------------------------------------------------------------


def unchanged(bank, call, error, pattern):
    modules, before = list(bank.model.modules()), snapshot(bank.model)
    names, active = bank.names, bank.active
    with pytest.raises(error, match=pattern):
        call()
    assert (bank.names, bank.active) == (names, active)
    assert all(a is b for a, b in zip(bank.model.modules(), modules, strict=True))
    assert_same_state(bank.model, before)


def adapted(*layers, target):
    model = nn.Sequential(*layers)
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, target)
    freeze_linear_layers(model)
    return model


def wider():
    layers = linear_layer(7, 6), nn.Tanh(), linear_layer(6, 9), nn.Tanh()
    return adapted(*layers, linear_layer(9, 3), target="2")


@pytest.mark.parametrize(
    ("name", "source", "error", "pattern"),
    [
        ("anna", customer(1), ValueError, "'anna' is in the bank already; remove it"),
        ("", customer(1), TypeError, "name must be a text of .*; got ''"),
        (3, customer(1), TypeError, "name must be a text of .*; got 3"),
        ("zoe", base(), ValueError, "has no adapters inside"),
        ("zoe", wider(), ValueError, r"2 is .* \(9, 6\); .* has a linear.* \(5, 6\)"),
        (
            "zoe",
            adapted(*base(), nn.Tanh(), linear_layer(3, 3), target="6"),
            ValueError,
            r"6 is adapted for .* \(3, 3\); the base model has no such layer",
        ),
        (
            "zoe",
            adapted(linear_layer(7, 6), linear_layer(6, 6), target="1"),
            ValueError,
            r"1 is adapted for .* \(6, 6\); the base model has a Tanh$",
        ),
        ("zoe", "/nowhere", FileNotFoundError, "isn't a folder"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_changes(
    bank, name, source, error, pattern
):
    bank.activate("ben")
    unchanged(bank, lambda: bank.add(name, source), error, pattern)


def test_a_wrong_folder_is_refused_and_nothing_changes(bank, tmp_path):
    save_adapter(wider(), tmp_path)
    unchanged(bank, lambda: bank.add("zoe", tmp_path), AdapterFileError, "shape")


def test_rounding_is_refused_unless_asked_for(tmp_path):
    bank = AdapterBank(base(torch.bfloat16))
    save_adapter(customer(1), tmp_path)
    numbers = sum(p.numel() for p in trainable(customer(1)))
    for name, source in {"a": customer(1), "b": tmp_path}.items():
        call = lambda s=source: bank.add("c", s)  # noqa: E731
        unchanged(bank, call, ValueError, "would be rounded to .*may_round=True")
        bank.add(name, source, may_round=True)
        assert bank.size(name) == 4 * numbers


def test_unknown_names_and_repetitions_are_refused(bank):
    unknown = "there is no adapter 'zoe'; the bank has 'anna', 'ben'"
    for call in (bank.activate, bank.remove, bank.size):
        unchanged(bank, lambda c=call: c("zoe"), ValueError, unknown)
    twice = "each adapter can be active once; got ben, ben"
    unchanged(bank, lambda: bank.activate("ben", "ben"), ValueError, twice)
    with pytest.raises(ValueError, match="the bank has none"):
        AdapterBank(base()).activate("zoe")


@pytest.mark.parametrize(
    ("model", "error", "pattern"),
    [
        ("model", TypeError, r"model must be an nn\.Module; got str"),
        (nn.Linear(3, 2), ValueError, "model is itself a Linear; a bank needs"),
        (customer(1)[0], ValueError, "model is itself a LinearWithDoRA; a bank needs"),
        (customer(1), ValueError, "already adapted: 0, 2, 4; a bank needs the plain"),
        # The model of another bank counts as adapted.
        (bank_of(CUSTOMERS).model, ValueError, "already adapted: 0, 2, 4"),
    ],
)
def test_a_bank_needs_a_plain_model(model, error, pattern):
    with pytest.raises(error, match=pattern):
        AdapterBank(model)


def test_a_layer_that_the_base_model_uses_twice_is_refused_by_its_name():
    shared, two, three, last = (linear_layer(5, n) for n in (5, 5, 5, 3))
    bank = AdapterBank(nn.Sequential(shared, nn.Tanh(), shared, last))
    source = adapted(two, nn.Tanh(), three, last, target="[23]")
    pattern = "^2 is used in several places of the base model"
    unchanged(bank, lambda: bank.add("anna", source), ValueError, pattern)
