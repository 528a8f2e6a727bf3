"""The row norms that DoRA divides by: two ways that agree, the rule between them, and
norms that are kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from support import assert_close, linear_layer, move, moved, normal
from torch import nn

from lowrank_utils import dora, norms
from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged, scale_and_bias
from lowrank_utils.norms import factored_norm_pays, factored_row_norms, formed_row_norms
from lowrank_utils.promises import constant_weights, frozen_weights

LARGE = (512, 600)
X = normal(3, LARGE[0], dtype=torch.float32)


def exact(W, A, B, alpha):
    return row_norms(W.double() + alpha * (A.double() @ B.double()).T)


def factors(in_dim, out_dim, rank, seed=0, dtype=torch.float64):
    shapes = (out_dim, in_dim), (in_dim, rank), (rank, out_dim)
    return [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def relative_error(actual, expected):
    return ((actual - expected).abs() / expected).max()


@pytest.fixture
def computed(monkeypatch):
    """Note which way norms are computed, once for each time."""
    calls = []
    for name in ("factored_row_norms", "formed_row_norms", "row_norms"):
        function = getattr(dora, name)
        monkeypatch.setattr(
            dora, name, lambda *a, f=function, n=name: calls.append(n) or f(*a)
        )
    return calls


def large_layer(dtype=torch.float32, rank=8, **options):
    """A layer above the rule's size, moved as training would: ΔW about as long as W."""
    layer = LinearWithDoRA(linear_layer(*LARGE, dtype=dtype), rank, 0.5, **options)
    move(layer)
    with torch.no_grad():
        layer.lora.A /= rank**0.5
    return layer


# --- The factored way -----------------------------------------------------------------------


@given(
    *[st.integers(1, 20), st.integers(1, 20), st.integers(1, 5)],
    st.sampled_from([0.3, 1.0, -2.5]),
    st.integers(0, 10**6),
)
def test_both_ways_agree(in_dim, out_dim, rank, alpha, seed):
    given = [*factors(in_dim, out_dim, rank, seed), alpha]
    assert_close(factored_row_norms(*given), exact(*given), rtol=1e-13)


@pytest.mark.parametrize("size", [(1024, 300), (4096, 64)])
def test_both_ways_agree_in_float32(size):
    given = [*factors(*size, 8, dtype=torch.float32), 0.4]
    actual = factored_row_norms(*given)
    assert actual.dtype == torch.float32
    assert relative_error(actual, exact(*given)) < 2e-6


@pytest.mark.parametrize("left", [0.7, 0.3, 0.1, 1e-2, 1e-3, 1e-5])
def test_rows_that_the_update_takes_away_keep_their_digits(left):
    # B's rows are W's, so s = left − 1 shortens a row to a fraction of W's; only half
    # the rows.
    A, s = torch.linalg.qr(normal(700, 8))[0].float(), left - 1
    B = normal(8, 40, seed=1).float()
    W = (A @ B).T.contiguous()
    B[:, ::2] = 0
    expected = exact(W, A, B, s)
    # A float32 V has digits to lose too: what is left of W after a subtraction.
    assert relative_error(factored_row_norms(W, A, B, s), expected) < 1e-6 / left
    assert (expected[1::2] < 0.999 * row_norms(W)[1::2]).all()
    if left == 1e-3:
        # The formula alone would lose them.
        update = 2 * s * F.linear(A.T, W) + s**2 * (A.T @ A @ B)
        squares = row_norms(W).float() ** 2 + (update * B).sum(0)
        assert relative_error(squares.clamp(min=0).sqrt(), expected) > 0.01


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_rows_whose_squares_leave_the_range_of_float32(scale):
    W, A, B = factors(700, 6, 2)
    W, A, B = (W * scale).float(), A.float(), (B * scale).float()
    W[3] = B[:, 3] = 0
    actual = factored_row_norms(W, A, B, 0.1)
    torch.testing.assert_close(actual.double(), exact(W, A, B, 0.1), rtol=1e-5, atol=0)
    assert actual[3] == 0


