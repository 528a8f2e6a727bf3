"""A bank: several adapters around one model, switched, together, per row, merged, and
gone without a trace."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from support import (
    DORA,
    LORA,
    Reference,
    array,
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
    torch.manual_seed(0)
    model = nn.Sequential(
        linear_layer(7, 6, dtype=dtype), nn.Tanh(), linear_layer(6, 5, bias=False, dtype=dtype, seed=3), nn.Tanh(),
        linear_layer(5, 3, dtype=dtype, seed=6),
    )  # fmt: skip
    return model.requires_grad_(False).eval()


def customer(number, kind=LinearWithDoRA, dtype=torch.float64, rank=None, targets=None):
    """Return the base model with an adapter of its own, moved as training would."""
    model = base()
    replace_linear_layers(model, kind, rank or 1 + number % 3, 0.3 + number, targets)
    freeze_linear_layers(model)
    move_all(model)
    with torch.no_grad():
        for index, parameter in enumerate(
            p for p in model.parameters() if p.requires_grad
        ):
            parameter.mul_(
                1 + 0.1 * normal(*parameter.shape, seed=100 * number + index)
            )
    return model.to(dtype).eval()


X = normal(6, 7, seed=50)
CUSTOMERS = {
    "anna": customer(1),
    "ben": customer(2, LinearWithLoRA),
    "cleo": customer(3, LinearWithDoRA, targets=["0", "4"]),
    "dora/../x y.": customer(4, LinearWithLoRA, targets="2"),
}


@pytest.fixture
def bank():
    bank = AdapterBank(base())
    for name, model in CUSTOMERS.items():
        bank.add(name, model)
    return bank


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_disabled_the_outputs_are_the_base_models_to_the_last_bit_in_any_dtype(dtype):
    plain = base(dtype)
    x = X.to(dtype)
    expected = plain(x)
    bank = AdapterBank(plain)
    bank.add("anna", customer(1, dtype=dtype))
    assert torch.equal(bank.model(x), expected)
    bank.activate("anna")
    assert not torch.equal(bank.model(x), expected)
    bank.disable()
    assert torch.equal(bank.model(x), expected)


def test_an_adapter_comes_from_a_folder_as_well(tmp_path):
    bank = AdapterBank(base())
    for name in ("anna", "ben"):
        save_adapter(CUSTOMERS[name], tmp_path / name)
        bank.add(name, tmp_path / name)
        bank.activate(name)
        loaded = base()
        load_adapter(loaded, str(tmp_path / name))
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
    bank = AdapterBank(base())
    for name, model in CUSTOMERS.items():
        bank.add(name, model)
    x = normal(len(names), 7, seed=seed)
    with bank.rows(names):
        y = bank.model(x)
    for row, name in enumerate(names):
        alone = base() if name is None else CUSTOMERS[name]
        assert_close(y[row], alone(x[row]), rtol=1e-12)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_sequences_and_gradients(kind, dtype):
    customers = {str(i): customer(i, kind, dtype) for i in range(3)}
    bank = AdapterBank(base(dtype))
    for name, model in customers.items():
        bank.add(name, model)
    # Small, for where tanh is saturated a gradient loses two digits to rounding.
    x = (0.02 * normal(4, 2, 3, 7, dtype=dtype)).requires_grad_()
    with bank.rows(["2", None, "0", "2"]):
        y = bank.model(x)
    y.pow(2).sum().backward()
    for row, alone in enumerate(
        [customers["2"], base(dtype), customers["0"], customers["2"]]
    ):
        single = x[row].detach().clone().requires_grad_()
        expected = alone(single)
        assert_equal_but_for_rounding(y[row], expected)
        expected.pow(2).sum().backward()
        assert_equal_but_for_rounding(x.grad[row], single.grad)


def test_rows_with_the_base_alone_are_the_base_models_to_the_last_bit(bank):
    with bank.rows([None] * 6):
        assert torch.equal(bank.model(X), base()(X))


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


def test_rows_must_fit_the_batch(bank):
    with (
        bank.rows(["anna"]),
        pytest.raises(
            ValueError, match=r"rows names 1 adapters, .*shape \(6, 7\): the first"
        ),
    ):
        bank.model(X)
    with (
        bank.rows(["anna"] * 7),
        pytest.raises(ValueError, match="the first dimension must be the batch's"),
    ):
        bank.model(X[0])
    with (
        pytest.raises(TypeError, match="one name per row; got the text 'anna'"),
        bank.rows("anna"),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match="there is no adapter 'zoe'; the bank has 'anna', 'ben'"
        ),
        bank.rows(["zoe"]),
    ):
        pass


class Attention(nn.Module):
    """A model that reads the weight of a layer instead of calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            8, 2, batch_first=True, dtype=torch.float64
        )

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_where_a_weight_is_read_one_adapter_works_and_rows_are_refused():
    torch.manual_seed(1)
    model = Attention().requires_grad_(False)
    adapted = copy.deepcopy(model)
    replace_linear_layers(adapted, LinearWithDoRA, 2, 1.0)
    freeze_linear_layers(move_all(adapted))
    bank = AdapterBank(model)
    bank.add("anna", adapted)
    x = normal(2, 3, 8)
    plain = bank.model(x)
    bank.activate("anna")
    assert_close(bank.model(x), adapted(x))
    assert not torch.allclose(bank.model(x), plain)
    with (
        bank.rows(["anna", None]),
        pytest.raises(
            RuntimeError,
            match=r"^this model reads a layer's weight instead of calling the layer \(nn\.MultiheadAttention does, "
            r"and torch's fast path for encoders in evaluation\); a weight can't differ between the rows of a batch$",
        ),
    ):
        bank.model(x)


