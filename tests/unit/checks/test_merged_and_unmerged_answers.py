"""Further answers to the exercises of notebook 3, as other learners would write them:
right ones in other styles, and wrong ones with the hint that they get."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import checks
from lowrank_utils.adapt import merge_adapters
from lowrank_utils.checks import ExerciseError


def entry_by_entry(weight, A, B, alpha):
    merged = weight.clone()
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            merged[o, i] += alpha * sum(A[i, k] * B[k, o] for k in range(len(B)))
    return merged


def of_a_layer(weight, A, B, alpha):
    layer = nn.Linear(A.shape[0], B.shape[1], bias=False, dtype=weight.dtype)
    layer.weight.data = weight + alpha * (B.T @ A.T)
    return layer.weight


def sum_of_products(batch, in_dim, out_dim, rank):
    products = [(batch, in_dim, out_dim), (batch, in_dim, rank), (batch, rank, out_dim)]
    return sum(a * b * c for a, b, c in products)


def on_a_copy(layer):
    plain = copy.deepcopy(layer.linear)
    plain.weight.data += layer.lora.delta_weight()
    return plain


def with_new_parameters(layer):
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(layer.weight.clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def by_a_state_dict(layer):
    values = {"weight": layer.weight.detach().clone()}
    if layer.bias is not None:
        values["bias"] = layer.bias.detach().clone()
    out_dim, in_dim = values["weight"].shape
    plain = nn.Linear(in_dim, out_dim, "bias" in values, dtype=layer.weight.dtype)
    plain.load_state_dict(values)
    return plain


def read_from_outputs(layer):
    """The columns of W + ΔW are what the layer makes of the unit vectors."""
    dtype = layer.linear.weight.dtype
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain = plain.to(dtype)
    with torch.no_grad():
        nothing = layer(torch.zeros(1, layer.in_features, dtype=dtype))
        ones = layer(torch.eye(layer.in_features, dtype=dtype))
        plain.weight.copy_((ones - nothing).T)
        if plain.bias is not None:
            plain.bias.copy_(nothing[0])
    return plain


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("merged_weight", lambda W, A, B, s: torch.addmm(W, B.T, A.T, alpha=s)),
        ("merged_weight", lambda W, A, B, s: (W.T + s * A @ B).T),
        ("merged_weight", lambda W, A, B, s: W + torch.einsum("ir,ro->oi", s * A, B)),
        ("merged_weight", lambda W, A, B, s: W.clone().add_((A @ B).mT, alpha=s)),
        ("merged_weight", entry_by_entry),
        ("merged_weight", of_a_layer),
        ("multiplications", sum_of_products),
        ("multiplications", lambda b, i, o, r: float(b * (i * o + r * i + r * o))),
        ("multiplications", lambda b, i, o, r: torch.tensor(b * (i * o + r * (i + o)))),
        ("merge", on_a_copy),
        ("merge", with_new_parameters),
        ("merge", by_a_state_dict),
        ("merge", read_from_outputs),
        ("merge", merge_adapters),
    ],
)
def test_right_answers_in_other_styles_pass(exercise, answer, capsys):
    getattr(checks, f"check_{exercise}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


def merge_with(change, weight=lambda layer: layer.weight):
    """Return a merge whose result is changed at the end, or that has another weight."""

    def merge(layer):
        plain = copy.deepcopy(layer.linear)
        plain.weight.data = weight(layer).detach().clone()
        change(plain, layer)
        return plain

    return merge


def nothing(*_):
    pass


def as_the_reader_writes(change):
    """Return a merge that copies the linear layer and then does this to its weight."""

    def merge(layer):
        plain = copy.deepcopy(layer.linear)
        change(plain, layer)
        return plain

    return merge


def without_no_grad(plain, layer):
    plain.weight += layer.lora.delta_weight()


def without_a_parameter(plain, layer):
    plain.weight = layer.weight + 0


def without_a_transpose(plain, layer):
    plain.weight.data += layer.lora.alpha * (layer.lora.A @ layer.lora.B)


def with_factors_exchanged(plain, layer):
    plain.weight.data += layer.lora.alpha * (layer.lora.A.T @ layer.lora.B.T)


def always_with_a_bias(layer):
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    return plain


def add_and_subtract(layer):
    with torch.no_grad():
        layer.linear.weight += layer.lora.delta_weight()
        plain = copy.deepcopy(layer.linear)
        layer.linear.weight -= layer.lora.delta_weight()
    return plain


def with_alpha_folded_in(layer):
    layer.lora.alpha = 1.0
    return on_a_copy(layer)


def sizes_exchanged(layer):
    plain = nn.Linear(layer.out_features, layer.in_features, layer.bias is not None)
    plain.weight = nn.Parameter(layer.weight.clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def a_slice_of_the_old_bias(plain, layer):
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data[:])


def a_bias_of_the_inputs(plain, layer):
    if layer.bias is not None:
        plain.bias = nn.Parameter(torch.zeros(layer.in_features))


def a_plain_tensor(plain, layer):
    del plain.weight
    plain.weight = layer.weight.detach().clone()


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"),
    [
        (
            "merged_weight",
            lambda weight, A, B, alpha: weight + alpha * (A @ B),
            "weight (4, 7), A (7, 3), B (3, 4): is a transpose missing",
        ),
        (
            "merged_weight",
            lambda W, A, B, s: W + s * (A @ B).reshape(W.shape),
            "a reshape isn't a transpose",
        ),
        ("merged_weight", lambda W, A, B, s: s * W + (A @ B).T, "the update, not W"),
        ("merged_weight", lambda W, A, B, s: W + (A @ B).T + s, "it isn't added"),
        ("merged_weight", lambda W, A, B, s: W + (A @ B).T / s, "doesn't divide"),
        (
            "merged_weight",
            lambda W, A, B, s: W.add_(s * (A @ B).T),
            "weight was changed in place",
        ),
        ("merged_weight", lambda *_: print(end=""), "is the `return` missing"),
        (
            "multiplications",
            lambda b, i, o, r: 2 * b * i * o + 3 * b * r * (i + o),
            "a whole training step",
        ),
        (
            "multiplications",
            lambda b, i, o, r: (b * i * o, b * i * r, b * r * o),
            "must be one number; got a tuple",
        ),
        ("merge", as_the_reader_writes(without_no_grad), "under torch.no_grad()"),
        ("merge", as_the_reader_writes(without_a_parameter), "in nn.Parameter(…)"),
        (
            "merge",
            as_the_reader_writes(without_a_transpose),
            "lora.A (7, 2), lora.B (2, 4): is a transpose missing",
        ),
        (
            "merge",
            as_the_reader_writes(with_factors_exchanged),
            "lora.A (7, 2), lora.B (2, 4): is a transpose missing",
        ),
        ("merge", always_with_a_bias, "its layer.bias is None"),
        ("merge", add_and_subtract, "doesn't bring every bit back"),
        ("merge", with_alpha_folded_in, "the adapted layer was changed"),
        ("merge", sizes_exchanged, "nn.Linear takes the inputs first"),
        ("merge", merge_with(a_slice_of_the_old_bias), "bias share memory"),
        ("merge", merge_with(a_bias_of_the_inputs), "bias has the wrong shape"),
        ("merge", merge_with(a_plain_tensor), "weight must be an nn.Parameter"),
        (
            "merge",
            merge_with(
                nothing,
                lambda layer: (
                    layer.linear.weight + layer.lora.alpha * layer.lora.delta_weight()
                ),
            ),
            "holds alpha already",
        ),
        (
            "merge",
            merge_with(
                nothing, lambda layer: layer.linear.weight - layer.lora.delta_weight()
            ),
            "added, not subtracted",
        ),
        (
            "merge",
            lambda layer: nn.Linear(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                device="meta",
            ),
            "is on the device meta",
        ),
        ("merge", lambda _: None, "is the `return` missing"),
        ("merge", lambda layer: layer.weight, "plain nn.Linear; got"),
        (
            "merge",
            lambda layer: lambda x: F.linear(x, layer.weight, layer.bias),
            "plain nn.Linear; got function",
        ),
    ],
)
def test_a_wrong_answer_gets_its_hint(exercise, answer, hint, capsys):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{exercise}")(answer)
    assert hint in str(raised.value)
    assert capsys.readouterr().out == ""


@pytest.fixture(autouse=True)
def float64_as_in_the_notebook():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