def test_which_rows_are_computed_from_the_updated_weight():
    # With squares that aren't those of W, one sees which rows come from them.
    squares, largest, least = [4.0, 4.1], 2.0**127 * (2 - 2**-23), 2.0**-126
    squares += [largest, largest / 2, least, 2 * least, float("inf"), float("nan")]
    W, A = torch.tensor([2.0, 5.0]).expand(8, 2), torch.tensor([[1.0], [0.0]])
    B = torch.tensor([[-1.0, -1.0, 0, 0, 0, 0, 0, 0]])
    actual, formed = factored_row_norms(W, A, B, 1.0, torch.tensor(squares)), 29**0.5
    sums = [26**0.5, 1.1**0.5, formed, (largest / 2) ** 0.5]
    sums += [formed, (2 * least) ** 0.5, formed, formed]
    torch.testing.assert_close(actual, torch.tensor(sums), rtol=1e-6, atol=0)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_the_layer_gives_the_merged_forms_outputs_and_gradients(
    joined, bias, batch, monkeypatch, computed
):
    # The factored way at any size, so that small examples reach it.
    monkeypatch.setattr(dora, "factored_norm_pays", lambda *_: True)
    monkeypatch.setattr(dora, "_joining_pays", lambda *_: joined)
    x, G, found = normal(*batch, 7, seed=20), normal(*batch, 5, seed=21), []
    for cls in (LinearWithDoRA, LinearWithDoRAMerged):
        layer, inputs = moved(cls, linear_layer(bias=bias), rank=2), x.clone()
        layer.linear.weight.requires_grad_(not joined)
        y = layer(inputs.requires_grad_())
        (y * G).sum().backward()
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        found.append([y, inputs.grad, *trained])
    assert computed == ["factored_row_norms", "row_norms"]
    for fast, plain in zip(*found, strict=True):
        assert_close(fast, plain, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_layer_gives_the_merged_forms_outputs_and_a_frozen_weight_no_gradient(
    dtype,
):
    layer, found = large_layer(dtype), []
    layer.linear.requires_grad_(False)
    twin = LinearWithDoRAMerged(layer.linear, 8, 0.5)
    twin.load_state_dict(layer.state_dict())
    assert factored_norm_pays(layer.linear.weight, layer.lora.A)
    for each in (layer, twin):
        x = X.to(dtype, copy=True).requires_grad_()
        y = each(x)
        y.pow(2).sum().backward()
        found.append((y, x.grad))
    assert layer.linear.weight.grad is None
    for fast, plain in zip(*found, strict=True):
        assert_close(fast, plain, rtol=1e-5 if dtype == torch.float32 else 1e-12)


@given(
    st.integers(1, 800),
    st.sampled_from([1e-30, 1e-18, 1e-3, 1.0, 1e10, 1e18, 1e30]),
    st.integers(0, 10**6),
)
def test_norms_in_float32_are_those_in_float64_up_to_rounding(in_dim, scale, seed):
    V = (normal(6, in_dim, seed=seed) * scale).float()
    for third in (0, 1 if 1e-10 < scale < 1e10 else scale):
        V[2] = third
        actual = formed_row_norms(V).double()
        torch.testing.assert_close(actual, row_norms(V), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-14, 0.01, 1.0, 1e14])
def test_norms_of_a_float32_weight_are_float32_and_all_others_float64(dtype, scale):
    V = (F.normalize(normal(6, 20)) * scale).to(dtype)
    narrow = torch.float32 if dtype == torch.float32 else torch.float64
    assert formed_row_norms(V).dtype == narrow
    assert formed_row_norms(V.requires_grad_()).dtype == torch.float64


@pytest.mark.parametrize("limit", [1e-15, 1e15])
def test_float32_ends_at_its_limits(limit):
    inside = torch.nextafter(torch.tensor([[limit]]), torch.ones(1, 1))
    assert formed_row_norms(inside).dtype == torch.float32
    assert formed_row_norms(torch.tensor([[limit]])).dtype == torch.float64


@pytest.mark.parametrize(("size", "factored"), [((7, 5), False), (LARGE, True)])
def test_layers_stacked_by_vmap_give_their_own_outputs(size, factored):
    layers = [
        moved(LinearWithDoRA, linear_layer(*size, dtype=torch.float32, seed=s), seed=s)
        for s in (0, 9)
    ]
    x = normal(3, size[0], dtype=torch.float32)
    assert factored_norm_pays(layers[0].linear.weight, layers[0].lora.A) == factored
    state = torch.func.stack_module_state(layers)
    outputs = torch.vmap(
        lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))
    )(*state)
    for output, layer in zip(outputs, layers, strict=True):
        assert_close(output, layer(x), rtol=1e-5)


