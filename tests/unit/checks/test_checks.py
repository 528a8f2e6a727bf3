"""Each exercise's check accepts the solution, refuses known mistakes with the right
hint, and shows no answer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import checks
from lowrank_utils.adapt import freeze_linear_layers
from lowrank_utils.checks import ExerciseError
from lowrank_utils.lora import LinearWithLoRA, LoRALayer


def V_of(weight, A, B, alpha):
    return weight + alpha * (A @ B).T


def dora(x, weight, bias, A, B, alpha, m):
    c = m / V_of(weight, A, B, alpha).norm(dim=1)
    return c * (x @ weight.T + alpha * (x @ A @ B)) + bias


def merge(layer, weight=None, bias="clone", dtype="the layer's"):
    dtype = layer.weight.dtype if dtype == "the layer's" else dtype
    plain = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype
    )
    with torch.no_grad():
        plain.weight.copy_(layer.weight if weight is None else weight)
        if layer.bias is not None and bias != "left as drawn":
            plain.bias.copy_(layer.bias)
    if bias == "shared" and layer.bias is not None:
        plain.bias = layer.linear.bias
    if bias == "shared data" and layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data)
    return plain


def merge_in_default_dtype(layer, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        return merge(layer, dtype=None)
    finally:
        torch.set_default_dtype(before)


def merge_in_place(layer):
    with torch.no_grad():
        layer.linear.weight += layer.lora.delta_weight()
    return layer.linear


def freeze_right(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora." in name)


def freeze_by_class(classes):
    def freeze(model):
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, classes):
                for factor in (
                    (module.A, module.B)
                    if hasattr(module, "A")
                    else (module.lora.A, module.lora.B)
                ):
                    factor.requires_grad_(True)

    return freeze


def freeze_by_attribute(model):
    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in model.modules():
        if hasattr(module, "lora"):
            module.lora.requires_grad_(True)


class LocalLoRALayer(nn.Module):
    """Stands for a class that a notebook defines: another one than the package's."""


def freeze_named(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name in {f"linear{i}.lora.{factor}" for i in (1, 2) for factor in "AB"}
        )


def freeze_all_but_wrappers(model):
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "lora"):
            module.requires_grad_(True)


def freeze_what_is_no_adapter(model):
    model.requires_grad_(True)
    for module in model.modules():
        if not isinstance(module, LoRALayer):
            module.requires_grad_(False)


def freeze_the_rest_only(model):
    for name, parameter in model.named_parameters():
        if not name.endswith((".A", ".B")):
            parameter.requires_grad_(False)