# --- Several at once ------------------------------------------------------------------------


def effective(name, layer):
    """Return what adapter ``name`` makes of one layer's weight, in NumPy; the base
    weight if it has no part there."""
    module = CUSTOMERS[name].get_submodule(layer)
    if isinstance(module, nn.Linear):
        return array(module.weight)
    reference = Reference.of(module)
    return reference.c[:, None] * reference.V


def test_two_at_once_each_change_the_base_weight_as_if_they_were_alone(bank):
    bank.activate("anna", "cleo")
    for layer in ("0", "2", "4"):
        W = array(base().get_submodule(layer).weight)
        expected = W + sum(effective(name, layer) - W for name in ("anna", "cleo"))
        assert_close(bank.model.get_submodule(layer).weight, torch.from_numpy(expected))
        x = normal(3, W.shape[1])
        b = base().get_submodule(layer).bias
        assert_close(
            bank.model.get_submodule(layer)(x),
            F.linear(x, torch.from_numpy(expected), b),
        )


def test_the_norms_are_the_base_weights_and_not_those_of_the_weight_that_the_first_adapter_left(
    bank,
):
    layer = "0"
    bank.activate("anna", "cleo")
    one, two = (
        Reference.of(CUSTOMERS[name].get_submodule(layer)) for name in ("anna", "cleo")
    )
    W1 = one.c[:, None] * one.V
    V = W1 + two.s * (two.A @ two.B).T
    one_after_the_other = two.m[:, None] * V / ((V**2).sum(axis=1) ** 0.5)[:, None]
    assert (
        abs(array(bank.model.get_submodule(layer).weight) - one_after_the_other).max()
        > 0.1
    )


@pytest.mark.parametrize(
    "names",
    [("anna", "cleo"), ("anna", "ben"), ("ben", "dora/../x y."), tuple(CUSTOMERS)],
)
def test_the_order_does_not_matter_and_merging_gives_the_same(bank, names):
    bank.activate(*names)
    expected = bank.model(X)
    bank.activate(*reversed(names))
    assert_close(bank.model(X), expected)
    bank.merge()
    assert_close(bank.model(X), expected)


def test_two_loras_add_up():
    bank = AdapterBank(base())
    customers = [customer(i, LinearWithLoRA) for i in (1, 2)]
    for name, model in zip("ab", customers, strict=True):
        bank.add(name, model)
    bank.activate("a", "b")
    W = base()[0].weight
    expected = W + sum(model[0].lora.delta_weight() for model in customers)
    assert_close(bank.model[0].weight, expected)