# --- The rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pays", "shape", "rank", "options"),
    [
        (True, (512, 512), 8, {}),
        (True, (512, 512), 8, {"dtype": torch.float64}),
        (True, (1024, 1024), 256, {}),
        (False, (1024, 1024), 257, {}),
        (True, (4096, 512), 128, {}),
        (False, (4096, 512), 129, {}),
        (False, (512, 511), 8, {}),
        (False, (1024, 1024), 8, {"dtype": torch.bfloat16}),
        (False, (1024, 1024), 8, {"dtype": torch.float16}),
        (False, (1024, 1024), 8, {"device": "meta"}),
        (False, (1024, 1024), 8, {"A": torch.float64}),
    ],
)
def test_the_rule(pays, shape, rank, options):
    A_dtype = options.pop("A", options.get("dtype"))
    A = torch.empty(shape[1], rank, dtype=A_dtype)
    assert factored_norm_pays(torch.empty(shape, **options), A) == pays


def test_autocast_costs_the_norm_of_a_large_layer_no_digits():
    layer = large_layer()
    expected = scale_and_bias(layer)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = scale_and_bias(layer)[0]
        assert layer(X).dtype == torch.bfloat16
    assert torch.equal(c, expected)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_norm_has_its_gradient_where_it_is_not_detached(detach_norm, computed):
    layer = large_layer(detach_norm=detach_norm)
    c, _ = scale_and_bias(layer)
    of_m, of_B = torch.autograd.grad(
        c.sum(), [layer.m, layer.lora.B], allow_unused=True
    )
    assert (of_m != 0).all()
    assert (of_B is None) == detach_norm
    assert computed == ["factored_row_norms" if detach_norm else "row_norms"]
    with torch.no_grad():
        assert not scale_and_bias(layer)[0].requires_grad


def test_an_input_of_another_dtype_is_refused_as_by_a_linear_layer():
    layer = large_layer()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(normal(2, LARGE[0], dtype=torch.float64))


# --- Two products in one --------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge():
    """A frozen layer of 2²² entries."""
    layer = LinearWithDoRA(linear_layer(2048, 2048, dtype=torch.float32), 8, 0.5)
    move(layer)
    layer.linear.requires_grad_(False)
    return layer


HUGE_X = normal(2, 2048, dtype=torch.float32)


@pytest.fixture
def joined(monkeypatch):
    """Note the shape of each input that is multiplied together with A."""
    calls, function = [], dora.joined_products
    monkeypatch.setattr(
        dora, "joined_products", lambda x, *a: calls.append(x.shape) or function(x, *a)
    )
    return calls


