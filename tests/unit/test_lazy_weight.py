"""A weight that is formed when its numbers are needed, and not when it is looked at."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import normal
from torch import nn

from lowrank_utils._lazy_weight import lazy_weight

W = normal(6, 6)


class Formed:
    """W + U, and how often it was formed."""

    def __init__(self):
        self.count, self.U = 0, normal(6, 6, seed=1).requires_grad_()
        self.weight = lazy_weight(W, self.form, requires_grad=True)

    def form(self):
        self.count += 1
        return W + self.U


def saved(weight):
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    return torch.load(buffer)["weight"]


def test_what_is_known_is_answered_without_forming_it():
    formed = Formed()
    weight = formed.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device) == (W.dtype, W.shape, W.device)
    assert (weight.size(), weight.size(0), len(weight), weight.numel()) == (
        (6, 6), 6, 6, 36,
    )  # fmt: skip
    assert weight.ndim == weight.dim() == 2
    assert weight.is_floating_point()
    assert torch.is_floating_point(weight)
    assert weight.requires_grad
    assert not weight.is_meta
    assert formed.count == 0
    assert not lazy_weight(W, formed.form).requires_grad


def attention(weight):
    x = normal(3, 2, 6, seed=2)
    options = {"num_heads": 2, "in_proj_bias": None, "bias_k": None, "bias_v": None}
    return F.multi_head_attention_forward(
        x, x, x, 6, in_proj_weight=normal(18, 6, seed=3), out_proj_weight=weight,
        out_proj_bias=None, add_zero_attn=False, dropout_p=0.0, **options,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        lambda w: F.linear(normal(2, 6), w),
        lambda w: w.clone(),
        lambda w: torch.cat([w, w]),
        lambda w: w.detach(),
        lambda w: w[1],
        lambda w: 2 * w,
        lambda w: w.contiguous(),
        attention,
        copy.deepcopy,
        saved,
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: torch.from_numpy(w.detach().numpy()),
    ],
)
def test_what_computes_with_it_gets_a_plain_tensor_that_is_formed_once(function):
    formed = Formed()
    result = function(formed.weight)
    function(formed.weight)
    assert formed.count == 1
    assert type(result) is torch.Tensor
    assert torch.equal(result, function((W + formed.U).detach()))


def test_gradients_flow_through_it_also_after_a_look_without_them():
    formed = Formed()
    with torch.no_grad():
        assert not formed.weight.clone().requires_grad
    (gradient,) = torch.autograd.grad((3 * formed.weight).sum(), formed.U)
    assert torch.equal(gradient, torch.full_like(W, 3.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compile_and_vmap_it_is_the_formed_tensor(backend):
    formed, x = Formed(), normal(4, 2, 6, seed=4)
    expected = F.linear(x, W + formed.U)

    def layer(x):
        weight = lazy_weight(W, formed.form)
        assert weight.dtype == torch.float64
        return F.linear(x, weight)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.vmap(layer)(x), expected)


def test_an_error_of_the_form_comes_out_each_time():
    def form():
        raise RuntimeError("no weight")

    weight = lazy_weight(nn.Parameter(W), form)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^no weight$"):
            F.linear(W, weight)
    assert weight.requires_grad