def only_magnitudes(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".m"))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def magnitudes_and_factors(model):
    freeze_linear_layers(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def magnitudes_by_attribute(model):
    model.requires_grad_(False)
    magnitudes = [module.m for module in model.modules() if hasattr(module, "m")]
    for m in magnitudes:
        m.requires_grad_(True)
    return sum(m.numel() for m in magnitudes)


def factors_frozen_only(model):
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(False)
    return 17


def every_name_with_an_m(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("m" in name)
    return 17


def nothing_at_all(model):
    model.requires_grad_(False)
    return 0


def tensors_counted(model):
    only_magnitudes(model)
    return sum(p.requires_grad for p in model.parameters())


def in_place_merge_of_weight(weight, A, B, alpha):
    weight += alpha * (A @ B).T
    return weight


def in_place_update(x, weight, A, B):
    weight += (A @ B).T
    return x @ weight.T


def hard_coded_parameters(*_):
    return 3_648


def weight_norm(grad_w, g, v):
    unit = v / v.norm()
    return grad_w @ unit, g / v.norm() * (grad_w - (grad_w @ unit) * unit)


def merged_dora(x, w, b, A, B, a, m):
    V = V_of(w, A, B, a)
    return F.linear(x, (m / V.norm(dim=1)).unsqueeze(1) * V, b)


def factored_dora(x, w, b, A, B, a, m):
    """The norm without A·B; no product of x with a weight other than W."""
    cross = ((w @ A) * B.T).sum(1)
    square = ((B.T @ (A.T @ A)) * B.T).sum(1)
    c = m / (w.square().sum(1) + 2 * a * cross + a * a * square).sqrt()
    return c * (F.linear(x, w) + a * ((x @ A) @ B)) + b


def kept_of(sigma):
    energy = sigma.square().cumsum(0)
    return energy / energy[-1]


def floats(function):
    """Give the same answers as numbers of Python where they are single numbers."""
    return lambda *a: tuple(
        part.item() if part.ndim == 0 else part for part in function(*a)
    )


def kept_share(sigma, share):
    return int((sigma.square().cumsum(0) / sigma.square().sum() < share).sum())


def held_back(
    scores, contains, worse=lambda mine, its: mine[0] < its[0] and mine[1] > its[1]
):
    return [
        method
        for method in scores
        if any(
            worse(scores[method], scores[part])
            for part in contains.get(method, ())
            if part in scores
        )
    ]


def enough_networks(tests, sides=2):
    return next(n for n in range(1, 99) if tests * sides / 2**n <= 0.05)


def sign_flip(d, as_far=lambda means, seen: means.abs() >= seen.abs() - 1e-12):
    signs = torch.tensor(
        list(itertools.product([-1.0, 1.0], repeat=len(d))), dtype=d.dtype
    )
    return as_far((signs * d).mean(dim=1), d.mean()).double().mean()


def scores_emptied(scores):
    best = max(scores, key=lambda rate: sum(scores[rate]))
    scores.clear()
    return best


def factored(w, A, B, a, twice=2, mixed=1, last=2):
    """``mixed`` and ``last`` are the powers of the scaling in these two terms."""
    squares = w.norm(dim=1) ** 2 + twice * a**mixed * ((w @ A) * B.T).sum(1)
    return squares + a**last * ((A.T @ A @ B) * B).sum(0)


def diagonal_of_full(w, A, B, a):
    return (
        w.norm(dim=1) ** 2
        + 2 * a * (w @ A @ B).diag()
        + a**2 * ((A.T @ A @ B) * B).sum(0)
    )


def accumulated_in_place(w, A, B, a):
    return w.addmm_(B.T, A.T, alpha=a).norm(dim=1) ** 2


# Ways to build A·B or V that a list of function names would miss.
FULL_UPDATES = {
    "tensordot": lambda w, A, B, a: w + a * torch.tensordot(A, B, dims=1).T,
    "multi_dot": lambda w, A, B, a: (
        w + a * torch.linalg.multi_dot([torch.eye(len(A), dtype=A.dtype), A, B]).T
    ),
    "baddbmm": lambda w, A, B, a: torch.baddbmm(w[None], B.T[None], A.T[None], alpha=a)[
        0
    ],
    "bmm": lambda w, A, B, a: w + a * torch.bmm(B.T[None], A.T[None])[0],
    "addmm_": lambda w, A, B, a: w.clone().addmm_(B.T, A.T, alpha=a),
    "outer": lambda w, A, B, a: (
        w + a * sum(torch.outer(b, c) for b, c in zip(B, A.T, strict=True))
    ),
    "out": lambda w, A, B, a: torch.addmm(
        w, B.T, A.T, alpha=a, out=torch.empty_like(w)
    ),
}


def mixed(x, w, b, A, B, c, choice):
    update = torch.bmm(torch.bmm(x.unsqueeze(1), A[choice]), B[choice]).squeeze(1)
    return c[choice] * (x @ w.T + update) + b


def mixed_by_rows(x, w, b, A, B, c, choice):
    return torch.stack(
        [
            c[k] * (row @ w.T + row @ A[k] @ B[k]) + b
            for row, k in zip(x, choice, strict=True)
        ]
    )


def mixed_by_customers(x, w, b, A, B, c, choice):
    y = x @ w.T
    for k in range(len(A)):
        y[choice == k] = c[k] * (y[choice == k] + x[choice == k] @ A[k] @ B[k]) + b
    return y


def mixed_by_weights(x, w, b, A, B, c, choice):
    weights = c[choice].unsqueeze(2) * (w + (A @ B).mT[choice])
    return torch.bmm(weights, x.unsqueeze(2)).squeeze(2) + b


def mixed_divided_again(x, w, b, A, B, c, choice):
    return mixed(x, w, b, A, B, c / (w + (A @ B).mT).norm(dim=2), choice)


def mixed_by_einsum(x, w, b, A, B, c, choice):
    update = torch.einsum(
        "br,bro->bo", torch.einsum("bi,bir->br", x, A[choice]), B[choice]
    )
    return torch.addcmul(b, c[choice], x @ w.T + update)


def mixed_by_vmap(x, w, b, A, B, c, choice):
    update = torch.vmap(lambda row, first, second: row @ first @ second)(
        x, A[choice], B[choice]
    )
    return c[choice] * (F.linear(x, w) + update) + b


def mixed_of_all(x, w, b, A, B, c, choice):
    return c[choice] * (x @ w.T + (x @ A @ B)[choice, torch.arange(len(x))]) + b


def mixed_lora(x, w, b, A, B, c, choice):
    return mixed(x, w, b, A, B, torch.ones_like(c), choice)


def starts_as_pretrained(layer_class):
    linear, x = (
        nn.Linear(6, 4, dtype=torch.float64),
        torch.randn(5, 6, dtype=torch.float64),
    )
    return torch.allclose(layer_class(linear, 2, 3.0)(x), linear(x))


def finds_bug_without(*left_out):
    """Return a test of a layer's properties that asks for all but these."""

    def finds_bug(layer_class):
        linear, x = (
            nn.Linear(6, 4, dtype=torch.float64),
            torch.randn(5, 6, dtype=torch.float64),
        )
        layer, zero = (
            layer_class(linear, 2, 3.0),
            torch.zeros(1, 6, dtype=torch.float64),
        )
        with torch.no_grad():
            held = {"start": torch.allclose(layer(x), linear(x))}
            layer.lora.B.normal_()
            lengths = weight_of(layer).norm(dim=1)
            # Of m's lengths only the shape that the others need: a norm per input is
            # found by the outputs.
            held["lengths"] = lengths.shape != layer.m.shape or torch.allclose(
                lengths, layer.m
            )
            before, b = layer(x), layer(zero)
            held["linear"] = torch.allclose(layer(3 * x) - b, 3 * (before - b))
            layer.lora.B.div_(2)
            layer.lora.alpha *= 2
            held["alpha"] = torch.allclose(layer(x), before)
            before = layer(x)
            layer.m[0] *= 2
            held["one output"] = (
                ~torch.isclose(layer(x), before).all(0)
            ).sum().item() == 1
            held["bias"] = torch.allclose(layer(zero), linear.bias)
        return not all(value for name, value in held.items() if name not in left_out)

    return finds_bug


def weight_of(layer):
    return (
        layer(torch.eye(6, dtype=torch.float64))
        - layer(torch.zeros(1, 6, dtype=torch.float64))
    ).T


def moves_m_of_any_shape(layer_class):
    layer = layer_class(nn.Linear(6, 4), 2, 3.0)
    with torch.no_grad():
        layer.m.mul_(torch.linspace(0.5, 1.5, 4))
    return not torch.allclose(layer(torch.zeros(1, 6)), layer.linear.bias)


SOLUTIONS = {
    "adapter_parameters": lambda i, o, r: r * (i + o),
    "smallest_rank": lambda s, share: (
        int((s.square().cumsum(0) < share * s.square().cumsum(0)[-1]).sum()) + 1
    ),
    "apply_update": lambda x, w, A, B: x @ w.T + (x @ A) @ B,
    "scaling": lambda a, r, rs: a / (r**0.5 if rs else r),
    "lora_output": lambda x, w, b, A, B, a: x @ w.T + b + a * (x @ A @ B),
    "freeze_all_but_adapters": freeze_right,
    "merged_weight": V_of,
    "multiplications": lambda b, i, o, r: b * i * o + b * r * (i + o),
    "merge": merge,
    "unit_vector": lambda v: v / v.norm() if v.norm() > 0 else v,
    "split_rows": lambda w: (w.norm(dim=1), w / w.norm(dim=1, keepdim=True)),
    "weight_norm_gradients": weight_norm,
    "dora_scale": lambda w, A, B, a, m: m / V_of(w, A, B, a).norm(dim=1),
    "dora_output": dora,
    "finds_bug": finds_bug_without(),
    "magnitude_gradient": lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).sum(0),
    "standard_error": lambda p, n: (p * (1 - p) / n) ** 0.5,
    "paired_difference": lambda a, b: ((a - b).mean(), (a - b).std() / len(a) ** 0.5),
    "magnitude_only": only_magnitudes,
    "held_back": held_back,
    "enough_networks": enough_networks,
    "sign_flip": sign_flip,
    "to_peft": lambda A, B, a: (A.T, B.T, a * A.shape[1]),
    "factored_squares": factored,
    "mixed_batch": mixed,
}

# Further right answers, as other learners would write them.
OTHER_SOLUTIONS = [
    ("smallest_rank", lambda s, share: int((kept_of(s) < share).sum()) + 1),
    ("smallest_rank", lambda s, share: (kept_of(s) >= share).nonzero()[0, 0] + 1),
    ("smallest_rank", lambda s, share: (kept_of(s) >= share).int().argmax() + 1),
    ("freeze_all_but_adapters", freeze_by_attribute),
    ("freeze_all_but_adapters", freeze_by_class(LoRALayer)),
    ("freeze_all_but_adapters", freeze_by_class(LinearWithLoRA)),
    (
        "merge",
        lambda layer: merge_in_default_dtype(layer, torch.float64).to(
            layer.weight.dtype
        ),
    ),
    ("unit_vector", lambda v: v / v.norm().clamp(min=1e-30)),
    ("unit_vector", lambda v: v if not v.any() else F.normalize(v, dim=0, eps=0)),
    ("weight_norm_gradients", floats(weight_norm)),
    ("apply_update", lambda x, w, A, B: torch.addmm(F.linear(x, w), x @ A, B)),
    (
        "apply_update",
        lambda x, w, A, B: F.linear(x, w) + torch.einsum("bi,ir,ro->bo", x, A, B),
    ),
    ("dora_output", factored_dora),
    (
        "dora_output",
        lambda x, w, b, A, B, a, m: (
            torch.addmm(b, x @ A, B) * 0 + dora(x, w, b, A, B, a, m)
        ),
    ),
    (
        "paired_difference",
        floats(lambda a, b: ((a - b).mean(), (a - b).std() / len(a) ** 0.5)),
    ),
    ("magnitude_only", magnitudes_by_attribute),
    (
        "factored_squares",
        lambda w, A, B, a: (
            torch.einsum("oi,oi->o", w, w)
            + torch.einsum("or,ro->o", 2 * a * (w @ A) + a**2 * (B.T @ (A.T @ A)), B)
        ),
    ),
    (
        "factored_squares",
        lambda w, A, B, a: (
            torch.linalg.vector_norm(w, dim=1).square()
            + torch.linalg.vecdot(
                torch.addmm(F.linear(A.T, w), A.T @ A, B, beta=2 * a, alpha=a**2),
                B,
                dim=0,
            )
        ),
    ),
    ("mixed_batch", mixed_by_einsum),
    (
        "mixed_batch",
        lambda x, w, b, A, B, c, k: (
            c[k] * (x @ w.T + torch.einsum("bi,bir,bro->bo", x, A[k], B[k])) + b
        ),
    ),
    ("mixed_batch", mixed_by_vmap),
    ("mixed_batch", mixed_of_all),
]

# exercise → [(a wrong answer, words of its hint)]
MISTAKES = {
    "adapter_parameters": [
        (lambda i, o, r: i * o, "not their product"),  # noqa: ARG005
        (lambda i, o, r: i * r, "that is A alone"),  # noqa: ARG005
        (lambda i, o, r: r * o, "that is B alone"),  # noqa: ARG005
        (lambda i, o, r: 2 * i * r, "in and out may differ"),  # noqa: ARG005
        (lambda i, o, r: r * i * o, "isn't a factor of the product"),
        (lambda i, o, r: i + r * o, "multiply both sides"),
        (lambda i, o, r: i + o, "where is the rank"),  # noqa: ARG005
        (hard_coded_parameters, "isn't right yet"),
    ],
    "smallest_rank": [
        (lambda s, share: int((s.cumsum(0) / s.sum() < share).sum()) + 1, "adds up squares"),
        (kept_share, "one too few"),
        (lambda s, share: kept_share(s, share) + 2, "one too many"),
        (lambda s, share: len(s) + 5, "isn't right yet"),  # noqa: ARG005
        (lambda s, share: int((kept_of(s).sqrt() < share).sum()) + 1, "don't take the root"),
        (lambda s, share: int(((1 - kept_of(s)).sqrt() > 1 - share).sum()) + 1, "1 − relative error²"),
        (lambda s, share: (kept_of(s) >= share).nonzero()[0] + 1, "must be one number"),
        (lambda s, share: [int((kept_of(s) < share).sum()) + 1], "must be one number"),
        # Right but for rounding: the last entry of the sums is just below 1 here.
        (lambda s, share: kept_share(s, share) + 1, "more than there are"),
        (lambda s, share: int((kept_of(s) <= share).sum()) + 1, "one too many"),
    ],
    "apply_update": [
        (lambda x, w, A, B: x @ w.T, "the update is missing"),  # noqa: ARG005
        (lambda x, w, A, B: x @ A @ B, "the update alone"),  # noqa: ARG005
        (lambda x, w, A, B: x @ (w.T + A @ B), "A·B was built in full"),
        (lambda x, w, A, B: x @ w.T + x @ (A @ B), "A·B was built in full"),
        (lambda x, w, A, B: x @ w.T - (x @ A) @ B, "not taken away"),
        (in_place_update, "weight was changed in place"),
        (lambda x, w, A, B: (x @ w.T + x @ A @ B).float(), "wrong dtype"),
    ],
    "scaling": [
        (lambda a, r, rs: a * (r**0.5 if rs else r), "divide instead"),
        (lambda a, r, rs: a / (r if rs else r**0.5), "the other rule"),
        (lambda a, r, rs: a, "article's rule"),  # noqa: ARG005
        (lambda a, r, rs: (r**0.5 if rs else r) / a, "upside down"),
    ],
    "lora_output": [
        (lambda x, w, b, A, B, a: x @ w.T + b + x @ A @ B, "where is alpha"),  # noqa: ARG005
        (lambda x, w, b, A, B, a: x @ w.T + b + a / B.shape[0] * (x @ A @ B), "not divided by the rank"),
        (lambda x, w, b, A, B, a: a * (x @ w.T + b + x @ A @ B), "not the frozen layer"),
        (lambda x, w, b, A, B, a: x @ w.T + a * (x @ A @ B), "bias is missing"),  # noqa: ARG005
        (lambda x, w, b, A, B, a: a * (x @ A @ B), "frozen layer is missing"),  # noqa: ARG005
        (lambda x, w, b, A, B, a: x @ w.T + a * (x @ A @ B + b), "bias is scaled"),
        (lambda x, w, b, A, B, a: (x @ w.T + b + a * (x @ A @ B)).T, "is transposed"),
        (lambda x, w, b, A, B, a: (x @ w.T + b + a * (x @ A @ B)).flatten(), "right values in the wrong shape"),
        (lambda x, w, b, A, B, a: (x @ w.T + b + a * (x @ A @ B)).float(), "wrong dtype"),
    ],
    "freeze_all_but_adapters": [
        (freeze_linear_layers, "not every layer is an nn.Linear"),
        (lambda model: model.requires_grad_(False), "everything is frozen"),
        (lambda model: model, "still trainable"),
        (lambda model: [p.requires_grad_(n.endswith("A")) for n, p in model.named_parameters()], "must be trainable"),
        (freeze_by_class(LocalLoRALayer), "the package's class"),
        (freeze_the_rest_only, "frozen before"),
        (freeze_named, "everything is frozen"),
        (freeze_all_but_wrappers, "the pretrained layer as well"),
        (freeze_what_is_no_adapter, "reaches all that is inside it"),
    ],
    "merged_weight": [
        (lambda w, A, B, a: w + (A @ B).T, "where is alpha"),  # noqa: ARG005
        (lambda w, A, B, a: w.T + a * (A @ B), "its transpose"),
        (lambda w, A, B, a: a * (w + (A @ B).T), "alpha scales the update alone"),
        (lambda w, A, B, a: a * (A @ B).T, "ΔW alone"),  # noqa: ARG005
        (lambda w, A, B, a: w, "W alone"),  # noqa: ARG005
        (lambda w, A, B, a: w + a / len(B) * (A @ B).T, "not divided by the rank"),
        (in_place_merge_of_weight, "weight was changed in place"),
        (lambda w, A, B, a: w - a * (A @ B).T, "not subtracted"),
        (lambda w, A, B, a: w + a * (a * (A @ B).T), "multiplied once"),
    ],
    "multiplications": [
        (lambda b, i, o, r: b * r * (i + o), "frozen layer's product is missing"),
        (lambda b, i, o, r: b * i * o, "frozen layer alone"),  # noqa: ARG005
        (lambda b, i, o, r: b * i * o + r * i * o, "isn't built"),
        (lambda b, i, o, r: b * i * o + r * (i + o), "each row of the batch"),
        (lambda b, i, o, r: b * i * o + b * r * i, "and then the product with B"),
        (lambda b, i, o, r: b * i * o + b * r * (i + o) + b * o, "scaling of the output isn't counted"),
        (lambda b, i, o, r: b * i * o + b * r * (i + o) + b * r, "scaling of x·A isn't counted"),
        (lambda b, i, o, r: b * i * o + b * r * (i + o) + b * i, "scaling of x isn't counted"),
        (lambda b, i, o, r: b * i * o + b * r * o, "before it the product x·A"),
        (lambda b, i, o, r: i * o + r * (i + o), "the batch as one of its sizes"),  # noqa: ARG005
        (lambda b, i, o, r: 2 * (b * i * o + b * r * (i + o)), "multiplications alone"),
        (lambda b, i, o, r: b * i * o + b * i * r * o, "costs add up"),
    ],
    "merge": [
        (lambda layer: layer, "plain nn.Linear"),
        (merge_in_place, "was changed"),
        (lambda layer: merge(layer, weight=layer.linear.weight), "the update is missing"),
        (lambda layer: merge(layer, weight=layer.linear.weight + layer.lora.delta_weight() / 2.5), "where is alpha"),
        (lambda layer: merge(layer, weight=layer.lora.delta_weight()), "ΔW alone"),
        (lambda layer: merge(layer, bias="left as drawn"), "the bias isn't the layer's"),
        (lambda layer: nn.Linear(layer.out_features, layer.in_features), "wrong shape"),
        (lambda layer: merge(layer, bias="shared"), "share memory"),
        (lambda layer: merge(layer, bias="shared data"), "share memory"),
        (lambda layer: merge_in_default_dtype(layer, torch.float64), "float64 instead of torch.float32"),
        (lambda layer: merge_in_default_dtype(layer, torch.float32), "float32 instead of torch.float64"),
        (lambda layer: nn.Linear(7, 4, bias=False, dtype=torch.float64), "must have a bias"),  # noqa: ARG005
    ],
    "unit_vector": [
        (lambda v: v / v.sum(), "sum of the entries"),
        (lambda v: v / v.abs().sum(), "absolute values"),
        (lambda v: v / v.square().sum(), "take the root"),
        (lambda v: v / v.abs().max(), "largest entry"),
        (lambda v: v / v.norm(), "NaN"),
        (lambda v: v, "the vector itself"),
        (lambda v: v / v.norm() if (v != 0).all() else v * 0, "a zero in it"),
        (lambda v: v / v.norm() if v.sum() != 0 else v * 0, "sum of 0"),
        (lambda v: v / v.norm().clamp(min=1), "shorter than 1"),
        (lambda v: v / v.norm().clamp(min=1e-3), "shorter than 1"),
    ],
    "split_rows": [
        (lambda w: (w.norm(dim=0), w / w.norm(dim=0)), "one norm per input"),
        (lambda w: (w.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)), "keepdim"),
        (lambda w: (w.square().sum(1), w / w.norm(dim=1, keepdim=True)), "squared lengths"),
        (lambda w: (w.norm(dim=1), w / w.norm(dim=0)), "wrong axis"),
        (lambda w: (w.norm(dim=1), w), "not the weight"),
        (lambda w: w.norm(dim=1), "tuple of 2"),
        (lambda w: (w.norm(), w / w.norm(dim=1, keepdim=True)), "one norm for the whole weight"),
        (lambda w: (w.norm(dim=1), w / w.square().sum(dim=1, keepdim=True)), "by the squared lengths"),
        (lambda w: (w.norm(dim=1), (w / w.norm(dim=1, keepdim=True)).T), "yours are transposed"),
        (lambda w: (w.norm(dim=1), w.div_(w.norm(dim=1, keepdim=True))), "weight was changed in place"),
    ],
    "weight_norm_gradients": [
        (lambda gw, g, v: (gw @ v, gw), "divide v by its length"),  # noqa: ARG005
        (lambda gw, g, v: (gw @ v / v.norm(), g / v.norm() * gw), "subtract it"),
        (lambda gw, g, v: (weight_norm(gw, g, v)[0], weight_norm(gw, g, v)[1] * v.norm() / g), "scaled by g"),
        (lambda gw, g, v: (weight_norm(gw, g, v)[0], weight_norm(gw, g, v)[1] * v.norm()), "divided by ‖v‖"),
        (lambda gw, g, v: (weight_norm(gw, g, v)[0], weight_norm(gw, g, v)[1] / g), "scaled by g too"),
        (lambda gw, g, v: (gw * v / v.norm(), weight_norm(gw, g, v)[1]), "take the dot product"),
    ],
    "dora_scale": [
        (lambda w, A, B, a, m: m / w.norm(dim=1), "V is W"),  # noqa: ARG005
        (lambda w, A, B, a, m: V_of(w, A, B, a).norm(dim=1) / m, "upside down"),
        (lambda w, A, B, a, m: m / V_of(w, A, B, 1).norm(dim=1), "alpha is missing"),  # noqa: ARG005
        (lambda w, A, B, a, m: (m / V_of(w, A, B, a).norm(dim=1)).unsqueeze(1), "shape"),
        (lambda w, A, B, a, m: 1 / V_of(w, A, B, a).norm(dim=1), "where is m"),  # noqa: ARG005
        (lambda w, A, B, a, m: m / V_of(w, A, B, a).square().sum(1), "take the root"),
        (lambda w, A, B, a, m: m / V_of(w, A, B, a).norm(), "each row has its own"),
        (lambda w, A, B, a, m: m / V_of(w, A, B, a).norm(dim=0)[: len(m)], "isn't right yet"),
    ],
    "dora_output": [
        (lambda x, w, b, A, B, a, m: dora(x, w, 0, A, B, a, m) + dora(x * 0, w, 0, A, B, a, m) + b * m
            / V_of(w, A, B, a).norm(dim=1), "bias is scaled"),
        (lambda x, w, b, A, B, a, m: x @ w.T + b + a * (x @ A @ B), "that is LoRA"),  # noqa: ARG005
        (lambda x, w, b, A, B, a, m: x @ w.T + m / V_of(w, A, B, a).norm(dim=1) * a * (x @ A @ B) + b,
            "frozen product too"),
        (lambda x, w, b, A, B, a, m: x @ w.T + m * F.normalize(x @ A @ B, dim=1) + b, "per example"),  # noqa: ARG005
        (lambda x, w, b, A, B, a, m: m / w.norm(dim=1) * (x @ w.T + a * (x @ A @ B)) + b, "norms of W"),
        (lambda x, w, b, A, B, a, m: m * (x @ w.T + a * (x @ A @ B)) + b, "not divided"),
        (lambda x, w, b, A, B, a, m: dora(x, w, 0, A, B, a, m), "bias is missing"),  # noqa: ARG005
        (merged_dora, "that is the merged form"),
        (lambda x, w, b, A, B, a, m: m / V_of(w, A, B, a).norm(dim=1) * (x @ V_of(w, A, B, a).T) + b,
            "that is the merged form"),
        (lambda x, w, b, A, B, a, m: m / V_of(w, A, B, a).norm(dim=1) * (x @ w.T) + a * (x @ A @ B) + b,
            "scales the update too"),
        (lambda x, w, b, A, B, a, m: m * F.normalize(x @ w.T + a * (x @ A @ B), dim=1) + b, "norm of the output"),
        (lambda x, w, b, A, B, a, m: dora(x, w, b, A, B, a, torch.ones_like(m)), "not multiplied by m"),
        (lambda x, w, b, A, B, a, m: dora(x, w, b, A, B, 1, m), "alpha is missing"),  # noqa: ARG005
        (lambda x, w, b, A, B, a, m: m / V_of(w, A, B, a).norm(dim=1) * (x @ w.T + x @ A @ B) + b, "missing in the sum"),
        (lambda x, w, b, A, B, a, m: m / V_of(w, A, B, 1).norm(dim=1) * (x @ w.T + a * (x @ A @ B)) + b, "missing in V"),
    ],
    "finds_bug": [
        (lambda cls: not starts_as_pretrained(cls), "LayerA passes your test, but it has a bug. Test what comes out at x = 0"),
        (finds_bug_without("bias"), "LayerA passes"),
        (finds_bug_without("one output"), "LayerB passes"),
        (finds_bug_without("alpha"), "LayerC passes"),
        (finds_bug_without("linear", "lengths"), "LayerD passes"),
        (finds_bug_without("start", "lengths"), "LayerE passes"),
        (finds_bug_without("lengths"), "LayerF passes"),
        (lambda cls: True, "a right layer is accused"),  # noqa: ARG005
        (lambda cls: cls.__name__.startswith("Layer") and cls.__name__ != "Layer", "LayerA passes"),
        (moves_m_of_any_shape, "your test stops at LayerB"),
        (lambda cls: torch.tensor([False, True]), "must return True or False"),  # noqa: ARG005
    ],
    "magnitude_gradient": [
        (lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).mean(0), "don't average"),
        (lambda gy, x, V: (gy * (x @ V.T)).sum(0), "divide by"),
        (lambda gy, x, V: gy * (x @ V.T) / V.norm(dim=1), "sum over the batch"),
        (lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).sum(1), "not over the outputs"),
        (lambda gy, x, V: (gy * (x @ V.T) / V.square().sum(1)).sum(0), "not by its square"),
        (lambda gy, x, V: (x @ V.T / V.norm(dim=1)).sum(0), "grad_y, is missing"),  # noqa: ARG005
    ],
    "standard_error": [
        (lambda p, n: p * (1 - p) / n, "take the root"),
        (lambda p, n: (p * (1 - p)) ** 0.5, "divide by the number"),  # noqa: ARG005
        (lambda p, n: (p * (1 - p)) ** 0.5 / n, "over n as well"),
        (lambda p, n: p * (1 - p) / n**0.5, "the root goes over p"),
        (lambda p, n: (p / n) ** 0.5, "1 − p"),
        (lambda p, n: None, "is the `return` missing"),  # noqa: ARG005
    ],
    "paired_difference": [
        (lambda a, b: ((b - a).mean(), (a - b).std() / len(a) ** 0.5), "first − second"),
        (lambda a, b: ((a - b).abs().mean(), (a - b).std() / len(a) ** 0.5), "absolute values"),
        (lambda a, b: ((a - b).mean(), ((a.var() + b.var()) / len(a)).sqrt()), "unrelated"),
        (lambda a, b: ((a - b).mean(), (a - b).std()), "steadier"),
        (lambda a, b: ((a - b).mean(), (a - b).std(correction=0) / len(a) ** 0.5), "n − 1"),
        (lambda a, b: ((a - b).mean(), (a - b).std() / len(a)), "not by n"),
        (lambda a, b: ((a - b).mean(), (a - b).var() / len(a)), "square of it"),
        (lambda a, b: ((a - b).mean(), (a - b).std() / (len(a) - 1) ** 0.5), "n − 1 already"),
        (lambda a, b: None, "is the `return` missing"),  # noqa: ARG005
        (lambda a, b: ((a - b).mean(), (a - b).std() / 2), "isn't right yet"),  # the root of the first example's n,
    ],
    "magnitude_only": [
        (magnitudes_and_factors, "A and B are still trainable"),
        (nothing_at_all, "the three m"),
        (factors_frozen_only, "the three m"),
        (every_name_with_an_m, "norm.bias"),
        (tensors_counted, "not the tensors"),
        (lambda model: only_magnitudes(model) * 0 + sum(p.numel() for p in model.parameters()), "frozen numbers too"),
        (lambda model: only_magnitudes(model) * 0 + 17, "isn't right yet"),  # the first example's count
    ],
    "held_back": [
        (lambda s, c: held_back(s, c, lambda mine, its: mine[0] < its[0]), "the score alone"),
        (lambda s, c: held_back(s, c, lambda mine, its: mine[1] > its[1]), "the training loss alone"),
        (lambda s, c: held_back(s, {m: p[:1] for m, p in c.items()}), "second submodel"),
        (lambda s, c: held_back(s, {m: p[1:] for m, p in c.items()}), "first submodel"),
        (
            lambda s, c: [
                m
                for m in s
                if any(s[m][0] < s[p][0] for p in c.get(m, ()) if p in s)
                and any(s[m][1] > s[p][1] for p in c.get(m, ()) if p in s)
            ],
            "no single submodel",
        ),
        (lambda s, c: [m for m in s if held_back(s, {m: list(s)})], "only in the first submodel"),  # noqa: ARG005
        (lambda s, c: "whole", "must be a list of names"),  # noqa: ARG005
        (lambda s, c: None, "`return`"),  # noqa: ARG005
    ],
    "enough_networks": [
        (lambda tests: enough_networks(tests, sides=1), "not 1/2ⁿ"),
        (lambda tests: enough_networks(1), "multiplies the smallest p"),  # noqa: ARG005
        (lambda tests: enough_networks(tests) + 1, "one network more"),
        (lambda tests: 12, "isn't right yet"),  # noqa: ARG005
        (lambda tests: None, "`return`"),  # noqa: ARG005
    ],
    "sign_flip": [
        (lambda d: sign_flip(d, lambda means, seen: means >= seen - 1e-12), "both sides of zero"),
        (lambda d: sign_flip(d, lambda means, seen: means.abs() > seen.abs() + 1e-12), "≥, not >"),
        (lambda d: sign_flip(d) * 2 ** len(d), "not their number"),
        (lambda d: d.mean(), "isn't right yet"),
        (lambda d: sign_flip(d.abs_()), "was changed in place"),
    ],
    "to_peft": [
        (lambda A, B, a: (A, B.T, a * len(B)), "PEFT's A is"),
        (lambda A, B, a: (A.T, B, a * len(B)), "PEFT's B is"),
        (lambda A, B, a: (B.T, A.T, a * len(B)), "changed places"),
        (lambda A, B, a: (A.T, B.T, a / len(B)), "multiply by it"),
        (lambda A, B, a: (A.T, B.T, a), "scaling itself"),
        (lambda A, B, a: (A.T, B.T, a * len(B) ** 0.5), "rsLoRA"),
        (lambda A, B, a: (A.T, B.T, a * 3), "isn't right yet"),  # the rank of the first example
    ],
    "factored_squares": [
        (lambda w, A, B, a: factored(w, A, B, a, twice=0), "mixed term is missing"),
        (lambda w, A, B, a: factored(w, A, B, a, twice=1), "yours comes once"),
        (lambda w, A, B, a: factored(w, A, B, a, last=1), "should be squared in the last term"),
        (lambda w, A, B, a: factored(w, A, B, a, last=0), "last term lacks the scaling"),
        (lambda w, A, B, a: factored(w, A, B, a, mixed=0), "mixed term lacks the scaling"),
        (lambda w, A, B, a: factored(w, A, B, a, mixed=2), "squared in your mixed term"),
        (lambda w, A, B, a: factored(w, A, B, 1), "alpha is missing"),  # noqa: ARG005
        (lambda w, A, B, a: factored(w, A, B, a).sqrt(), "that is the norm"),
        (lambda w, A, B, a: V_of(w, A, B, a).square().sum(0), "sum over the inputs"),
        (lambda w, A, B, a: w.square().sum(1), "W alone"),  # noqa: ARG005
        (lambda w, A, B, a: V_of(w, A, B, a).square().sum(1), "A·B was built in full"),
        *[(lambda w, A, B, a, V=V: V(w, A, B, a).norm(dim=1) ** 2, "A·B was built in full")
          for name, V in FULL_UPDATES.items() if name != "multi_dot"],
        (lambda w, A, B, a: FULL_UPDATES["multi_dot"](w, A, B, a).norm(dim=1) ** 2, "right, but"),
        (lambda w, A, B, a: w.norm(dim=1) ** 2 + 2 * a * ((w @ A) * B.T).sum(1)
            + a**2 * (A[:, None] * B.T[None]).sum(2).square().sum(0), "was stored"),
        (diagonal_of_full, "shape (200, 200)"),
        (lambda w, A, B, a: factored(w, A, B, a) - w.norm(dim=1) ** 2 + w.square().sum(1), "squares of W"),
        (accumulated_in_place, "changed in place"),
    ],
    "mixed_batch": [
        (lambda x, w, b, A, B, c, k: mixed(x, w, b, A, B, c, k[:1].expand(len(k))), "the first row's adapter"),
        (lambda x, w, b, A, B, c, k: mixed(x, w, b * 0, A, B, c, k) + c[k] * b, "bias is scaled"),
        (mixed_lora, "where is c"),
        (lambda x, w, b, A, B, c, k: x @ w.T + c[k] * (mixed_lora(x, w * 0, 0, A, B, c, k)) + b,
            "should scale the frozen product too"),
        (lambda x, w, b, A, B, c, k: c[k] * (x @ w.T) + mixed_lora(x, w * 0, b, A, B, c, k), "should scale the update too"),
        (mixed_divided_again, "m/‖V‖ already"),
        (mixed_by_rows, "with a loop"),
        (mixed_by_customers, "with a loop"),
        (mixed_by_weights, "a weight was built"),
        (lambda x, w, b, A, B, c, k: c[k] * (x @ w.T + torch.bmm(x[:, None], (A @ B)[k])[:, 0]) + b, "a weight was built"),
        (lambda x, w, b, A, B, c, k: mixed(x, w, 0, A, B, c, k), "bias is missing"),  # noqa: ARG005
        (lambda x, w, b, A, B, c, k: c[k] * (x @ w.T + sum(x @ p @ q for p, q in zip(A, B, strict=True))) + b,
            "added up"),
    ],
}  # fmt: skip


