"""The row norms that DoRA divides by: two ways that agree, the rule between them, and
norms that are kept."""

import copy

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


def exact(W, A, B, alpha):
    return row_norms(W.double() + alpha * (A.double() @ B.double()).T)


@pytest.fixture
def factored_for_all(monkeypatch):
    """Take the factored way at any size, so that small examples reach it."""
    rule = dora.factored_norm_pays

    def without_size(W, A):
        grown = (
            W.new_zeros(4096, 4096) if W.dtype in (torch.float32, torch.float64) else W
        )
        return rule(grown, A)

    monkeypatch.setattr(dora, "factored_norm_pays", without_size)


def large_layer(dtype=torch.float32, rank=8, **options):
    """A layer above the rule's size, moved as training would: ΔW about as long as W."""
    linear = linear_layer(*LARGE, dtype=dtype)
    layer = LinearWithDoRA(linear, rank, 0.5, **options)
    move(layer)
    with torch.no_grad():
        layer.lora.A /= rank**0.5
    return layer


# --- The factored way -----------------------------------------------------------------------


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([0.3, 1.0, -2.5]),
    st.integers(0, 10**6),
)
def test_both_ways_agree(in_dim, out_dim, rank, alpha, seed):
    W, A, B = (
        normal(out_dim, in_dim, seed=seed),
        normal(in_dim, rank, seed=seed + 1),
        normal(rank, out_dim, seed=seed + 2),
    )
    assert_close(factored_row_norms(W, A, B, alpha), exact(W, A, B, alpha), rtol=1e-13)


@pytest.mark.parametrize("size", [(1024, 300), (4096, 64)])
def test_both_ways_agree_in_float32(size):
    in_dim, out_dim = size
    W, A, B = (
        normal(out_dim, in_dim).float(),
        normal(in_dim, 8, seed=1).float(),
        normal(8, out_dim, seed=2).float(),
    )
    actual = factored_row_norms(W, A, B, 0.4)
    assert actual.dtype == torch.float32
    assert ((actual - exact(W, A, B, 0.4)).abs() / exact(W, A, B, 0.4)).max() < 2e-6


@pytest.mark.parametrize("left", [0.7, 0.3, 0.1, 1e-2, 1e-3, 1e-5])
def test_rows_that_the_update_takes_away_keep_their_digits(left):
    # B's rows are W's, so s = left − 1 shortens a row to a fraction of W's; only half
    # the rows.
    A = torch.linalg.qr(normal(700, 8))[0].float()
    B = normal(8, 40, seed=1).float()
    W = (A @ B).T.contiguous()
    B[:, ::2] = 0
    actual, expected = factored_row_norms(W, A, B, left - 1), exact(W, A, B, left - 1)
    # A float32 V has digits to lose too: what is left of W after a subtraction.
    assert ((actual - expected).abs() / expected).max() < 1e-6 / left
    assert torch.equal(
        expected[1::2] < 0.999 * row_norms(W)[1::2], torch.ones(20, dtype=torch.bool)
    )


def test_the_formula_alone_would_lose_them():
    # Which shows that the test above would notice.
    A = torch.linalg.qr(normal(700, 8))[0].float()
    B = normal(8, 40, seed=1).float()
    W, s = (A @ B).T.contiguous(), 1e-3 - 1
    AW = F.linear(A.T, W)
    squares = row_norms(W).float() ** 2 + ((2 * s * AW + s**2 * (A.T @ A @ B)) * B).sum(
        0
    )
    error = (squares.clamp(min=0).sqrt() - exact(W, A, B, s)).abs() / exact(W, A, B, s)
    assert error.max() > 0.01


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_rows_whose_squares_leave_the_range_of_float32(scale):
    W, A, B = (
        (normal(6, 700) * scale).float(),
        normal(700, 2, seed=1).float(),
        (normal(2, 6, seed=2) * scale).float(),
    )
    W[3] = 0
    B[:, 3] = 0
    actual = factored_row_norms(W, A, B, 0.1)
    torch.testing.assert_close(actual.double(), exact(W, A, B, 0.1), rtol=1e-5, atol=0)
    assert actual[3] == 0


