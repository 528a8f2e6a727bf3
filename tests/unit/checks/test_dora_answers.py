"""Further answers to the exercises of notebook 5, as learners might write them: right
ones in other styles pass, and wrong ones get the hint of their mistake."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import checks
from lowrank_utils.checks import ExerciseError
from lowrank_utils.checks.broken import LAYERS, LayerG
from lowrank_utils.dora import LinearWithDoRA


def scale_with_a_loop(weight, A, B, alpha, m):
    V = weight + alpha * (A @ B).T
    return torch.stack([m[j] / V[j].square().sum().sqrt() for j in range(len(m))])


def scale_by_columns_of_the_transpose(weight, A, B, alpha, m):
    return m / (weight.T + alpha * A @ B).norm(dim=0)


def output_with_a_loop(x, weight, bias, A, B, alpha, m):
    V = weight + alpha * B.T @ A.T
    rows = []
    for example in x:
        y = weight @ example + alpha * (B.T @ (A.T @ example))
        rows.append(m / V.norm(dim=1) * y + bias)
    return torch.stack(rows)


def output_by_linear(x, weight, bias, A, B, alpha, m):
    c = m / (weight + alpha * (A @ B).T).norm(dim=1)
    y = F.linear(x, weight) + alpha * F.linear(F.linear(x, A.T), B.T)
    return torch.addcmul(bias, c, y)


def gradient_by_einsum(grad_y, x, V):
    return torch.einsum("bo,bi,oi->o", grad_y, x, V) / torch.linalg.norm(V, dim=1)


def gradient_by_directions(grad_y, x, V):
    return (F.linear(x, F.normalize(V, dim=1)) * grad_y).sum(0)


def gradient_by_rows_of_a_weight(grad_y, x, V):
    unit = V / V.norm(dim=1, keepdim=True)
    return ((grad_y.T @ x) * unit).sum(dim=1)


RIGHT = [
    ("dora_scale", scale_with_a_loop),
    ("dora_scale", scale_by_columns_of_the_transpose),
    ("dora_output", output_with_a_loop),
    ("dora_output", output_by_linear),
    ("magnitude_gradient", gradient_by_einsum),
    ("magnitude_gradient", gradient_by_directions),
    ("magnitude_gradient", gradient_by_rows_of_a_weight),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_in_another_style_passes(name, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


def scale(axis=1, transposed=True, keepdim=False):
    def dora_scale(weight, A, B, alpha, m):
        update = alpha * (A @ B)
        V = weight + (update.T if transposed else update)
        return m / V.norm(dim=axis, keepdim=keepdim)

    return dora_scale


def output(weight_transposed=True, column=False, **mistake):
    def dora_output(x, weight, bias, A, B, alpha, m):
        c = scale(**mistake)(weight, A, B, alpha, m)
        base = x @ (weight.T if weight_transposed else weight)
        return (c.unsqueeze(1) if column else c) * (base + alpha * x @ A @ B) + bias

    return dora_output


def gradient(axis=1, transposed=True, keepdim=False):
    def magnitude_gradient(grad_y, x, V):
        each = grad_y * (x @ (V.T if transposed else V))
        return (each / V.norm(dim=axis, keepdim=keepdim)).sum(dim=0)

    return magnitude_gradient


ONE_PER_INPUT = "dim=0 takes one norm per input"
WRONG = [
    ("dora_scale", scale(axis=0), ONE_PER_INPUT),
    ("dora_scale", scale(transposed=False), "transpose it before you add it"),
    ("dora_scale", scale(axis=0, transposed=False), "transpose it before you add it"),
    ("dora_scale", scale(keepdim=True), "with keepdim=True"),
    (
        "dora_scale",
        lambda w, A, B, a, m: m * (w + a * (A @ B).T).norm(dim=1),
        "divide",
    ),
    (
        "dora_scale",
        lambda w, A, B, a, _: (w + a * (A @ B).T).norm(dim=1),
        "divide m by it",
    ),
    (
        "dora_scale",
        lambda w, A, B, a, m: m / (w + a * (A @ B).T).abs().sum(1),
        "absolute values",
    ),
    ("dora_scale", lambda w, A, B, a, m: m / (w + a * B @ A).norm(dim=1), "transpose"),
    ("dora_output", output(axis=0), ONE_PER_INPUT),
    ("dora_output", output(transposed=False), "transpose it before you add it"),
    ("dora_output", output(weight_transposed=False), "x @ weight.T"),
    ("dora_output", output(column=True), "leave it (out,)"),
    ("magnitude_gradient", gradient(axis=0), ONE_PER_INPUT),
    ("magnitude_gradient", gradient(transposed=False), "x @ V.T"),
    ("magnitude_gradient", gradient(keepdim=True), "with keepdim=True"),
    (
        "magnitude_gradient",
        lambda g, x, V: (g * (x @ V.T) / V.norm(dim=1)).sum(),
        "sum is over the outputs too",
    ),
    (
        "magnitude_gradient",
        lambda g, x, V: (g * (x @ V.T) / V.norm()).sum(0),
        "each row has its own",
    ),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_likely_mistake_gets_its_hint(name, answer, hint):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{name}")(answer)
    said = str(raised.value)
    assert hint in said
    # Torch's own words are for mistakes that nobody thought of.
    assert "Error" not in said


def test_a_product_built_for_the_sum_gets_a_remark(capsys):
    def dora_output(x, weight, bias, A, B, alpha, m):
        update = alpha * (A @ B)
        c = m / (weight + update.T).norm(dim=1)
        return c * (x @ weight.T + x @ update) + bias

    checks.check_dora_output(dora_output)
    said = capsys.readouterr().out
    assert said.startswith("Exercise 5.2: right, but A·B was built in full")


def test_an_error_that_no_axis_explains_is_told_with_its_line():
    def dora_scale(weight, A, B, alpha, m):
        return m / (weight + alpha * (A @ B).T).norm(dim=2)

    with pytest.raises(ExerciseError, match="your function stopped at"):
        checks.check_dora_scale(dora_scale)


# --- The seventh bug -----------------------------------------------------------------


def moved(layer_class):
    torch.manual_seed(0)
    layer = layer_class(nn.Linear(6, 4).double(), 2, 3.0)
    with torch.no_grad():
        layer.lora.B.normal_()
        layer.m.mul_(torch.linspace(0.5, 1.5, len(layer.m)))
    return layer


def test_the_seventh_layer_has_right_outputs_and_no_gradient_of_m():
    x = torch.randn(5, 6, dtype=torch.float64)
    layer, true = moved(LayerG), moved(LinearWithDoRA)
    torch.testing.assert_close(layer(x), true(x))
    for each in (layer, true):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, true.lora.A.grad)
    torch.testing.assert_close(layer.lora.B.grad, true.lora.B.grad)
    assert layer.m.requires_grad
    assert layer.m.grad is None
    assert true.m.grad is not None


def finds_other_bugs(layer_class):
    """Find the six bugs that outputs show, by their classes' own names for this test."""
    return issubclass(layer_class, LAYERS[:-1])