def untouched(*_):
    raise NotImplementedError("Exercise 0.0: write it")


def test_every_check_is_tested():
    names = {
        name.removeprefix("check_")
        for name in vars(checks)
        if name.startswith("check_")
    }
    assert names == SOLUTIONS.keys() == MISTAKES.keys()


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name, capsys):
    getattr(checks, f"check_{name}")(SOLUTIONS[name])
    assert capsys.readouterr().out.endswith(": correct\n")


@pytest.mark.parametrize(("name", "solution"), OTHER_SOLUTIONS)
def test_another_right_answer_passes(name, solution, capsys):
    getattr(checks, f"check_{name}")(solution)
    assert capsys.readouterr().out.endswith(": correct\n")


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_merged_layer_keeps_the_dtype_whatever_the_default_is(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        checks.check_merge(merge)
        with pytest.raises(ExerciseError, match="dtype"):
            checks.check_merge(lambda layer: merge(layer, dtype=None))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_an_untouched_exercise_shows_its_own_message(name, capsys):
    getattr(checks, f"check_{name}")(untouched)
    assert capsys.readouterr().out == "To do: Exercise 0.0: write it\n"


@pytest.mark.parametrize(
    ("name", "wrong", "hint"),
    [(name, wrong, hint) for name, cases in MISTAKES.items() for wrong, hint in cases],
    ids=[f"{name}: {hint}" for name, cases in MISTAKES.items() for _, hint in cases],
)
def test_a_known_mistake_gets_its_hint(name, wrong, hint, capsys):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{name}")(wrong)
    assert hint in str(raised.value)
    assert "correct" not in capsys.readouterr().out


@pytest.mark.parametrize("name", SOLUTIONS)
@pytest.mark.parametrize("nonsense", [None, "42", float("nan")])
def test_nonsense_is_refused(name, nonsense):
    with pytest.raises(ExerciseError):
        getattr(checks, f"check_{name}")(lambda *_: nonsense)


@pytest.mark.parametrize("name", MISTAKES)
def test_every_exercise_knows_four_mistakes_or_more(name):
    assert len({hint for _, hint in MISTAKES[name] if hint != "isn't right yet"}) >= 4


# Exercises on a model. How each could be answered for one example alone stands among
# their mistakes.
ON_MODELS = {"freeze_all_but_adapters", "merge", "magnitude_only", "finds_bug"}
ON_VALUES = [name for name in SOLUTIONS if name not in ON_MODELS]
ON_NUMBERS = {
    "adapter_parameters",
    "scaling",
    "multiplications",
    "standard_error",
    "enough_networks",
}


@pytest.mark.parametrize("name", ON_VALUES)
def test_the_answer_to_the_first_example_is_refused_for_the_next(name):
    answers = []

    def hard_coded(*inputs):
        if not answers:
            answers.append(SOLUTIONS[name](*inputs))
        return answers[0]

    with pytest.raises(ExerciseError):
        getattr(checks, f"check_{name}")(hard_coded)


@pytest.mark.parametrize("name", [name for name in ON_VALUES if name not in ON_NUMBERS])
def test_a_right_answer_that_changes_what_it_was_given_is_refused(name):
    def in_place(*inputs):
        answer = SOLUTIONS[name](*inputs)
        if isinstance(inputs[0], torch.Tensor):
            inputs[0].add_(1)
        else:
            inputs[0].clear()
        return answer

    with pytest.raises(ExerciseError, match="was changed in place"):
        getattr(checks, f"check_{name}")(in_place)


def with_tensors(answer, change):
    """Return the answer with ``change`` applied to its tensors that aren't single
    numbers."""
    if isinstance(answer, tuple):
        return tuple(with_tensors(part, change) for part in answer)
    return (
        change(answer) if isinstance(answer, torch.Tensor) and answer.ndim else answer
    )


RETURNS_TENSORS = [
    "apply_update",
    "lora_output",
    "merged_weight",
    "unit_vector",
    "split_rows",
    "weight_norm_gradients",
    "dora_scale",
    "dora_output",
    "magnitude_gradient",
    "to_peft",
    "factored_squares",
    "mixed_batch",
]


@pytest.mark.parametrize("name", RETURNS_TENSORS)
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            lambda tensor: tensor.float(),
            "wrong dtype: torch.float32 instead of torch.float64",
        ),
        (lambda tensor: tensor.unsqueeze(0), "right values in the wrong shape"),
        (lambda tensor: tensor[:1], "wrong shape"),
    ],
    ids=["dtype", "one dimension more", "cut"],
)
def test_right_values_of_another_kind_are_told_from_wrong_values(name, change, hint):
    with pytest.raises(ExerciseError, match=hint):
        getattr(checks, f"check_{name}")(
            lambda *inputs: with_tensors(SOLUTIONS[name](*inputs), change)
        )