# --- Merging --------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_merging_and_restoring_many_times_changes_no_bit(kind, dtype):
    plain = base(dtype)
    before, x = snapshot(plain), X.to(dtype)
    bank = AdapterBank(plain)
    bank.add("anna", customer(1, kind, dtype))
    bank.activate("anna")
    unmerged = bank.model(x)
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
    bank.remove("anna")
    assert_same_state(bank.model, before)


def test_merged_layers_make_one_product_and_nothing_else(bank):
    bank.activate("anna")
    bank.merge()
    layer = bank.model[0]
    assert torch.equal(layer(X), F.linear(X, layer.weight, layer.bias))


def test_a_merged_bank_refuses_to_change(bank):
    with pytest.raises(
        ValueError,
        match=r"^no adapter is active, so there is nothing to merge; call activate first$",
    ):
        bank.merge()
    bank.activate("anna")
    bank.merge()
    calls = {
        "merge": bank.merge,
        "activate": lambda: bank.activate("ben"),
        "remove": lambda: bank.remove("anna"),
    }
    for name, call in calls.items():
        with pytest.raises(
            RuntimeError, match=f"^{name}: the weights are merged; call restore first$"
        ):
            call()
    with pytest.raises(
        RuntimeError, match=r"the weights are merged; call restore first$"
    ):
        bank.disable()
    with (
        pytest.raises(
            RuntimeError, match=r"^rows: the weights are merged; call restore first$"
        ),
        bank.rows(["ben"] * 6),
    ):
        pass
    assert bank.active == ["anna"]
    bank.restore()
    bank.restore()
    bank.activate("ben")


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


@pytest.mark.filterwarnings("ignore")
@KINDS
def test_a_customer_costs_the_bytes_of_its_adapter(kind, tmp_path):
    save_adapter(customer(2, kind), tmp_path / "ben")
    numbers = sum(p.numel() for p in customer(2, kind).parameters() if p.requires_grad)
    bank = AdapterBank(base())
    bank.add("first", tmp_path / "ben")
    before = tensor_bytes()
    for count in range(1, 4):
        bank.add(f"customer {count}", tmp_path / "ben")
        assert tensor_bytes() - before == count * 8 * numbers
        assert bank.size(f"customer {count}") == 8 * numbers
    for count in range(1, 4):
        bank.remove(f"customer {count}")
    assert tensor_bytes() == before


# --- A module like any other ----------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_the_state_dict_is_the_base_models(bank, merged):
    if merged:
        bank.activate("anna")
        bank.merge()
    names = {
        name.replace(".linear.", "."): tensor
        for name, tensor in bank.model.state_dict().items()
    }
    assert names.keys() == base().state_dict().keys()
    assert all(
        torch.equal(names[name], tensor) for name, tensor in base().state_dict().items()
    )


def test_base_weights_cannot_be_loaded_under_the_adapters(bank):
    message = (
        "the base model's weights can't be loaded while a bank has adapters in it: each c was computed from "
        "the weights as they are. Remove the adapters, load, and add them again"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        bank.model.load_state_dict(bank.model.state_dict())


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
    assert [name for name, p in plain.named_parameters() if p.requires_grad] == [
        "4.linear.weight"
    ]
    bank.remove("anna")
    assert {module.training for module in plain.modules()} == {training}


def test_under_autocast_the_dtype_is_that_of_a_linear_layer():
    bank = AdapterBank(base(torch.float32))
    bank.add("anna", customer(1, dtype=torch.float32))
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.activate("anna")
        assert bank.model[0](x).dtype == torch.bfloat16
        with bank.rows(["anna", None] * 3):
            assert bank.model[0](x).dtype == torch.bfloat16


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


def wider(index=0):
    model = nn.Sequential(
        linear_layer(7, 6), nn.Tanh(), linear_layer(6, 9), nn.Tanh(), linear_layer(9, 3)
    )
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, str(index))
    return model


def elsewhere():
    model = nn.Sequential(linear_layer(7, 6), linear_layer(6, 6))
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, "1")
    return model


def longer():
    model = nn.Sequential(*base(), nn.Tanh(), linear_layer(3, 3))
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, "6")
    return model


