"""Further answers to the exercises of notebook 4, as learners may write them."""

import math

import pytest
import torch
import torch.nn.functional as F

from lowrank_utils import checks
from lowrank_utils.checks import ExerciseError
from lowrank_utils.decompose import magnitude_and_direction


def unit_with_a_loop(v):
    length = math.sqrt(sum(float(entry) ** 2 for entry in v))
    return v if length == 0 else torch.stack([entry / length for entry in v])


def split_with_a_loop(weight):
    m = torch.stack([(row @ row).sqrt() for row in weight])
    return m, torch.stack([row / length for row, length in zip(weight, m, strict=True)])


def split_by_columns_of_the_transpose(weight):
    columns = weight.T
    m = columns.norm(dim=0)
    return m, (columns / m).T


def gradients_by_projection(grad_w, g, v):
    unit = F.normalize(v, dim=0)
    across = torch.eye(len(v), dtype=v.dtype) - torch.outer(unit, unit)
    return torch.dot(grad_w, unit), g / v.norm() * (across @ grad_w)


def gradients_with_v_squared(grad_w, g, v):
    length = (v * v).sum() ** 0.5
    along = (grad_w * v).sum()
    return along / length, g * grad_w / length - g * along * v / length**3


RIGHT = [
    ("unit_vector", unit_with_a_loop),
    ("unit_vector", lambda v: torch.nan_to_num(v / v.norm())),
    ("unit_vector", lambda v: F.normalize(v, dim=0)),
    ("unit_vector", lambda v: v / v.norm() if v.any() else torch.zeros(len(v)).to(v)),
    ("unit_vector", lambda v: v / torch.where(v.norm() > 0, v.norm(), 1)),
    ("unit_vector", lambda v: magnitude_and_direction(v).direction),
    ("split_rows", split_with_a_loop),
    ("split_rows", split_by_columns_of_the_transpose),
    ("split_rows", magnitude_and_direction),
    ("split_rows", lambda w: (w.square().sum(1) ** 0.5, w / w.norm(dim=1)[:, None])),
    ("split_rows", lambda w: [torch.linalg.vector_norm(w, dim=-1), F.normalize(w)]),
    ("weight_norm_gradients", gradients_by_projection),
    ("weight_norm_gradients", gradients_with_v_squared),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_in_other_styles_are_right(name, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


def unit_if_v_is_zero(v):
    if v == 0:
        return v
    return v / v.norm()


def gradients(grad_w, g, v, *, along=None, subtract=1, scale=None, of=None):
    """The right formulas with a part exchanged."""
    unit, length = v / v.norm(), v.norm()
    grad_g = grad_w @ unit
    of = unit if of is None else of
    scale = g / length if scale is None else scale
    across = scale * (grad_w - subtract * grad_g * of)
    return (grad_g if along is None else along), across


WRONG = [
    ("unit_vector", unit_if_v_is_zero, "`if` wants one yes or no"),
    ("unit_vector", lambda v: v * v.norm(), "divide by it"),
    ("unit_vector", lambda v: v / len(v), "the number of entries"),
    ("unit_vector", lambda v: v.norm(), "the direction is a vector"),
    ("unit_vector", lambda v: v.abs() / v.norm(), "all signs are lost"),
    ("unit_vector", lambda v: v / (v.norm() + 1e-6), "by the length itself"),
    ("unit_vector", lambda v: (v / v.norm()).tolist(), "must be a tensor; got list"),
    (
        "split_rows",
        lambda w: (w.norm(dim=1), w / w.norm(dim=1)),
        "must stand in a column, (4, 1)",
    ),
    ("split_rows", lambda w: (w.norm(dim=1), F.normalize(w, p=1)), "absolute values"),
    ("split_rows", lambda w: (w.norm(dim=1), F.normalize(w, dim=0)), "wrong axis"),
    ("split_rows", lambda w: (w.norm(dim=1), w / w.norm()), "one norm for the whole"),
    ("split_rows", lambda w: (F.normalize(w), w.norm(dim=1)), "changed places"),
    ("split_rows", lambda w: (w.norm(dim=1), w * w.norm(dim=1)[:, None]), "divide"),
    ("split_rows", lambda w: (w.pow(2).mean(1).sqrt(), F.normalize(w)), "a mean over"),
    ("split_rows", lambda w: {"m": w.norm(dim=1)}, "must be a tuple of 2; got dict"),
    ("split_rows", lambda _: None, "is the `return` missing"),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v, of=v),
        "times the *unit* vector",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v, subtract=-1),
        "subtracted, not added",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v, scale=v.norm() / g),
        "upside down",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v, along=gw.norm()),
        "not the length of ∇w",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v)[::-1],
        "changed places",
    ),
    (
        "weight_norm_gradients",
        lambda gw, _, v: (gw @ v / v.norm(), gw),
        "that is ∇w",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: gradients(gw, g, v, along=g * (gw @ v) / v.norm()),
        "isn't scaled by g",
    ),
    (
        "weight_norm_gradients",
        lambda gw, g, v: (gw @ v / v.norm(), g / v.norm() * (gw @ v) * v / (v @ v)),
        "v's gradient is the rest",
    ),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_likely_mistakes_get_their_hint(name, answer, hint):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{name}")(answer)
    assert hint in str(raised.value)


def by_backward(grad_w, g, v):
    g, v = g.detach().requires_grad_(), v.detach().requires_grad_()
    (g * v / v.norm()).backward(grad_w)
    return g.grad, v.grad


def by_autograd_grad(grad_w, g, v):
    g.requires_grad_()
    v.requires_grad_()
    return torch.autograd.grad(g * v / v.norm(), (g, v), grad_w)


def by_vjp(grad_w, g, v):
    _, pull = torch.func.vjp(lambda g, v: g * v / v.norm(), g, v)
    return pull(grad_w)


@pytest.mark.parametrize("answer", [by_backward, by_autograd_grad, by_vjp])
def test_autograd_gets_a_remark(answer, capsys):
    checks.check_weight_norm_gradients(answer)
    assert capsys.readouterr().out == (
        "Exercise 4.3: right, but autograd did the work: can you write the two "
        "formulas?\n"
    )