@pytest.mark.usefixtures("factored_for_all")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_the_layer_gives_the_merged_forms_outputs_and_gradients(
    bias, batch, monkeypatch
):
    called = []
    monkeypatch.setattr(
        dora,
        "factored_row_norms",
        lambda *a: called.append(1) or factored_row_norms(*a),
    )
    layers = [
        moved(cls, linear_layer(bias=bias), rank=2)
        for cls in (LinearWithDoRA, LinearWithDoRAMerged)
    ]
    x, G = normal(*batch, 7, seed=20), normal(*batch, 5, seed=21)
    found = []
    for layer in layers:
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        (y * G).sum().backward()
        found.append([y, inputs.grad, *(p.grad for p in layer.parameters())])
    assert called == [1]
    for fast, plain in zip(*found, strict=True):
        assert_close(fast, plain, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_layer_gives_the_merged_forms_outputs(dtype):
    layer = large_layer(dtype)
    twin = LinearWithDoRAMerged(layer.linear, 8, 0.5)
    twin.load_state_dict(layer.state_dict())
    x = normal(3, LARGE[0], dtype=dtype)
    assert factored_norm_pays(layer.linear.weight, layer.lora.A)
    assert_close(layer(x), twin(x), rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_a_frozen_weight_gets_no_gradient():
    layer = large_layer(torch.float64)
    layer.linear.requires_grad_(False)
    twin = LinearWithDoRAMerged(layer.linear, 8, 0.5)
    twin.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, twin):
        x = normal(3, LARGE[0]).requires_grad_()
        each(x).pow(2).sum().backward()
        found.append(x.grad)
    assert layer.linear.weight.grad is None
    assert_close(*found)


@given(
    st.integers(1, 800),
    st.sampled_from([1e-30, 1e-18, 1e-3, 1.0, 1e10, 1e18, 1e30]),
    st.integers(0, 10**6),
)
def test_norms_in_float32_are_those_in_float64_up_to_rounding(in_dim, scale, seed):
    V = (normal(6, in_dim, seed=seed) * scale).float()
    V[2] = 0
    torch.testing.assert_close(
        formed_row_norms(V).double(), row_norms(V), rtol=1e-6, atol=0
    )
    V[2] = 1 if 1e-10 < scale < 1e10 else scale
    torch.testing.assert_close(
        formed_row_norms(V).double(), row_norms(V), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-14, 0.01, 1.0, 1e14])
def test_norms_of_a_float32_weight_are_float32_and_all_others_float64(dtype, scale):
    V = (torch.nn.functional.normalize(normal(6, 20)) * scale).to(dtype)
    assert formed_row_norms(V).dtype == (
        torch.float32 if dtype == torch.float32 else torch.float64
    )
    assert formed_row_norms(V.requires_grad_()).dtype == torch.float64


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


def test_the_rule():
    def pays(out_dim, in_dim, rank=8, dtype=torch.float32, A_dtype=None, device="cpu"):
        W = torch.empty(out_dim, in_dim, dtype=dtype, device=device)
        return factored_norm_pays(W, torch.empty(in_dim, rank, dtype=A_dtype or dtype))

    assert pays(1024, 1024)
    assert pays(4096, 4096, rank=64)
    assert pays(512, 512, dtype=torch.float64)
    assert not pays(128, 784)
    assert pays(1024, 1024, rank=256)
    assert not pays(1024, 1024, rank=257)
    assert not pays(1024, 1024, dtype=torch.bfloat16)
    assert not pays(1024, 1024, dtype=torch.float16)
    assert not pays(1024, 1024, device="meta")
    assert not pays(1024, 1024, A_dtype=torch.float64)