def test_right_outputs_are_not_enough():
    with pytest.raises(
        ExerciseError, match=r"LayerG passes your test.*gradients of A, B and m"
    ):
        checks.check_finds_bug(finds_other_bugs)


def asks_for_the_gradient(layer_class):
    layer, x = moved(layer_class), torch.ones(1, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.m)
    return finds_other_bugs(layer_class) or not gradient.any()


def reads_the_gradient(layer_class):
    layer = moved(layer_class)
    layer(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    return finds_other_bugs(layer_class) or not layer.m.grad.any()


@pytest.mark.parametrize("test", [asks_for_the_gradient, reads_the_gradient])
def test_a_test_that_stops_where_there_is_no_gradient_is_told_so(test):
    with pytest.raises(ExerciseError) as raised:
        checks.check_finds_bug(test)
    assert str(raised.value).startswith("your test stops at LayerG")
    assert "look for None first" in str(raised.value)


def looks_for_none_first(layer_class):
    layer = moved(layer_class)
    layer(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    trained = (layer.lora.A, layer.lora.B, layer.m)
    return finds_other_bugs(layer_class) or any(p.grad is None for p in trained)


def compares_gradients_with_the_true_layer(layer_class):
    if finds_other_bugs(layer_class):
        return True
    x, found = torch.ones(1, 6, dtype=torch.float64), []
    for each in (moved(layer_class), moved(LinearWithDoRA)):
        each(x).square().sum().backward()
        found.append(torch.zeros(4).double() if each.m.grad is None else each.m.grad)
    return not torch.allclose(*found)


@pytest.mark.parametrize(
    "test", [looks_for_none_first, compares_gradients_with_the_true_layer]
)
def test_a_test_of_gradients_passes(test, capsys):
    checks.check_finds_bug(test)
    assert capsys.readouterr().out == "Exercise 5.4: correct\n"


@pytest.mark.parametrize("detach_norm", [True, False])
def test_whoever_takes_one_norm_s_gradients_for_the_only_right_ones_is_told(
    detach_norm,
):
    def finds_bug(layer_class):
        x, found = torch.randn(5, 6, dtype=torch.float64), []
        wanted = moved(
            lambda *a: LinearWithDoRA(*a, detach_norm=detach_norm),
        )
        for each in (moved(layer_class), wanted):
            each(x).square().sum().backward()
            found.append(each.lora.B.grad)
        return not torch.allclose(*found)

    with pytest.raises(ExerciseError, match="and both are right"):
        checks.check_finds_bug(finds_bug)