def test_a_huge_layer_reads_w_once_and_gives_the_formulas_output(
    huge, joined, monkeypatch
):
    found = []
    for pays in (dora._joining_pays, lambda *_: False):
        monkeypatch.setattr(dora, "_joining_pays", pays)
        x = HUGE_X.clone().requires_grad_()
        y = huge(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        found.append((y, gradient, second))
    assert joined == [(2, 2048)]
    for fast, plain in zip(*found, strict=True):
        assert_close(fast, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("promised", [frozen_weights, constant_weights])
def test_where_the_norms_are_promised_they_are_taken_from_there(
    huge, joined, squared, promised
):
    with torch.no_grad(), promised(huge.eval()):
        first, second = huge(HUGE_X), huge(HUGE_X)
        # At the end of the block W is read once more, to see whether it was kept.
        assert len(squared) == 1
    huge.train()
    assert torch.equal(first, second)
    assert len(joined) == (2 if promised is frozen_weights else 0)


@pytest.mark.parametrize(
    "why_not",
    [
        "smaller",
        "W is trained",
        "norm is trained",
        "autocast",
        "dropout",
        "vmap",
        "x is large",
        "x is sparse",
    ],
)
def test_where_one_product_would_be_wrong_there_are_two(huge, joined, why_not):
    layer, run = copy.deepcopy(huge), nullcontext()
    if why_not == "smaller":
        layer = LinearWithDoRA(linear_layer(2047, 2048, dtype=torch.float32), 8, 0.5)
    elif why_not == "W is trained":
        layer.linear.weight.requires_grad_(True)
    elif why_not == "norm is trained":
        layer.detach_norm = False
    elif why_not == "autocast":
        run = torch.autocast("cpu", dtype=torch.bfloat16)
    elif why_not == "dropout":
        layer.lora.dropout = 0.5
    x = HUGE_X[:, : layer.in_features]
    if why_not == "x is large":
        x = x.repeat(300, 1)
    elif why_not == "x is sparse":
        x = x.to_sparse()
    with run:
        y = torch.vmap(layer)(x) if why_not == "vmap" else layer(x)
    y.float().sum().backward()
    assert joined == []
    assert (layer.linear.weight.grad is not None) == (
        why_not in ["smaller", "W is trained"]
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (HUGE_X.double(), "to have the same dtype"),
        (HUGE_X[:, 1:], "shapes cannot be multiplied"),
        (HUGE_X.to("meta"), "device"),
    ],
)
def test_a_wrong_input_is_refused_in_torchs_words(huge, x, message):
    with pytest.raises(RuntimeError, match=message):
        huge(x)


# --- Norms that are kept --------------------------------------------------------------------


def kept_model():
    small = moved(LinearWithDoRA, linear_layer(600, 5, dtype=torch.float32))
    model = nn.Sequential(large_layer(), nn.ReLU(), small)
    return model.requires_grad_(False).eval()


def close(actual, expected):
    assert_close(actual, expected, rtol=1e-5)


def refused(promise, names, model, act, error=RuntimeError):
    """Expect that a block in which ``act`` breaks the promise about the layers ``names``
    ends with an error."""
    message = (
        rf"^the weights of {names} changed inside {promise.__name__}, .* outputs since "
        r"then used the norms from before the change\. Change weights outside the block$"
    )

    def block():
        with promise(model):
            act(model)

    with pytest.raises(error, match=message if error is RuntimeError else None):
        block()


def test_norms_are_computed_once_while_the_weights_are_constant(computed):
    model = kept_model()
    expected = model(X)
    computed.clear()
    with torch.no_grad(), constant_weights(model):
        for _ in range(5):
            close(model(X), expected)
        assert len(computed) == 2
    # The end of the block computes them once more, to compare.
    assert len(computed) == 4
    model(X)
    assert len(computed) == 6, "kept beyond the block"


def other_parameter(module, name):
    setattr(module, name, nn.Parameter(3 * getattr(module, name)))


def load_other(model, ending="", **options):
    state = model.state_dict()
    other = {k: 3 * v if k.endswith(ending) else v for k, v in state.items()}
    model.load_state_dict(other, **options)


CHANGES = {
    "an edit in place": lambda model: model[0].lora.B.mul_(2),
    "of A": lambda model: model[0].lora.A.mul_(2),
    "of m": lambda model: model[0].m.mul_(2),
    "of W": lambda model: model[0].linear.weight.mul_(3),
    "of the small W": lambda model: model[2].linear.weight.add_(1),
    "another parameter": lambda model: other_parameter(model[0].lora, "B"),
    "another W": lambda model: other_parameter(model[0].linear, "weight"),
    "alpha": lambda model: setattr(model[0].lora, "alpha", 4.0),
    "load_state_dict": load_other,
    "assigning load_state_dict": lambda model: load_other(model, "B", assign=True),
    "dtype": lambda model: load_other(model.double()),
}


@pytest.mark.parametrize("promise", [constant_weights, frozen_weights])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_torch_notices_is_seen_at_once(name, promise):
    model = kept_model().train(promise is frozen_weights)
    with torch.no_grad(), promise(model):
        before = model(X)
        CHANGES[name](model)
        x = X.to(model[0].m.dtype)
        after = model(x)
    assert not torch.allclose(before.double(), after.double(), atol=1e-3)
    # Beside a model that never kept anything.
    close(after, model(x))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1.5), (torch.float32, 1.001), (torch.float64, 1 + 1e-11)],
)
@pytest.mark.parametrize("part", ["linear.weight", "lora.A", "lora.B", "m"])
def test_a_change_that_torch_does_not_notice_is_an_error_at_the_end(
    part, dtype, factor
):
    def predict_and_change(model):
        with torch.no_grad():
            model(X.to(dtype))
            model[2].get_parameter(part).data.mul_(factor)
            model(X.to(dtype))

    refused(constant_weights, "2", kept_model().to(dtype), predict_and_change)