def test_autocast_costs_the_norm_of_a_large_layer_no_digits():
    layer = large_layer()
    expected = scale_and_bias(layer, torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = scale_and_bias(layer, torch.float32)[0]
        assert layer(normal(2, LARGE[0], dtype=torch.float32)).dtype == torch.bfloat16
    assert torch.equal(c, expected)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_norm_has_its_gradient_where_it_is_not_detached(detach_norm, computed):
    layer = large_layer(detach_norm=detach_norm)
    c, _ = scale_and_bias(layer, torch.float32)
    of_m, of_B = torch.autograd.grad(
        c.sum(), [layer.m, layer.lora.B], allow_unused=True
    )
    assert (of_m != 0).all()
    assert (of_B is None) == detach_norm
    assert computed == ["factored_row_norms" if detach_norm else "row_norms"]
    with torch.no_grad():
        assert not scale_and_bias(layer, torch.float32)[0].requires_grad


def test_an_input_of_another_dtype_is_refused_as_by_a_linear_layer():
    layer = large_layer()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(normal(2, LARGE[0], dtype=torch.float64))


# --- Norms that are kept --------------------------------------------------------------------


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


def kept_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        large_layer(),
        nn.ReLU(),
        moved(LinearWithDoRA, linear_layer(600, 5, dtype=torch.float32)),
    )
    return model.requires_grad_(False).eval()


X = normal(3, LARGE[0], dtype=torch.float32)


def close(actual, expected, rtol=1e-5, atol=0.0):
    assert_close(actual, expected, rtol=rtol, atol=atol)


def test_norms_are_computed_once_while_the_weights_are_constant(computed):
    model = kept_model()
    expected = model(X)
    computed.clear()
    with torch.no_grad(), constant_weights(model):
        outputs = [model(X) for _ in range(5)]
        assert len(computed) == 2
    # The end of the block computes them once more, to compare.
    assert len(computed) == 4
    for output in outputs:
        close(output, expected)
    computed.clear()
    model(X)
    assert len(computed) == 2, "kept beyond the block"


def changed_by(change):
    """Return outputs in one block after a change, beside those of a model that never
    kept anything."""
    model = kept_model()
    with torch.no_grad(), constant_weights(model):
        before = model(X)
        change(model)
        after = model(X.to(model[0].m.dtype))
    assert not torch.allclose(before.double(), after.double(), atol=1e-3)
    return after, model(X.to(model[0].m.dtype))