@pytest.mark.parametrize(
    ("name", "source", "error", "pattern"),
    [
        (
            "anna",
            customer(1),
            ValueError,
            "'anna' is in the bank already; remove it first",
        ),
        (
            "",
            customer(1),
            TypeError,
            "name must be a text of one letter or more; got ''",
        ),
        (3, customer(1), TypeError, "got 3"),
        ("zoe", base(), ValueError, "has no adapters inside"),
        (
            "zoe",
            wider(2),
            ValueError,
            r"2 is adapted for a weight of shape \(9, 6\); .* shape \(5, 6\)",
        ),
        (
            "zoe",
            longer(),
            ValueError,
            r"6 is adapted for a weight of shape \(3, 3\); the base model has no such layer",
        ),
        (
            "zoe",
            elsewhere(),
            ValueError,
            r"1 is adapted for a weight of shape \(6, 6\); the base model has a Tanh$",
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
    model = wider(2)
    freeze_linear_layers(model)
    save_adapter(model, tmp_path / "wide")
    unchanged(
        bank, lambda: bank.add("zoe", tmp_path / "wide"), AdapterFileError, "shape"
    )


def test_rounding_is_refused_unless_asked_for(tmp_path):
    bank = AdapterBank(base(torch.bfloat16))
    save_adapter(customer(1), tmp_path / "anna")
    for source in (customer(1), tmp_path / "anna"):
        unchanged(
            bank,
            lambda s=source: bank.add("anna", s),
            ValueError,
            "would be rounded to .*may_round=True",
        )
    for name, source in {"a": customer(1), "b": tmp_path / "anna"}.items():
        bank.add(name, source, may_round=True)
        assert bank.size(name) == 2 * sum(
            p.numel() for p in customer(1).parameters() if p.requires_grad
        )


def test_unknown_names_and_repetitions_are_refused(bank):
    for call in (bank.activate, bank.remove, bank.size):
        unchanged(
            bank,
            lambda c=call: c("zoe"),
            ValueError,
            "there is no adapter 'zoe'; the bank has 'anna', 'ben'",
        )
    unchanged(
        bank,
        lambda: bank.activate("ben", "ben"),
        ValueError,
        "each adapter can be active once; got ben, ben",
    )
    with pytest.raises(ValueError, match="the bank has none"):
        AdapterBank(base()).activate("zoe")


@pytest.mark.parametrize(
    ("model", "error", "pattern"),
    [
        ("model", TypeError, r"model must be an nn\.Module; got str"),
        (
            nn.Linear(3, 2),
            ValueError,
            "model is itself a Linear; a bank needs a module with layers inside",
        ),
        (
            customer(1)[0],
            ValueError,
            "model is itself a LinearWithDoRA; a bank needs a module with layers inside",
        ),
        (
            customer(1),
            ValueError,
            "already adapted: 0, 2, 4; a bank needs the plain base model",
        ),
    ],
)
def test_a_bank_needs_a_plain_model(model, error, pattern):
    with pytest.raises(error, match=pattern):
        AdapterBank(model)


def test_a_layer_that_the_base_model_uses_twice_is_refused_by_its_name():
    shared = linear_layer(5, 5)
    bank = AdapterBank(nn.Sequential(shared, nn.Tanh(), shared, linear_layer(5, 3)))
    source = nn.Sequential(
        *(linear_layer(5, 5), nn.Tanh(), linear_layer(5, 5), linear_layer(5, 3))
    )
    replace_linear_layers(source, LinearWithLoRA, 2, 1.0, ["2", "3"])
    pattern = (
        "^2 is used in several places of the base model, which a bank can't adapt$"
    )
    unchanged(bank, lambda: bank.add("anna", source), ValueError, pattern)


def test_a_second_bank_on_the_same_model_is_refused(bank):
    with pytest.raises(ValueError, match="already adapted: 0, 2, 4"):
        AdapterBank(bank.model)


def test_both_kinds_of_adapters_are_covered():
    kinds = {type(module) for model in CUSTOMERS.values() for module in model}
    assert kinds >= {LORA[0], DORA[0]}
