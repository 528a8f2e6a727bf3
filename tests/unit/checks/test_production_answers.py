"""Answers to the exercises of notebook 8 as other learners would write them: right in
another style, or wrong in a likely way."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_utils import checks
from lowrank_utils.adapt import freeze_linear_layers
from lowrank_utils.adapters import save_adapter
from lowrank_utils.checks import ExerciseError
from lowrank_utils.checks.production import _models_with_adapters

PREFIX = "base_model.model."


def tensors_of(model, A=lambda t: t.T, B=lambda t: t.T, end=".weight", prefix=PREFIX):
    """Return a dictionary as the solution does, with another way to write a part."""
    tensors = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora"):
            start = f"{prefix}{name}"
            tensors[f"{start}.lora_A{end}"] = A(layer.lora.A.detach()).contiguous()
            tensors[f"{start}.lora_B{end}"] = B(layer.lora.B.detach()).contiguous()
            if hasattr(layer, "m"):
                tensors[f"{start}.lora_magnitude_vector"] = layer.m
    return tensors


# --- 8.1: what an adapter's file holds ------------------------------------------------


def by_parameters(model):
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".lora.A", ".lora.B")):
            name = name.replace(".lora.", ".lora_") + ".weight"
            tensors[PREFIX + name] = parameter.detach().mT.clone(
                memory_format=torch.contiguous_format
            )
        elif name.endswith(".m"):
            tensors[PREFIX + name[:-1] + "lora_magnitude_vector"] = parameter.detach()
    return tensors


def by_children(module, path="base_model.model"):
    tensors = {}
    for name, child in module.named_children():
        here = f"{path}.{name}"
        if not hasattr(child, "lora"):
            tensors |= by_children(child, here)
            continue
        for part, factor in child.lora.named_parameters():
            flipped = torch.einsum("ij->ji", factor).contiguous()
            tensors[f"{here}.lora_{part}.weight"] = flipped
        if (m := getattr(child, "m", None)) is not None:
            tensors[f"{here}.lora_magnitude_vector"] = m.data.clone()
    return tensors


def copied_and_still_transposed(model):
    """Clone, which keeps the order in memory."""
    state = model.state_dict()
    right = tensors_of(model)
    for name in [name for name in state if ".lora." in name]:
        right[f"{PREFIX}{name.replace('.lora.', '.lora_')}.weight"] = state[
            name
        ].T.clone()
    return right


def without_m(model):
    tensors = tensors_of(model)
    return {name: t for name, t in tensors.items() if "magnitude" not in name}


def m_with_weight(model):
    ending = "magnitude_vector"
    return {
        name + ".weight" * name.endswith(ending): tensor
        for name, tensor in tensors_of(model).items()
    }


def m_for_all(model):
    tensors = tensors_of(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora"):
            norm = layer.linear.weight.norm(dim=1)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = getattr(layer, "m", norm)
    return tensors


def norms_for_m(model):
    tensors = tensors_of(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "m"):
            norm = layer.linear.weight.norm(dim=1)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = norm
    return tensors


def scales_in_place(model):
    for layer in model.modules():
        if hasattr(layer, "lora"):
            layer.lora.B.data.mul_(layer.lora.alpha)
    return tensors_of(model)


def scales_b(model):
    tensors = tensors_of(model)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora"):
            end = f"{PREFIX}{name}.lora_B.weight"
            tensors[end] = layer.lora.alpha * tensors[end]
    return tensors


def three_layers(model):
    names = ["layers.0", "layers.2", "layers.4"]
    return {f"{PREFIX}{n}.lora_A.weight": model.get_submodule(n).lora.A for n in names}


def layers_of_a_perceptron(model):
    adapted = [layer for layer in model.layers if hasattr(layer, "lora")]
    return {f"{PREFIX}layers.0.lora_A.weight": layer.lora.A for layer in adapted}


def m_of_every_layer(model):
    layers = [layer for layer in model.modules() if hasattr(layer, "lora")]
    return {str(i): layer.m for i, layer in enumerate(layers)}


def m_by_its_own_name(model):
    ending = "lora_magnitude_vector"
    return {
        name.removesuffix(ending) + "m" * name.endswith(ending): tensor
        for name, tensor in tensors_of(model).items()
    }


def returns_after_the_first_layer(model):
    for name, layer in model.named_modules():
        if hasattr(layer, "lora"):
            start = f"{PREFIX}{name}"
            return {
                f"{start}.lora_A.weight": layer.lora.A.T.contiguous(),
                f"{start}.lora_B.weight": layer.lora.B.T.contiguous(),
            }
    return {}


def children_alone(model):
    return {
        f"{PREFIX}{name}.lora_A.weight": layer.lora.A.T.contiguous()
        for name, layer in model.named_children()
        if hasattr(layer, "lora")
    }


def names_from_inside(model):
    return {
        f"{PREFIX}{name}.lora_A.weight": layer.lora.A.T.contiguous()
        for name, layer in model.layers.named_children()
        if hasattr(layer, "lora")
    }


# --- 8.2: the norm of V without V -----------------------------------------------------


def terms(W, A, B, alpha):
    """Return the three terms of the squared norm."""
    first = torch.linalg.vector_norm(W, dim=1) ** 2
    second = 2 * alpha * ((W @ A) * B.T).sum(dim=1)
    return first, second, alpha**2 * ((A.T @ A @ B) * B).sum(dim=0)


def scaled_first(W, A, B, alpha):
    B = alpha * B
    mixed = torch.einsum("or,ro->o", W @ A, B)
    length = torch.einsum("ro,rs,so->o", B, A.T @ A, B)
    return (W.unsqueeze(1) @ W.unsqueeze(2)).flatten() + 2 * mixed + length


def row_by_row(W, A, B, alpha):
    squares = []
    for w, b in zip(W, B.T, strict=True):
        u = alpha * (A @ b)
        squares.append(w @ w + 2 * w @ u + u @ u)
    return torch.stack(squares)


def in_chunks(W, A, B, alpha, rows=100):
    squares = [
        (w + alpha * (A @ b).T).square().sum(dim=1)
        for w, b in zip(W.split(rows), B.split(rows, dim=1), strict=True)
    ]
    return torch.cat(squares)


def over_the_rank(W, A, B, alpha):
    """Loop over what is thin, which forms nothing large."""
    squares = torch.linalg.vector_norm(W, dim=1).square()
    for a, b in zip(A.T, B, strict=True):
        squares += 2 * alpha * (W @ a) * b
        for other, its in zip(A.T, B, strict=True):
            squares += alpha**2 * (a @ other) * b * its
    return squares


def by_qr(W, A, B, alpha):
    length = torch.linalg.norm(torch.linalg.qr(A).R @ B * alpha, dim=0) ** 2
    return terms(W, A, B, alpha)[0] + 2 * alpha * (A.T @ W.T * B).sum(0) + length


def half_of_the_digits(W, A, B, alpha):
    squares = W.float().pow(2).sum(dim=1).to(W.dtype)
    return squares + sum(terms(W, A, B, alpha)[1:])


def sparse(W, A, B, alpha):
    squares = W.to_sparse().pow(2).sum(dim=1).to_dense()
    return squares + sum(terms(W, A, B, alpha)[1:])


# --- 8.3: a customer per row ----------------------------------------------------------


def by_matmul(x, W, b, A, B, c, choice):
    y = nn.functional.linear(x, W) + (x[:, None] @ A[choice] @ B[choice])[:, 0]
    return y * c[choice] + b


def by_index_select(x, W, b, A, B, c, choice):
    A, B, c = (t.index_select(0, choice) for t in (A, B, c))
    between = (x.unsqueeze(2) * A).sum(dim=1)
    return torch.addcmul(b, c, x @ W.T + (between.unsqueeze(2) * B).sum(dim=1))


def by_one_hot(x, W, b, A, B, c, choice):
    mine = nn.functional.one_hot(choice, len(A)).to(x.dtype)
    update = torch.einsum("bi,kir,kro,bk->bo", x, A, B, mine)
    return (mine @ c) * (x @ W.T + update) + b


def through_every_customer(x, W, b, A, B, c, choice):
    update = (x @ A @ B)[choice, torch.arange(len(x))]
    return c[choice] * (x @ W.T + update) + b


def on_the_diagonal(x, W, b, A, B, c, choice):
    update = (x @ A @ B)[choice].diagonal().T
    return c[choice] * (x @ W.T + update) + b


def through_every_rows_adapter(x, W, b, A, B, c, choice):
    update = (x @ A[choice] @ B[choice]).diagonal().T
    return c[choice] * (x @ W.T + update) + b


def by_blocks_of_one_size(x, W, b, A, B, c, choice):
    order = choice.argsort(stable=True)
    blocks = x[order].view(len(A), -1, x.shape[1]) @ A @ B
    return c[choice] * (x @ W.T + blocks.flatten(0, 1)[order.argsort()]) + b


def sorted_and_never_back(x, W, b, A, B, c, choice):
    order = choice.argsort(stable=True)
    return by_matmul(x[order], W, b, A, B, c, choice[order])


def updates_never_sorted_back(x, W, b, A, B, c, choice):
    order = choice.argsort(stable=True)
    mine = choice[order]
    update = (x[order].unsqueeze(1) @ A[mine] @ B[mine]).squeeze(1)
    return c[choice] * (x @ W.T + update) + b


def sorted_into_groups(x, W, b, A, B, c, choice):
    y = x @ W.T
    for k in choice.unique():
        rows = choice == k
        y[rows] += x[rows] @ A[k] @ B[k]
    return c[choice] * y + b


RIGHT = {
    "to_peft": [
        tensors_of,
        by_parameters,
        by_children,
        lambda model: tensors_of(model, A=lambda t: t.permute(1, 0).data),
    ],
    "factored_squares": [scaled_first, by_qr, over_the_rank],
    "mixed_batch": [by_matmul, by_index_select],
}

# Right, and not in every respect as it was asked for.
REMARKS = {
    "to_peft": {
        "refuses to save it: add .contiguous()": copied_and_still_transposed,
    },
    "factored_squares": {
        "was built in full": lambda W, A, B, a: (W + a * (A @ B).T).square().sum(1),
        "squares of W were stored": half_of_the_digits,
        "that is all of ΔW": in_chunks,
        "piece by piece": row_by_row,
    },
    "mixed_batch": {
        "with a loop": sorted_into_groups,
        "of every customer or row, for a result of shape (30, 40, 60)": (
            through_every_customer
        ),
        "gather A and B with choice": on_the_diagonal,
        "of every customer or row, for a result of shape (40, 40, 60)": (
            through_every_rows_adapter
        ),
        "a weight was built": lambda x, W, b, A, B, c, k: (
            (c[k, :, None] * (W + (A @ B).mT[k]) @ x[..., None])[..., 0] + b
        ),
    },
}

WRONG = {
    "to_peft": {
        "PEFT's A is (r, in)": lambda model: tensors_of(model, A=lambda t: t),
        "PEFT's B is (out, r)": lambda model: tensors_of(model, B=lambda t: t),
        "isn't a transpose": lambda model: tensors_of(
            model, A=lambda t: t.reshape(t.shape[::-1])
        ),
        "have changed places": lambda model: {
            name: tensors_of(model)[name.translate(str.maketrans("AB", "BA"))]
            for name in tensors_of(model)
        },
        "the config has it": scales_b,
        "end in `.weight`; got": lambda model: tensors_of(model, end=""),
        "the file leaves it out": lambda model: tensors_of(
            model, end=".default.weight"
        ),
        "begins with `base_model.model.`": lambda model: tensors_of(model, prefix=""),
        "with m left out": without_m,
        "without `.weight`": m_with_weight,
        "this layer has no m": m_for_all,
        "that is ‖W‖": norms_for_m,
        "changed in place": scales_in_place,
        "pretrained weights don't": lambda model: model.state_dict(),
        "end in lora_A.weight": lambda model: {
            PREFIX + name: tensor
            for name, tensor in model.state_dict().items()
            if ".lora." in name
        },
        "isn't part of the adapter": lambda model: (
            tensors_of(model) | {PREFIX + "layers.2.alpha": torch.ones(1)}
        ),
        "the dictionary is empty: named_modules() looks": lambda _: {},
        "named_children() doesn't": children_alone,
        "does `return` stand inside the loop?": returns_after_the_first_layer,
        "a layer's whole name belongs in": names_from_inside,
        "the name of m ends in lora_magnitude_vector; got": m_by_its_own_name,
        "'lora': not every layer has an adapter, and models have": three_layers,
        "not every layer has an adapter, and models have": lambda model: (
            layers_of_a_perceptron(model)
            if hasattr(model, "words")
            else tensors_of(model)
        ),
        "only DoRA layers have an m": m_of_every_layer,
        "must be a dictionary": lambda model: list(tensors_of(model).items()),
        "must be text": lambda model: dict(enumerate(tensors_of(model).values())),
        "must be a tensor": lambda model: {
            name: tensor.detach().numpy() for name, tensor in tensors_of(model).items()
        },
        "is the `return` missing": lambda _: None,
    },
    "factored_squares": {
        "is a transpose missing": lambda W, A, B, a: (W @ A * B).sum(1) * 2 * a,
        "the minus of": lambda *p: terms(*p)[0] - terms(*p)[1] + terms(*p)[2],
        "the first term": lambda *p: terms(*p)[1] + terms(*p)[2],
        "the mixed term is missing": lambda *p: terms(*p)[0] + terms(*p)[2],
        "that is the norm": lambda *p: sum(terms(*p)).sqrt(),
        "yours isn't squared": lambda *p: terms(*p)[0].sqrt() + sum(terms(*p)[1:]),
        "the first term is one number": lambda *p: (
            torch.linalg.vector_norm(p[0]).square() + sum(terms(*p)[1:])
        ),
        "dim=1, and it is squared": lambda *p: (
            torch.linalg.vector_norm(p[0]) + sum(terms(*p)[1:])
        ),
        "the mixed term is one number": lambda *p: (
            terms(*p)[0] + terms(*p)[1].sum() + terms(*p)[2]
        ),
        "the last term is one number": lambda *p: (
            sum(terms(*p)[:2]) + terms(*p)[2].sum()
        ),
        "lacks its second B": lambda W, A, B, a: (
            sum(terms(W, A, B, a)[:2]) + a**2 * (A.T @ A @ B).sum(dim=0)
        ),
        "lacks AᵀA": lambda W, A, B, a: (
            sum(terms(W, A, B, a)[:2]) + a**2 * B.square().sum(dim=0)
        ),
        "wrong shape": lambda *p: sum(terms(*p)).sum(),
        "right values in the wrong shape": lambda *p: sum(terms(*p))[:, None],
        "must be a tensor": lambda *p: sum(terms(*p)).tolist(),
    },
    "mixed_batch": {
        "is a transpose missing": lambda x, W, b, *_: x @ W + b,
        "cut into blocks of one size": by_blocks_of_one_size,
        "in another order: sort them back": sorted_and_never_back,
        "the updates stand in the order of the customers": updates_never_sorted_back,
        "x[choice] takes other rows": lambda x, W, b, A, B, c, k: by_matmul(
            x[k], W, b, A, B, c, k
        ),
        "the update comes of x[choice]": lambda x, W, b, A, B, c, k: (
            c[k] * (x @ W.T + (x[k].unsqueeze(1) @ A[k] @ B[k]).squeeze(1)) + b
        ),
        "squeeze it out": lambda x, W, b, A, B, c, k: (
            c[k] * (x @ W.T + x[:, None] @ A[k] @ B[k]) + b
        ),
        "the frozen product": lambda x, _, b, A, B, c, k: (
            c[k] * (x[:, None] @ A[k] @ B[k])[:, 0] + b
        ),
        "stopped at": lambda x, W, b, A, B, c, k: c * by_matmul(x, W, b, A, B, c, k),
        "the bias is scaled": lambda x, W, b, A, B, c, k: (
            c[k] * (x @ W.T + b + (x[:, None] @ A[k] @ B[k])[:, 0])
        ),
        "isn't right yet": lambda x, W, b, A, B, c, k: by_matmul(
            x, W, b, A, B, c, k.flip(0)
        ),
        "must be a tensor": lambda *p: np.asarray(by_matmul(*p)),
    },
}


def named(table):
    return [(name, *pair) for name in table for pair in table[name].items()]


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for name in RIGHT for answer in RIGHT[name]]
)
def test_a_right_answer_in_another_style_passes(name, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


@pytest.mark.parametrize(("name", "words", "answer"), named(REMARKS))
def test_a_right_answer_that_was_forbidden_gets_a_remark(name, words, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    said = capsys.readouterr().out
    assert ": right, but " in said
    assert words in said


@pytest.mark.parametrize(("name", "words", "answer"), named(WRONG))
def test_a_likely_mistake_gets_its_hint(name, words, answer, capsys):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{name}")(answer)
    assert words in str(raised.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("answer", [row_by_row, sparse, half_of_the_digits])
def test_no_way_to_write_the_norm_crashes_the_check(answer, capsys):
    checks.check_factored_squares(answer)
    assert capsys.readouterr().out.startswith("Exercise 8.2: ")


def test_one_hot_rows_are_neither_a_loop_nor_a_weight_for_each(capsys):
    checks.check_mixed_batch(by_one_hot)
    assert capsys.readouterr().out.startswith("Exercise 8.3: ")


def test_what_is_asked_for_is_what_save_adapter_writes_and_can_be_saved(tmp_path):
    model = _models_with_adapters()[0]
    freeze_linear_layers(model)
    save_adapter(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    own = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)
    save_file(own, tmp_path / "own.safetensors")
    views = {name: t.T.contiguous().T for name, t in own.items()}
    with pytest.raises(ValueError, match="contiguous"):
        save_file(views, tmp_path / "views.safetensors")


def test_the_check_draws_from_no_generator_of_others():
    before = torch.get_rng_state()
    checks.check_to_peft(tensors_of)
    assert torch.equal(torch.get_rng_state(), before)