@pytest.mark.parametrize("removed", [False, True])
def test_all_layers_that_changed_are_named_with_what_to_do(removed):
    def predict_and_change(model):
        with torch.no_grad():
            model(X)
        for index in (0, 2):
            model[index].lora.B.data.mul_(1.5)
        if removed:
            model[2] = nn.Identity()

    # A layer that is no longer in the model has no name there.
    names = "0, LinearWithDoRA" if removed else "0, 2"
    refused(constant_weights, names, kept_model(), predict_and_change)


def test_a_change_that_torch_notices_is_no_error_after_the_last_prediction():
    model = kept_model()
    with torch.no_grad(), constant_weights(model):
        before = model(X)
        model[2].lora.B.mul_(2)
    assert not torch.allclose(model(X), before, atol=1e-3)


def test_a_fused_optimizer_in_evaluation_mode_never_goes_unnoticed():
    model = kept_model()
    model[2].lora.requires_grad_(True)
    optimizer = torch.optim.Adam(model[2].lora.parameters(), lr=0.1, fused=True)
    with constant_weights(model):
        for _ in range(3):
            with torch.no_grad():
                kept = model(X)
            close(model(X), kept)
            optimizer.zero_grad()
            model(X).pow(2).mean().backward()
            optimizer.step()

    def predict_between_loss_and_step(model):
        loss = model(X).pow(2).mean()
        with torch.no_grad():
            model(X)
        loss.backward()
        optimizer.step()

    refused(constant_weights, "2", model, predict_between_loss_and_step)


def test_what_the_promise_is_not_about_keeps_nothing():
    model, other, training = kept_model(), kept_model(), kept_model().train()
    with torch.no_grad(), constant_weights(model), constant_weights(training):
        expected = model(X)
        for each in (other, training, copy.deepcopy(model)):
            each(X)
            each[0].lora.B.data.mul_(2)
            close(each(X), copy.deepcopy(each)(X))
            assert not torch.allclose(each(X), expected, atol=1e-3)
        with constant_weights(other):
            close(other(X), copy.deepcopy(other)(X))
            close(model(X), expected)


def test_an_error_in_the_block_is_the_one_that_is_raised():
    def fail_after_a_change(model):
        with torch.no_grad():
            model(X)
        model[0].lora.B.data.mul_(2)
        raise ZeroDivisionError

    refused(constant_weights, "0", kept_model(), fail_after_a_change, ZeroDivisionError)


def test_inference_mode_and_parameters_made_in_it():
    with torch.inference_mode():
        model = kept_model()
        with constant_weights(model):
            close(model(X), model(X))


# --- Squares that are kept ------------------------------------------------------------------


@pytest.fixture
def squared(monkeypatch):
    """Note the weights whose rows are squared."""
    seen = []
    function = norms.squared_row_norms
    for module in (dora, norms):
        monkeypatch.setattr(
            module, "squared_row_norms", lambda W: seen.append(W) or function(W)
        )
    return seen


def trained(model, steps=4):
    """Return the losses of a few steps with a fused optimizer, and the weights that
    they led to."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.01, fused=True), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


def model_to_train():
    model = kept_model().train()
    for index in (0, 2):
        model[index].lora.requires_grad_(True)
        model[index].m.requires_grad_(True)
    return model


def test_training_with_frozen_weights_reads_w_once_and_gives_the_same_bits(squared):
    found = []
    for block, reads in ((nullcontext, 4), (frozen_weights, 1)):
        model = model_to_train()
        with block(model):
            found.append(trained(model))
            # Only the large layer has its norm from the factors.
            assert len(squared) == reads
        squared.clear()
    (losses, weights), (losses_in_block, weights_in_block) = found
    assert losses_in_block == losses
    assert len(set(losses)) == 4
    assert all(map(torch.equal, weights_in_block, weights))
    model(X)
    assert len(squared) == 1, "kept beyond the block"


def test_a_pretrained_weight_that_is_trained_too_keeps_nothing(squared):
    model = model_to_train()
    model[0].linear.weight.requires_grad_(True)
    with frozen_weights(model):
        trained(model)
        assert len(squared) == 4


def test_a_change_of_w_that_torch_does_not_notice_is_an_error_at_the_end():
    def train_and_change(model):
        model(X)
        model[0].linear.weight.data.mul_(1.001)

    refused(frozen_weights, "0", model_to_train(), train_and_change)


def test_both_promises_at_once():
    model = kept_model()
    expected = model(X)
    with torch.no_grad(), frozen_weights(model), constant_weights(model):
        model.train()
        close(model(X), expected)
        model.eval()
        close(model(X), expected)