CHANGES = {
    "an edit in place": lambda model: model[0].lora.B.mul_(2),
    "of A": lambda model: model[0].lora.A.mul_(2),
    "of m": lambda model: model[0].m.mul_(2),
    "of W": lambda model: model[2].linear.weight.add_(1),
    "another parameter": lambda model: setattr(
        model[0].lora, "B", nn.Parameter(3 * model[0].lora.B)
    ),
    "alpha": lambda model: setattr(model[0].lora, "alpha", 4.0),
    "load_state_dict": lambda model: model.load_state_dict(
        {k: 2 * v for k, v in model.state_dict().items()}
    ),
    "assigning load_state_dict": lambda model: model.load_state_dict(
        {k: v * 2 if k.endswith("B") else v for k, v in model.state_dict().items()},
        assign=True,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_torch_notices_is_seen_at_once(name):
    after, fresh = changed_by(CHANGES[name])
    close(after, fresh)


def test_another_dtype_is_seen_at_once():
    model = kept_model()
    with torch.no_grad(), constant_weights(model):
        model(X)
        model.double()
        close(
            model(X.double()), kept_model().double()(X.double()), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("factor", [1.5, 1.001])
@pytest.mark.parametrize("part", ["linear.weight", "lora.A", "lora.B", "m"])
def test_a_change_that_torch_does_not_notice_is_an_error_at_the_end(part, factor):
    model = kept_model()

    def predict_and_change():
        with torch.no_grad(), constant_weights(model):
            model(X)
            model[2].get_parameter(part).data.mul_(factor)
            model(X)

    with pytest.raises(
        RuntimeError, match="the weights of 2 changed inside constant_weights"
    ):
        predict_and_change()


def test_in_float64_a_change_in_the_eleventh_digit_is_an_error_too():
    model = kept_model().double()

    def predict_and_change():
        with torch.no_grad(), constant_weights(model):
            model(X.double())
            model[2].linear.weight.data.mul_(1 + 1e-11)

    with pytest.raises(
        RuntimeError, match="the weights of 2 changed inside constant_weights"
    ):
        predict_and_change()


def test_all_layers_that_changed_are_named_with_what_to_do():
    model = kept_model()

    def predict_and_change(remove):
        with torch.no_grad(), constant_weights(model):
            model(X)
            for index in (0, 2):
                model[index].lora.B.data.mul_(1.5)
            if remove:
                model[2] = nn.Identity()

    message = (
        r"^the weights of {} changed inside constant_weights, where they must not: outputs since then used the "
        r"norms from before the change\. Change weights outside the block$"
    )
    with pytest.raises(RuntimeError, match=message.format("0, 2")):
        predict_and_change(remove=False)
    # A layer that is no longer in the model has no name there.
    with pytest.raises(RuntimeError, match=message.format("0, LinearWithDoRA")):
        predict_and_change(remove=True)


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

    def predict_between_loss_and_step():
        with constant_weights(model):
            loss = model(X).pow(2).mean()
            with torch.no_grad():
                model(X)
            loss.backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="changed inside"):
        predict_between_loss_and_step()


def test_in_training_mode_nothing_is_kept(computed):
    model = kept_model().train()
    with torch.no_grad(), constant_weights(model):
        model(X)
        model[2].lora.B.data.mul_(2)
        close(model(X), copy.deepcopy(model)(X))
    computed.clear()


def test_a_copy_made_in_the_block_keeps_nothing():
    model = kept_model()
    with torch.no_grad(), constant_weights(model):
        model(X)
        twin = copy.deepcopy(model)
        twin[0].lora.B.data.mul_(2)
        output = twin(X)
    close(output, twin(X))
    assert not torch.allclose(output, model(X), atol=1e-3)


def test_other_models_and_inner_blocks():
    model, other = kept_model(), kept_model()
    with torch.no_grad(), constant_weights(model):
        model(X)
        other(X)
        other[0].lora.B.data.mul_(2)  # not part of the promise
        with constant_weights(other):
            close(other(X), copy.deepcopy(other)(X))
            close(model(X), copy.deepcopy(model)(X))


def test_an_error_in_the_block_is_the_one_that_is_raised():
    model = kept_model()

    def fail_after_a_change():
        with torch.no_grad(), constant_weights(model):
            model(X)
            model[0].lora.B.data.mul_(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_change()


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
    model, twin = model_to_train(), model_to_train()
    losses, weights = trained(model)
    # Only the large layer has its norm from the factors.
    assert len(squared) == 4
    squared.clear()
    with frozen_weights(twin):
        losses_in_block, weights_in_block = trained(twin)
        assert len(squared) == 1
    assert losses_in_block == losses
    assert len(set(losses)) == 4
    for actual, expected in zip(weights_in_block, weights, strict=True):
        assert torch.equal(actual, expected)
    squared.clear()
    twin(X)
    assert len(squared) == 1, "kept beyond the block"


def test_a_pretrained_weight_that_is_trained_too_keeps_nothing(squared):
    model = model_to_train()
    model[0].linear.weight.requires_grad_(True)
    with frozen_weights(model):
        trained(model)
        assert len(squared) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.linear.weight.mul_(3),
        lambda layer: setattr(
            layer.linear, "weight", nn.Parameter(3 * layer.linear.weight)
        ),
        lambda layer: layer.load_state_dict(
            {k: 3 * v for k, v in layer.state_dict().items()}
        ),
        lambda layer: layer.double(),
    ],
    ids=["in place", "another parameter", "load_state_dict", "dtype"],
)
def test_a_change_of_w_that_torch_notices_is_seen_at_once(change):
    model = kept_model().train()
    with torch.no_grad(), frozen_weights(model):
        model[0](X)
        change(model[0])
        x = X.to(model[0].m.dtype)
        after = model[0](x)
    close(after, model[0](x))


def test_a_change_of_w_that_torch_does_not_notice_is_an_error_at_the_end():
    model = model_to_train()

    def train_and_change():
        with frozen_weights(model):
            model(X)
            model[0].linear.weight.data.mul_(1.001)

    with pytest.raises(
        RuntimeError,
        match=r"the weights of 0 changed inside frozen_weights, .*Change weights",
    ):
        train_and_change()


def test_both_promises_at_once():
    model = kept_model()
    expected = model(X)
    with torch.no_grad(), frozen_weights(model), constant_weights(model):
        model.train()
        close(model(X), expected)
        model.eval()
        close(model(X), expected)
