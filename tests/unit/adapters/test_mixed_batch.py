"""A batch in blocks: every row its own adapter's answer, in whatever way the rows are
sorted, and nothing of what is kept outlives what it came from."""

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close, linear_layer, move, normal
from torch import nn

from lowrank_utils.adapters import AdapterBank
from lowrank_utils.adapters.banked_linear import BankedAdapter
from lowrank_utils.adapters.mixed_batch import (
    Kept,
    Mixture,
    add_updates,
    block_size,
    layout_of,
)
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

IN, OUT = 7, 5


def adapter(number, rank=2, dtype=torch.float64):
    A = normal(IN, rank, seed=number, dtype=dtype)
    B = normal(rank, OUT, seed=50 + number, dtype=dtype)
    return BankedAdapter(A, B, 0.5 + number, None)


def expected(base, x, adapters, rows, batch_dim):
    y = base.clone().movedim(batch_dim, 0)
    for row, number in enumerate(rows):
        if number >= 0:
            y[row] += adapters[number].update(x.movedim(batch_dim, 0)[row])
    return y.movedim(0, batch_dim)


@given(data=st.data())
def test_each_row_gets_its_own_update_however_the_rows_are_sorted(data):
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 3, 9]), min_size=1, max_size=6))
    adapters = [adapter(number, rank) for number, rank in enumerate(ranks)]
    extra = data.draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=20))
    rows = data.draw(st.permutations([*range(len(ranks)), *extra]))
    positions = data.draw(st.lists(st.integers(0, 12), max_size=2))
    batch_dim = data.draw(st.integers(0, len(positions)))
    shape = [*positions[:batch_dim], len(rows), *positions[batch_dim:]]
    x, base = normal(*shape, IN, seed=90), normal(*shape, OUT, seed=91)
    right = expected(base, x, adapters, rows, batch_dim)
    in_place, before = data.draw(st.booleans()), base.clone()
    y = add_updates(
        base, x, Mixture(adapters, tuple(rows)), batch_dim, Kept(), in_place=in_place
    )
    assert_close(y, right, atol=1e-11)
    assert torch.equal(base, y if in_place else before)


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_long_rows_stay_where_they_are(batch_dim, autocast):
    adapters, rows = [adapter(i, dtype=torch.float32) for i in range(3)], [2, 0, 1, 2]
    shape = [4, 9] if batch_dim == 0 else [9, 4]
    x = normal(*shape, IN, dtype=torch.float32)
    base = normal(*shape, OUT, seed=1, dtype=torch.float32)
    right = expected(base, x, adapters, rows, batch_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = add_updates(
            base, x, Mixture(adapters, tuple(rows)), batch_dim, Kept(), in_place=True
        )
    assert y.dtype == torch.float32
    assert_close(y, right, rtol=0.03 if autocast else 1e-5, atol=0.1 * autocast)


@pytest.mark.parametrize(
    ("counts", "positions", "size"),
    [
        # As many blocks as adapters: no factors are copied.
        ([8] * 8, 1, 8),
        ([1] * 64, 1, 1),
        ([5, 7, 8], 1, 8),
        # One adapter has most of the rows: to fill all others up would cost more.
        ([57, 1, 1, 1, 1, 1, 1, 1], 1, 8),
        ([200, *[1] * 40], 1, 4),
        # Long rows stay where they are.
        ([8] * 8, 6, 8),
        ([8] * 8, 7, 0),
        ([2] * 8, 512, 0),
        ([1], 1, 1),
    ],
)
def test_the_rule(counts, positions, size):
    assert block_size(counts, positions) == size


def test_nothing_is_copied_where_rows_and_adapters_are_in_place():
    cpu = torch.device("cpu")
    long = layout_of((0, 1, 2), 3, 512, cpu)
    assert long == (None, None, None, None, 1)
    sorted_rows = layout_of((0, 0, 1, 1), 2, 1, cpu)
    assert sorted_rows == (None, None, None, None, 2)
    mixed = layout_of((1, -1, 0, 1), 2, 1, cpu)
    assert mixed.adapters is None
    assert [index.tolist() for index in mixed[1:4]] == [
        [2, 2, 0, 3],
        [2, 0, 3],
        [0, 2, 3],
    ]
    even = layout_of((1, 0, 0, 1), 2, 1, cpu)
    assert even.adapters is even.places is None
    assert even.rows.tolist() == even.adapted.tolist() == [1, 2, 0, 3]


def test_a_low_rank_is_filled_up_to_less_than_twice_its_size():
    adapters, kept = (
        [adapter(i, rank) for i, rank in enumerate([1, 2, 5, 8, 64])],
        Kept(),
    )
    mixture = Mixture(adapters, (0, 1, 2, 3, 4))
    add_updates(normal(5, OUT), normal(5, IN), mixture, 0, kept)
    stacks = [stacks for *_, stacks in kept._last.values()]
    assert sorted(A.shape[::2] for A, _ in stacks) == [(1, 1), (1, 2), (1, 64), (2, 8)]


def bank_of(*kinds, bias=True):
    bank = AdapterBank(nn.Sequential(linear_layer(IN, OUT, bias=bias)).eval())
    for number, kind in enumerate(kinds):
        source = nn.Sequential(kind(linear_layer(IN, OUT, bias=bias), 2, 1.0 + number))
        move(source[0], seed=10 * number)
        bank.add(str(number), source)
    return bank


def rows_of(bank, x, rows):
    with bank.rows(rows):
        return bank.model(x)


X = normal(6, IN, seed=3)
ROWS = ["0", None, "1", "0", "1", "0"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_numbers_that_are_not_finite_stay_in_the_rows_of_their_adapter(kind, bias):
    bank = bank_of(kind, kind, bias=bias)
    right = rows_of(bank, X, ROWS)
    (layer,) = bank.model
    for factor in layer.lora["1"].buffers():
        factor.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    y = rows_of(bank, X, ROWS)
    theirs = torch.tensor([row == "1" for row in ROWS])
    assert torch.equal(y[~theirs], right[~theirs])
    assert not torch.isfinite(y[theirs]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_rows_without_an_adapter_have_the_layers_bits_signs_of_zero_too(bias):
    bank = bank_of(LinearWithDoRA, bias=bias)
    linear, x = bank.model[0].linear, X.clone()
    with torch.no_grad():
        if bias:
            linear.bias[:2] = torch.tensor([-0.0, float("inf")])
        linear.weight[0] = 0.0
        x[1] = -x[1].abs()
    bank.model[0].remember_weight()  # as if it had always been so
    plain = linear(x)
    y = rows_of(bank, x, ["0", None, "0", None, "0", "0"])
    rows = [1, 3]
    assert torch.equal(y[rows].view(torch.int64), plain[rows].view(torch.int64))
    assert torch.isfinite(y[:, 2:]).all()


def test_rows_without_an_adapter_have_the_bits_of_a_large_layer():
    # At this size the bias is added in the middle of a sum.
    linear = linear_layer(1024, 64, dtype=torch.float32).requires_grad_(False)
    source = nn.Sequential(LinearWithDoRA(linear, 2, 1.0))
    move(source[0])
    bank = AdapterBank(nn.Sequential(linear).eval())
    bank.add("0", source)
    x = normal(64, 1024, dtype=torch.float32)
    y = rows_of(bank, x, [None, "0"] * 32)
    assert torch.equal(y[::2], linear(x)[::2])
    torch.testing.assert_close(y[1::2], source(x)[1::2], rtol=1e-4, atol=1e-4)


def test_two_kinds_in_other_mixes_keep_their_own_scales():
    kinds = LinearWithLoRA, LinearWithDoRA, LinearWithLoRA, LinearWithDoRA
    bank = bank_of(*kinds)
    alone = {}
    for name in bank.names:
        bank.activate(name)
        alone[name] = bank.model(X)
    bank.disable()
    for pair in itertools.permutations(bank.names, 2):
        y = rows_of(bank, X, [*pair] * 3)
        for row, name in enumerate([*pair] * 3):
            assert_close(y[row], alone[name][row])


class FunctionsSeen(torch.overrides.TorchFunctionMode):
    """Keep what functions return, as a tracer does."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            self.seen.append(output)
        return output


@pytest.mark.parametrize(
    ("by", "kind"),
    [
        ("its hook", LinearWithLoRA),
        ("a hook of all modules", LinearWithLoRA),
        ("a hook of all modules", LinearWithDoRA),
        ("a mode", LinearWithLoRA),
        ("a mode", LinearWithDoRA),
    ],
)
def test_an_output_that_somebody_holds_is_not_overwritten(by, kind):
    bank, seen = bank_of(kind, kind), []
    (layer,) = bank.model
    run, hook = contextlib.nullcontext(), None
    if by == "its hook":
        hook = layer.linear.register_forward_hook(lambda *a: seen.append(a[2]))
    elif by == "a hook of all modules":
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, _, y: seen.append(y) if module is layer.linear else None
        )
    else:
        run = FunctionsSeen(seen)
    try:
        with run, torch.no_grad():
            rows_of(bank, X, ROWS)
    finally:
        if hook is not None:
            hook.remove()
    assert torch.equal(seen[0], layer.linear(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_that_bans_a_class_stays_one(dtype):
    bank = bank_of(LinearWithDoRA, LinearWithLoRA)
    linear = bank.model[0].linear
    with torch.no_grad():
        linear.bias[:2] = torch.tensor([-float("inf"), 3e4])
        bank.model[0].lora["0"].c[:2] = torch.tensor([-2.0, 4.0])
    bank.model.to(dtype)
    bank.activate("0")
    alone = bank.model(X.to(dtype))
    bank.disable()
    y = rows_of(bank, X.to(dtype), ROWS)
    rows = [row == "0" for row in ROWS]
    assert_close(y[rows], alone[rows], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_gradients_reach_the_factors(kind):
    bank = bank_of(kind, LinearWithLoRA)
    A, found = bank.model[0].lora["0"].A.requires_grad_(), []
    for rows in (["0"] * 6, ["0", "1", None, "0", "1", None]):
        A.grad = None
        y = rows_of(bank, X, rows)
        y[[0, 3]].square().sum().backward()
        found.append(A.grad)
    assert_close(*found, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_transforms_and_backward_hooks_go_through(kind):
    bank = bank_of(kind, LinearWithDoRA)
    (layer,) = bank.model
    expected = rows_of(bank, X, ROWS)
    with bank.rows(ROWS):
        batched = torch.vmap(bank.model)(torch.stack([X, 2 * X]))
        y, tangent = torch.func.jvp(bank.model, (X,), (X,))
    assert_close(batched[0], expected)
    assert_close(y, expected)
    difference = rows_of(bank, X * (1 + 1e-6), ROWS) - rows_of(
        bank, X * (1 - 1e-6), ROWS
    )
    assert_close(tangent, difference / 2e-6, rtol=1e-6, atol=1e-6)
    layer.linear.bias.requires_grad_()
    rows_of(bank, X, ["0", "1"] * 3).sum().backward()
    assert_close(layer.linear.bias.grad, torch.full((OUT,), 6.0).double())
    if kind is LinearWithLoRA:
        bank = bank_of(kind, kind)
        bank.model[0].linear.register_full_backward_hook(lambda *_: None)
        rows_of(bank, X.clone().requires_grad_(), ROWS).sum().backward()


def test_gradients_reach_the_input():
    bank = bank_of(LinearWithDoRA, LinearWithLoRA)
    found = []
    for rows in (ROWS, [[row] for row in ROWS]):
        x = X.clone().requires_grad_()
        if rows is ROWS:
            y = rows_of(bank, x, rows)
        else:
            y = torch.cat(
                [rows_of(bank, x[i, None], row) for i, row in enumerate(rows)]
            )
        y.square().sum().backward()
        found.append(x.grad)
    assert_close(*found, atol=1e-12)


def changed_in_place(layer):
    layer.lora["0"].A.mul_(2)


def exchanged(layer):
    layer.lora["0"].A = layer.lora["0"].A * 2


def changed_scale(layer):
    layer.lora["1"].c.mul_(2)


def changed_alpha(layer):
    layer.lora["0"].alpha = 7.0


@pytest.mark.parametrize(
    "change", [changed_in_place, exchanged, changed_scale, changed_alpha]
)
def test_what_is_kept_follows_its_sources(change):
    bank = bank_of(LinearWithLoRA, LinearWithDoRA)
    before = rows_of(bank, X, ROWS)
    change(bank.model[0])
    after = rows_of(bank, X, ROWS)
    assert not torch.equal(after, before)
    bank.model[0].kept.clear()
    assert torch.equal(rows_of(bank, X, ROWS), after)


@pytest.mark.parametrize("event", ["add", "remove", "move", "copy", "others"])
def test_what_is_kept_is_dropped(event):
    bank = bank_of(LinearWithLoRA, LinearWithDoRA, LinearWithLoRA)
    (layer,) = bank.model
    rows_of(bank, X, ROWS)
    kept = [
        weakref.ref(stacks.A)
        for *_, stacks in layer.kept._last.values()
        if hasattr(stacks, "A")
    ]
    assert len(kept) == 1
    if event == "copy":
        assert copy.deepcopy(layer).kept._last == {}
        return
    if event == "add":
        bank.add("3", nn.Sequential(LinearWithLoRA(linear_layer(IN, OUT), 1, 1.0)))
    elif event == "remove":
        bank.remove("2")
    elif event == "others":
        rows_of(bank, X, ["2", None] * 3)
    else:
        bank.model.float()
    gc.collect()
    assert kept[0]() is None


def test_a_removed_adapter_is_refused_also_where_it_has_no_part(monkeypatch):
    model = nn.Sequential(linear_layer(IN, OUT), linear_layer(OUT, IN))
    bank = AdapterBank(model.requires_grad_(False).eval())
    plain = copy.deepcopy(model)
    for name, places in {"first": [0], "both": [0, 1]}.items():
        source = copy.deepcopy(plain)
        for index in places:
            source[index] = LinearWithLoRA(source[index], 1, 1.0)
        bank.add(name, source)
    second = model[1]
    with bank.rows(["first", "both"]):
        model(normal(2, IN))
        # As if the block had ended elsewhere in the meantime.
        monkeypatch.setattr(bank._selection, "user_of", lambda _: None)
        bank.remove("first")
        with pytest.raises(RuntimeError, match="was removed from the bank"):
            second(normal(2, OUT))


def test_what_inference_mode_has_made_serves_elsewhere():
    bank = bank_of(LinearWithLoRA, LinearWithDoRA)
    with torch.inference_mode():
        expected = rows_of(bank, X, ROWS)
    x = X.clone().requires_grad_()
    y = rows_of(bank, x, ROWS)
    y.sum().backward()
    assert_close(y, expected.clone())


def test_what_was_added_in_inference_mode_serves_too():
    with torch.inference_mode():
        bank = bank_of(LinearWithLoRA, LinearWithDoRA)
    with torch.no_grad():
        first, second = rows_of(bank, X, ROWS), rows_of(bank, X, ROWS)
    assert torch.equal(first, second)
    assert_close(first, rows_of(bank_of(LinearWithLoRA, LinearWithDoRA), X, ROWS))


def test_a_mode_without_numbers_leaves_none_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    bank = bank_of(LinearWithLoRA, LinearWithDoRA)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = rows_of(bank, mode.from_tensor(X), ROWS)
        assert y.shape == (6, OUT)
    assert torch.isfinite(rows_of(bank, X, ROWS)).all()
