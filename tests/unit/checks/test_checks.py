"""Each exercise's check accepts the solution, refuses known mistakes with the right
hint, and shows no answer."""

import itertools
import linecache
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import checks
from lowrank_utils.adapt import freeze_linear_layers
from lowrank_utils.checks import ExerciseError
from lowrank_utils.lora import LinearWithLoRA, LoRALayer


class Parts:
    """The parts of an adapted layer, each under a letter, and what they amount to."""

    a = 1

    def __init__(self, **parts):
        vars(self).update(parts)

    base = cached_property(lambda p: p.x @ p.w.T)
    xAB = cached_property(lambda p: (p.x.unsqueeze(-2) @ p.A @ p.B).squeeze(-2))
    update = cached_property(lambda p: p.a * p.xAB)
    V = cached_property(lambda p: p.w + p.a * (p.A @ p.B).mT)
    unscaled = cached_property(lambda p: p.w + (p.A @ p.B).mT)
    y = cached_property(lambda p: p.base + p.update)
    c = cached_property(lambda p: p.m / p.V.norm(dim=-1))
    dora = cached_property(lambda p: p.c * p.y + p.b)
    by_all = cached_property(lambda p: p.x @ p.stored.A @ p.stored.B)
    wA = cached_property(lambda p: p.w @ p.A)
    squares = cached_property(lambda p: torch.linalg.vector_norm(p.w, dim=1) ** 2)

    def but(self, **others):
        """Return the same parts with others in the places of some."""
        given = {key: vars(self)[key] for key in "xwABbcm" if key in vars(self)}
        return Parts(**{**given, "a": self.a, **others})


# The exercises whose answers are written as functions of such parts: the letters stand
# in the order in which the check passes them.
GIVEN = {
    "apply_update": "xwAB",
    "lora_output": "xwbABa",
    "merged_weight": "wABa",
    "dora_scale": "wABam",
    "dora_output": "xwbABam",
    "factored_squares": "wABa",
    "mixed_batch": "xwbABck",
}


def written_out(name, answer):
    """Return an answer as the check calls it. Where k chooses, A, B and c are those of
    the rows; ``stored`` has all."""

    def of_parts(*inputs):
        parts = Parts(**dict(zip(GIVEN[name], inputs, strict=True)))
        if name != "mixed_batch":
            return answer(parts)
        k, chosen = parts.k, {"A": parts.A, "B": parts.B, "c": parts.c}
        rows = {letter: value[k] for letter, value in chosen.items()}
        return answer(parts.but(**rows, k=k, stored=parts))

    return of_parts if name in GIVEN else answer


def train(model, chosen):
    """Make trainable what has a chosen name, nothing else, and return its size."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fine_tune(model, batches, rate, factor, forget=True, optimizer=torch.optim.Adam):
    groups = [
        {"params": [p], "lr": rate * factor if name.endswith(".m") else rate}
        for name, p in model.named_parameters()
    ]
    update = optimizer(groups)
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        if forget:
            update.zero_grad()
        loss.backward()
        update.step()
    return loss.item()


def train_modules(model, kind):
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, kind):
            module.requires_grad_(True)


ONE_AND_TWO = ("linear1.lora.", "linear2.lora.")


def sets_an_attribute(model):
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.requires_grad = True
            module.A.requires_grad_()


def keep_adapters(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return train(model, lambda name: ".lora." in name and flags[name])


def merge(layer, weight=None, bias="clone", dtype="the layer's"):
    dtype = layer.weight.dtype if dtype == "the layer's" else dtype
    has_bias = layer.bias is not None
    plain = nn.Linear(layer.in_features, layer.out_features, has_bias, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight if weight is None else weight)
        if has_bias and bias == "clone":
            plain.bias.copy_(layer.bias)
    if has_bias and bias == "shared":
        plain.bias = nn.Parameter(layer.bias.data)
    return plain


def merge_in_place(layer):
    with torch.no_grad():
        layer.linear.weight += layer.lora.delta_weight()
    return layer.linear


def kept_of(sigma):
    energy = sigma.square().cumsum(0)
    return energy / energy[-1]


def first(values, share):
    return int((values < share).sum()) + 1


def rows(w):
    return w.norm(dim=1, keepdim=True)


def weight_norm(grad_w, g, v):
    unit = v / v.norm()
    return grad_w @ unit, g / v.norm() * (grad_w - (grad_w @ unit) * unit)


def times(factor):
    """Return the solution with v's gradient multiplied by factor(g, ‖v‖)."""
    return lambda grad_w, g, v: (
        weight_norm(grad_w, g, v)[0],
        weight_norm(grad_w, g, v)[1] * factor(g, v.norm()),
    )


def floats(function):
    """Give the same answers as numbers of Python where they are single numbers."""
    return lambda *a: tuple(
        part.item() if part.ndim == 0 else part for part in function(*a)
    )


def paired(a, b):
    return (a - b).mean(), (a - b).std() / len(a) ** 0.5


def error_of_mean(formula):
    """Return a function of paired numbers that takes the error from this formula."""
    return lambda a, b: ((a - b).mean(), formula(a - b))


def lower_score(mine, its):
    return mine[0] < its[0]


def more_loss(mine, its):
    return mine[1] > its[1]


def held_back(scores, contains, *worse):
    """Return the methods that are worse than one of their parts in all of these."""
    return [
        method
        for method in scores
        if any(
            all(is_worse(scores[method], scores[part]) for is_worse in worse or WORSE)
            for part in scores.keys() & contains.get(method, ())
        )
    ]


WORSE = (lower_score, more_loss)


def enough_networks(tests, sides=2):
    return next(n for n in range(1, 99) if tests * sides / 2**n <= 0.05)


def sign_flip(d, as_far=lambda means, seen: means.abs() >= seen.abs() - 1e-12):
    signs = torch.tensor(
        list(itertools.product([-1.0, 1.0], repeat=len(d))), dtype=d.dtype
    )
    return as_far((signs * d).mean(dim=1), d.mean()).double().mean()


def pefts_tensors(model, copied=torch.Tensor.contiguous, parts="ABm"):
    """Return what an adapter's file holds of A, B and m."""
    tensors = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora"):
            start, lora = f"base_model.model.{name}.lora_", layer.lora
            found = {"A.weight": lora.A.T, "B.weight": lora.B.T}
            if hasattr(layer, "m"):
                found["magnitude_vector"] = layer.m
            for part, tensor in found.items():
                if part[0] in parts:
                    tensors[start + part] = copied(tensor)
    return tensors


def changed_peft(end, change):
    """Return the solution with what ends so changed."""
    return lambda model: {
        name: change(tensor) if name.endswith(end) else tensor
        for name, tensor in pefts_tensors(model).items()
    }


def renamed_peft(old, new):
    return lambda model: {
        name.replace(old, new): tensor for name, tensor in pefts_tensors(model).items()
    }


def peft_names_of_state(model):
    tensors = {}
    for name, tensor in model.state_dict().items():
        start, _, part = name.rpartition(".")
        if start.endswith(".lora"):
            tensors[f"base_model.model.{start}_{part}.weight"] = tensor.t().contiguous()
        elif part == "m":
            tensors[f"base_model.model.{start}.lora_magnitude_vector"] = tensor
    return tensors


def held_in_training(weights, trained, size, of_each=12):
    return weights * size + trained * of_each


def mean_of_tokens(hidden, mask, dim=1):
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=dim) / weights.sum(dim=dim)


def accumulate(
    model, optimizer, batches, weigh=lambda rows, examples, _: rows / examples
):
    """Leave the gradients of all batches, and return the sum of the losses, each
    multiplied by what ``weigh`` makes of the rows, of all rows and of the batches."""
    examples = sum(len(y) for _, y in batches)
    optimizer.zero_grad()
    total = 0.0
    for x, y in batches:
        loss = weigh(len(y), examples, len(batches)) * F.cross_entropy(model(x), y)
        loss.backward()
        total += loss.item()
    return total


def accumulated_step(model, optimizer, batches, **options):
    total = accumulate(model, optimizer, batches, **options)
    optimizer.step()
    return total


def weighed(weigh):
    return lambda *given: accumulated_step(*given, weigh=weigh)


def clears_in_the_loop(model, optimizer, batches):
    examples, total = sum(len(y) for _, y in batches), 0.0
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") / examples
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def never_clears(model, optimizer, batches):
    optimizer.zero_grad = lambda: None
    return accumulated_step(model, optimizer, batches)


def one_backward(model, optimizer, batches):
    examples = sum(len(y) for _, y in batches)
    optimizer.zero_grad()
    total = sum(
        F.cross_entropy(model(x), y, reduction="sum") / examples for x, y in batches
    )
    total.backward()
    optimizer.step()
    return total.item()


def one_batch(model, optimizer, batches):
    whole = tuple(map(torch.cat, zip(*batches, strict=True)))
    return accumulated_step(model, optimizer, [whole])


def factored(p, twice=2, mixed=1, last=2):
    """``mixed`` and ``last`` are the powers of the scaling in these two terms."""
    first = p.squares + twice * p.a**mixed * (p.wA * p.B.T).sum(1)
    return first + p.a**last * ((p.A.T @ p.A @ p.B) * p.B).sum(0)


def factored_by_addmm(p):
    update = torch.addmm(p.wA.T, p.A.T @ p.A, p.B, beta=2 * p.a, alpha=p.a**2)
    return p.squares + torch.linalg.vecdot(update, p.B, dim=0)


def factored_by_einsum(p):
    update = 2 * p.a * p.wA + p.a**2 * (p.B.T @ (p.A.T @ p.A))
    return torch.einsum("oi,oi->o", p.w, p.w) + torch.einsum("or,ro->o", update, p.B)


def broadcast_factors(p):
    squares = (p.A[:, None] * p.B.T[None]).sum(2).square().sum(0)
    return p.squares + 2 * p.a * (p.wA * p.B.T).sum(1) + p.a**2 * squares


# Ways to build A·B or V that a list of function names would miss.
FULL_UPDATES = [
    lambda p: p.V.square().sum(1),
    lambda p: (p.w + p.a * torch.bmm(p.B.T[None], p.A.T[None])[0]).norm(dim=1) ** 2,
    lambda p: (p.w + p.a * sum(map(torch.outer, p.B, p.A.T))).norm(dim=1) ** 2,
    lambda p: torch.addmm(p.w, p.B.T, p.A.T, alpha=p.a, out=p.w + 0).norm(dim=1) ** 2,
]


def via_identity(A, B):
    return torch.linalg.multi_dot([torch.eye(len(A)).to(A), A, B]).T


def mixed_by_rows(p):
    rows = zip(p.x, p.A, p.B, p.c, strict=True)
    return torch.stack([c * (x @ p.w.T + x @ A @ B) + p.b for x, A, B, c in rows])


def mixed_by_customers(p):
    y = p.x @ p.w.T
    for k, (A, B, c) in enumerate(zip(p.stored.A, p.stored.B, p.stored.c, strict=True)):
        y[p.k == k] = c * (y[p.k == k] + p.x[p.k == k] @ A @ B) + p.b
    return y


def mixed_by_einsum(p):
    between = torch.einsum("bi,bir->br", p.x, p.A)
    update = torch.einsum("br,bro->bo", between, p.B)
    return torch.addcmul(p.b, p.c, p.x @ p.w.T + update)


def finds_bug_without(*left_out):
    """Return a test of a layer's properties that asks for all but these."""

    def finds_bug(layer_class):
        eye, x = torch.eye(6).double(), torch.randn(5, 6, dtype=torch.float64)
        linear, close = nn.Linear(6, 4, dtype=torch.float64), torch.allclose
        layer, zero = layer_class(linear, 2, 3.0), torch.zeros_like(x)
        with torch.no_grad():
            held = {"start": close(layer(x), linear(x))}
            layer.lora.B.normal_()
            lengths = (layer(eye) - layer(0 * eye)).norm(dim=0)
            # Of m's lengths only the shape that the others need: a norm per input is
            # found by the outputs.
            held["lengths"] = lengths.shape != layer.m.shape or close(lengths, layer.m)
            y, b = layer(x), layer(zero)
            held["linear"] = close(layer(3 * x) - b, 3 * (y - b))
            layer.lora.B.div_(2)
            layer.lora.alpha *= 2
            held["alpha"] = close(layer(x), y)
            y = layer(x)
            layer.m[0] *= 2
            held["one output"] = (~torch.isclose(layer(x), y)).any(0).sum() == 1
            held["bias"] = close(layer(zero), linear.bias.expand(5, 4))
        layer(x).sum().backward()
        trained = (layer.lora.A, layer.lora.B, layer.m)
        held["gradients"] = all(p.grad is not None for p in trained)
        return not all(value for name, value in held.items() if name not in left_out)

    return finds_bug


def moves_m_of_any_shape(layer_class):
    layer = layer_class(nn.Linear(6, 4), 2, 3.0)
    with torch.no_grad():
        layer.m.mul_(torch.linspace(0.5, 1.5, 4))
    return not torch.allclose(layer(torch.zeros(1, 6)), layer.linear.bias)


def read_back(block, levels, scale=None):
    scale = block.abs().max() if scale is None else scale
    shares = block / scale if scale else block
    return levels[(shares[:, None] - levels).abs().argmin(dim=1)] * scale


# The solutions, by what the function takes and returns. How the exercises on a model
# could be answered for one example alone stands among their mistakes.
ON_MODELS = {
    "freeze_all_but_adapters": lambda model: train(model, lambda n: ".lora." in n),
    "merge": merge,
    "finds_bug": finds_bug_without(),
    "fine_tune": fine_tune,
    "to_peft": lambda model: pefts_tensors(model),
    "accumulated_step": accumulated_step,
}
ON_NUMBERS = {
    "training_bytes": held_in_training,
    "adapter_parameters": lambda i, o, r: r * (i + o),
    "scaling": lambda a, r, rs: a / (r**0.5 if rs else r),
    "multiplications": lambda b, i, o, r: b * i * o + b * r * (i + o),
    "standard_error": lambda p, n: (p * (1 - p) / n) ** 0.5,
    "enough_networks": enough_networks,
    "bits_per_weight": lambda code, scale, block: code + scale / block,
}
RETURNS_TENSORS = {
    "mean_of_tokens": mean_of_tokens,
    "apply_update": lambda p: p.base + p.xAB,
    "lora_output": lambda p: p.base + p.b + p.update,
    "merged_weight": lambda p: p.V,
    "unit_vector": lambda v: v / v.norm() if v.norm() > 0 else v,
    "split_rows": lambda w: (w.norm(dim=1), w / rows(w)),
    "weight_norm_gradients": weight_norm,
    "dora_scale": lambda p: p.c,
    "dora_output": lambda p: p.dora,
    "magnitude_gradient": lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).sum(0),
    "factored_squares": factored,
    "mixed_batch": lambda p: p.dora,
    "round_to_levels": lambda block, levels: read_back(block, levels),
    "gradient_of_x": lambda g, codes, levels, scales: (
        g @ (levels[codes] * scales[:, None])
    ),
}
OTHERS = {
    "smallest_rank": lambda s, share: first(kept_of(s), share),
    "paired_difference": paired,
    "held_back": held_back,
    "sign_flip": sign_flip,
}
SOLUTIONS = {
    name: written_out(name, answer)
    for name, answer in (ON_MODELS | ON_NUMBERS | RETURNS_TENSORS | OTHERS).items()
}

# Further right answers, as other learners would write them.
OTHER_SOLUTIONS = {
    "smallest_rank": [lambda s, share: (kept_of(s) >= share).nonzero()[0, 0] + 1],
    "freeze_all_but_adapters": [lambda model: train_modules(model, LoRALayer)],
    "unit_vector": [lambda v: v if not v.any() else F.normalize(v, dim=0, eps=0)],
    "weight_norm_gradients": [floats(weight_norm)],
    "apply_update": [
        lambda p: torch.addmm(p.base, p.x @ p.A, p.B),
        lambda p: p.base + torch.einsum("bi,ir,ro->bo", p.x, p.A, p.B),
    ],
    "dora_output": [lambda p: p.m / factored(p).sqrt() * p.y + p.b],
    "paired_difference": [floats(paired)],
    "split_rows": [lambda w: [w.norm(dim=1), F.normalize(w, dim=1)]],
    "to_peft": [peft_names_of_state],
    "lora_output": [
        lambda p: F.linear(p.x, p.w, p.b) + p.x @ (p.A @ p.B) * p.a,
        lambda p: F.linear(p.x, p.unscaled + (p.a - 1) * (p.A @ p.B).T, p.b),
    ],
    "adapter_parameters": [lambda i, o, r: r * (i + o)],
    "merged_weight": [lambda p: p.w + p.a * p.B.T @ p.A.T],
    "scaling": [lambda a, r, rs: a * r ** (-0.5 if rs else -1)],
    "factored_squares": [factored_by_einsum, factored_by_addmm],
    "mixed_batch": [
        mixed_by_einsum,
        lambda p: p.c * (p.base + torch.einsum("bi,bir,bro->bo", p.x, p.A, p.B)) + p.b,
        lambda p: (
            p.c * (p.base + torch.vmap(lambda x, A, B: x @ A @ B)(p.x, p.A, p.B)) + p.b
        ),
    ],
}

# exercise → words of a hint → a wrong answer that gets it
MISTAKES = {
    "adapter_parameters": {
        "not their product": lambda i, o, _: i * o,
        "that is A alone": lambda i, _, r: i * r,
        "that is B alone": lambda _, o, r: r * o,
        "in and out may differ": lambda i, _, r: 2 * i * r,
        "count A and B apart": lambda i, o, r: r * i * o,
        "multiply both sides": lambda i, o, r: i + r * o,
        "where is the rank": lambda i, o, _: i + o,
        "isn't right yet": lambda *_: 3_648,
    },
    "smallest_rank": {
        "adds up squares": lambda s, share: first(s.cumsum(0) / s.sum(), share),
        "one too few": lambda s, share: first(kept_of(s), share) - 1,
        "one too many": lambda s, share: first(kept_of(s), share) + 1,
        "is enough": lambda s, share: int((kept_of(s) <= share).sum()) + 1,
        "isn't right yet": lambda s, _: len(s) + 5,
        "divide by the whole": lambda s, share: first(s.square().cumsum(0), share),
        "don't take the root": lambda s, share: first(kept_of(s).sqrt(), share),
        "1 − relative error²": lambda s, t: first(kept_of(s), 1 - (1 - t) ** 2),
        "got a tensor of shape (1,)": lambda s, t: (kept_of(s) >= t).nonzero()[0] + 1,
        "got a list": lambda s, share: [first(kept_of(s), share)],
        # Right but for rounding: the last entry of the sums is just below 1 here.
        "finds none of these ranks": lambda s, t: first(
            s.square().cumsum(0), t * s @ s
        ),
    },
    "apply_update": {
        "the update is missing": lambda p: p.base,
        "the update alone": lambda p: p.xAB,
        "A·B was built in full": lambda p: p.x @ p.V.T,
        "not taken away": lambda p: p.base - p.xAB,
    },
    "scaling": {
        "divide instead": lambda a, r, rs: a * (r**0.5 if rs else r),
        "the other rule": lambda a, r, rs: a / (r if rs else r**0.5),
        "article's rule": lambda a, *_: a,
        "cuts off": lambda a, r, rs: a // (r**0.5 if rs else r),
        "upside down": lambda a, r, rs: (r**0.5 if rs else r) / a,
    },
    "lora_output": {
        "where is alpha": lambda p: p.base + p.b + p.xAB,
        "not divided by the rank": lambda p: p.base + p.b + p.update / len(p.B),
        "not the frozen layer": lambda p: p.a * (p.base + p.b + p.xAB),
        "not the frozen product": lambda p: p.a * (p.base + p.xAB) + p.b,
        "bias is missing": lambda p: p.base + p.update,
        "frozen layer is missing": lambda p: p.update,
        "bias is scaled": lambda p: p.base + p.update + p.a * p.b,
        "is transposed": lambda p: (p.base + p.b + p.update).T,
    },
    "freeze_all_but_adapters": {
        "not every layer is an nn.Linear": freeze_linear_layers,
        "the package's class": lambda model: model.requires_grad_(False),
        "still trainable": lambda _: None,
        "must be trainable": lambda model: train(model, lambda n: n.endswith(".A")),
        "frozen before": keep_adapters,
        # These are the names in one of the models.
        "everything is frozen": lambda m: train(m, lambda n: n.startswith(ONE_AND_TWO)),
        "a module has no requires_grad": sets_an_attribute,
        "AfterBlock": lambda m: train(m, lambda n: "A" in n or "B" in n),
        "the pretrained layer as well": lambda m: train_modules(m, LinearWithLoRA),
    },
    "merged_weight": {
        "where is alpha": lambda p: p.unscaled,
        "its transpose": lambda p: p.V.T,
        "alpha scales the update alone": lambda p: p.a * p.unscaled,
        "ΔW alone": lambda p: p.V - p.w,
        "W alone": lambda p: p.w,
        "not divided by the rank": lambda p: p.w + (p.V - p.w) / len(p.B),
        "not subtracted": lambda p: 2 * p.w - p.V,
        "multiplied once": lambda p: p.w + p.a * (p.V - p.w),
    },
    "multiplications": {
        "frozen layer's product is missing": lambda b, i, o, r: b * r * (i + o),
        "frozen layer alone": lambda b, i, o, _: b * i * o,
        "isn't built": lambda b, i, o, r: b * i * o + r * i * o,
        "times B": lambda b, i, o, r: b * i * o + b * i * r + i * r * o,
        "as much as the frozen product": lambda b, i, o, r: (2 * b + r) * i * o,
        "each row of the batch": lambda b, i, o, r: b * i * o + r * (i + o),
        "and then the product with B": lambda b, i, o, r: b * i * o + b * r * i,
        "scaling of the output isn't": lambda b, i, o, r: b * (i * o + r * (i + o) + o),
        "scaling of x·A isn't": lambda b, i, o, r: b * (i * o + r * (i + o + 1)),
        "scaling of x isn't counted": lambda b, i, o, r: b * (i * o + r * (i + o) + i),
        "before it the product x·A": lambda b, i, o, r: b * i * o + b * r * o,
        "the batch as one of its sizes": lambda _, i, o, r: i * o + r * (i + o),
        "multiplications alone": lambda b, i, o, r: 2 * b * (i * o + r * (i + o)),
        "costs add up": lambda b, i, o, r: b * i * o + b * i * r * o,
    },
    "merge": {
        "plain nn.Linear": lambda layer: layer,
        "was changed": merge_in_place,
        "the update is missing": lambda layer: merge(layer, layer.linear.weight),
        "where is alpha": lambda w: merge(w, w.linear.weight.lerp(w.weight, 0.4)),
        "ΔW alone": lambda layer: merge(layer, layer.lora.delta_weight()),
        "the bias isn't the layer's": lambda layer: merge(layer, bias="left as drawn"),
        "wrong shape": lambda layer: nn.Linear(layer.out_features, layer.in_features),
        "share memory": lambda layer: merge(layer, bias="shared"),
        "must have a bias": lambda _: nn.Linear(7, 4, bias=False),
    },
    "unit_vector": {
        "sum of the entries": lambda v: v / v.sum(),
        "absolute values": lambda v: v / v.abs().sum(),
        "take the root": lambda v: v / v.square().sum(),
        "largest entry": lambda v: v / v.abs().max(),
        "NaN": lambda v: v / v.norm(),
        "the vector itself": lambda v: v,
        "a zero in it": lambda v: v / v.norm() if (v != 0).all() else v * 0,
        "sum of 0": lambda v: v / v.norm() if v.sum() != 0 else v * 0,
        "shorter than 1": lambda v: v / v.norm().clamp(min=1e-3),
    },
    "split_rows": {
        "one norm per input": lambda w: (w.norm(dim=0), w / w.norm(dim=0)),
        "keepdim": lambda w: (rows(w), w / rows(w)),
        "squared lengths": lambda w: (w.square().sum(1), w / rows(w)),
        "adds up absolute values": lambda w: (w.abs().sum(1), w / rows(w)),
        "wrong axis": lambda w: (w.norm(dim=1), w / w.norm(dim=0)),
        "not the weight": lambda w: (w.norm(dim=1), w),
        "tuple of 2": lambda w: w.norm(dim=1),
        "one norm for the whole weight": lambda w: (w.norm(), w / rows(w)),
        "by the squared lengths": lambda w: (w.norm(dim=1), w / rows(w) ** 2),
        "yours are transposed": lambda w: (w.norm(dim=1), (w / rows(w)).T),
    },
    "weight_norm_gradients": {
        "divide v by its length": lambda gw, _, v: (gw @ v, gw),
        "subtract it": lambda gw, g, v: (gw @ v / v.norm(), g / v.norm() * gw),
        "scaled by g": times(lambda g, length: length / g),
        "divided by ‖v‖": times(lambda _, length: length),
        "scaled by g too": times(lambda g, _: 1 / g),
        "take the dot product": lambda gw, _, v: (gw * v / v.norm(), gw),
    },
    "dora_scale": {
        "don't divide it by the rank": lambda p: (
            p.m / (p.w + p.a / len(p.B) * (p.A @ p.B).T).norm(dim=1)
        ),
        "V is W": lambda p: p.m / p.w.norm(dim=1),
        "upside down": lambda p: 1 / p.c,
        "alpha is missing": lambda p: p.m / p.unscaled.norm(dim=1),
        "norms of ΔW": lambda p: p.m / (p.V - p.w).norm(dim=1),
        "add W and ΔW first": lambda p: (
            p.m / (p.w.norm(dim=1) + (p.V - p.w).norm(dim=1))
        ),
        "must have the shape (out,)": lambda p: p.c.unsqueeze(1),
        "where is m": lambda p: p.c / p.m,
        "take the root": lambda p: p.m / p.V.square().sum(1),
        "each row has its own": lambda p: p.m / p.V.norm(),
        "isn't right yet": lambda p: p.m / p.V.norm(dim=0)[: len(p.m)],
    },
    "dora_output": {
        "bias is scaled": lambda p: p.c * (p.y + p.b),
        "that is LoRA": lambda p: p.y + p.b,
        "frozen product too": lambda p: p.base + p.c * p.update + p.b,
        "is taken per": lambda p: p.base + p.m * F.normalize(p.update, dim=1) + p.b,
        "norm of the output": lambda p: p.m * F.normalize(p.y, dim=1) + p.b,
        "norms of W": lambda p: p.m / p.w.norm(dim=1) * p.y + p.b,
        "not divided": lambda p: p.m * p.y + p.b,
        "bias is missing": lambda p: p.c * p.y,
        "the merged form": lambda p: p.c * (p.x @ p.V.T) + p.b,
        "A·B was built in full": lambda p: (
            p.c * (p.base + p.a * (p.x @ (p.A @ p.B))) + p.b
        ),
        "scales the update too": lambda p: p.c * p.base + p.update + p.b,
        "not multiplied by m": lambda p: p.c / p.m * p.y + p.b,
        "alpha is missing": lambda p: p.but(a=1).dora,
        "missing in the sum": lambda p: p.c * (p.base + p.xAB) + p.b,
        "missing in V": lambda p: p.m / p.unscaled.norm(dim=1) * p.y + p.b,
    },
    "finds_bug": {
        "LayerA passes your test, but it has a bug. Test what comes out at x = 0": (
            finds_bug_without("lengths", "linear", "alpha", "one output", "bias")
        ),
        "LayerA": finds_bug_without("bias"),
        "LayerB passes": finds_bug_without("one output"),
        "LayerC passes": finds_bug_without("alpha"),
        "LayerD passes": finds_bug_without("linear", "lengths"),
        "LayerE passes": finds_bug_without("start", "lengths"),
        "LayerF passes": finds_bug_without("lengths"),
        "LayerG passes": finds_bug_without("gradients"),
        "a right layer is accused": lambda _: True,
        "LayerA passes": lambda cls: cls.__name__ in {f"Layer{x}" for x in "ABCDEFG"},
        "your test stops at LayerB": moves_m_of_any_shape,
        "must return True or False": lambda _: torch.tensor([False, True]),
    },
    "magnitude_gradient": {
        "where is xVᵀ": lambda gy, _, V: gy.sum(0) / V.norm(dim=1),
        "multiply first": lambda gy, x, V: gy.sum(0) * (x @ V.T).sum(0) / V.norm(dim=1),
        "don't average": lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).mean(0),
        "divide by": lambda gy, x, V: (gy * (x @ V.T)).sum(0),
        "sum over the batch": lambda gy, x, V: gy * (x @ V.T) / V.norm(dim=1),
        "over the outputs": lambda gy, x, V: (gy * (x @ V.T) / V.norm(dim=1)).sum(1),
        "not by its": lambda gy, x, V: (gy * (x @ V.T) / V.square().sum(1)).sum(0),
        "grad_y, is missing": lambda _, x, V: (x @ V.T / V.norm(dim=1)).sum(0),
    },
    "standard_error": {
        "mind the brackets": lambda p, n: (p * 1 - p / n) ** 0.5,
        "leave out the 100": lambda p, n: 100 * (p * (1 - p) / n) ** 0.5,
        "not by n − 1": lambda p, n: (p * (1 - p) / (n - 1)) ** 0.5,
        "take the root": lambda p, n: p * (1 - p) / n,
        "divide by the number": lambda p, _: (p * (1 - p)) ** 0.5,
        "over n as well": lambda p, n: (p * (1 - p)) ** 0.5 / n,
        "the root goes over p": lambda p, n: p * (1 - p) / n**0.5,
        "1 − p": lambda p, n: (p / n) ** 0.5,
        "is the `return` missing": lambda *_: None,
    },
    "paired_difference": {
        "the mean comes first": lambda a, b: paired(a, b)[::-1],
        "then one standard error": lambda a, b: (
            paired(a, b)[0],
            (a.std() - b.std()) / len(a) ** 0.5,
        ),
        "first − second": lambda a, b: paired(b, a),
        "absolute values": lambda a, b: ((a - b).abs().mean(), paired(a, b)[1]),
        "unrelated": lambda a, b: (paired(a, b)[0], (a.var() + b.var()).sqrt() / 2),
        "steadier": error_of_mean(lambda d: d.std()),
        "the same": error_of_mean(lambda d: d.std(correction=0) / len(d) ** 0.5),
        "not by n": error_of_mean(lambda d: d.std() / len(d)),
        "square of it": error_of_mean(lambda d: d.var() / len(d)),
        "n − 1 already": error_of_mean(lambda d: d.std() / (len(d) - 1) ** 0.5),
        "is the `return` missing": lambda *_: None,
        # 2 is the root of the first example's n.
        "isn't right yet": error_of_mean(lambda d: d.std() / 2),
    },
    "fine_tune": {
        "where is factor": lambda m, b, rate, _: fine_tune(m, b, rate, 1),
        "for m alone": lambda m, b, rate, f: fine_tune(m, b, rate * f, 1),
        "zero_grad() belongs": lambda *given: fine_tune(*given, forget=False),
        "gradient descent": lambda *given: fine_tune(*given, True, torch.optim.SGD),
        "AdamW": lambda *given: fine_tune(*given, True, torch.optim.AdamW),
        "is the `return` inside": lambda m, b, *rates: fine_tune(m, b[:1], *rates),
        "nothing has moved": lambda *_: 0.5,
        "is the `return` missing": lambda *given: fine_tune(*given) and None,
        "isn't right yet": lambda *given: fine_tune(*given) + 1,
    },
    "held_back": {
        "the score alone": lambda s, c: held_back(s, c, lower_score),
        "the training loss alone": lambda s, c: held_back(s, c, more_loss),
        "second submodel": lambda s, c: held_back(s, {m: c[m][:1] for m in c}),
        "first submodel": lambda s, c: held_back(s, {m: c[m][1:] for m in c}),
        "no single submodel": lambda s, c: sorted(
            {*held_back(s, c, lower_score)} & {*held_back(s, c, more_loss)}
        ),
        "only in the first": lambda s, _: [m for m in s if held_back(s, {m: list(s)})],
        "must be a list of names": lambda *_: "whole",
        "`return`": lambda *_: None,
    },
    "enough_networks": {
        "not 1/2ⁿ": lambda tests: enough_networks(tests, sides=1),
        "multiplies the smallest p": lambda _: enough_networks(1),
        "one network more": lambda tests: enough_networks(tests) + 1,
        "isn't right yet": lambda _: 12,
        "`return`": lambda _: None,
    },
    "sign_flip": {
        "both sides of zero": lambda d: sign_flip(d, lambda m, seen: m >= seen - 1e-12),
        "≥, not >": lambda d: sign_flip(d, lambda m, s: m.abs() > s.abs() + 1e-12),
        "not their number": lambda d: sign_flip(d) * 2 ** len(d),
        "isn't right yet": lambda d: d.mean(),
        "was changed in place": lambda d: sign_flip(d.abs_()),
    },
    "to_peft": {
        "PEFT's A is": changed_peft("A.weight", lambda A: A.T),
        "PEFT's B is": changed_peft("B.weight", lambda B: B.T),
        "begins with": renamed_peft("base_model.model.", ""),
        "end in `.weight`": renamed_peft("lora_A.weight", "lora_A"),
        "another layer is loaded": lambda m: pefts_tensors(m, parts="AB"),
        "is missing": lambda m: pefts_tensors(m, parts="A"),
        "must be a tensor": changed_peft("A.weight", lambda A: A.tolist()),
        "`return`": lambda _: None,
        "lies transposed in memory": lambda m: pefts_tensors(m, torch.Tensor.detach),
    },
    "factored_squares": {
        "mixed term is missing": lambda p: factored(p, twice=0),
        "yours comes once": lambda p: factored(p, twice=1),
        "should be squared in the last term": lambda p: factored(p, last=1),
        "last term lacks the scaling": lambda p: factored(p, last=0),
        "mixed term lacks the scaling": lambda p: factored(p, mixed=0),
        "squared in your mixed term": lambda p: factored(p, mixed=2),
        "alpha is missing": lambda p: factored(p.but(a=1)),
        "that is the norm": lambda p: factored(p).sqrt(),
        "sum over the inputs": lambda p: p.V.square().sum(0),
        "W alone": lambda p: p.w.square().sum(1),
        "right, but": lambda p: (p.w + p.a * via_identity(p.A, p.B)).norm(dim=1) ** 2,
        "was stored": broadcast_factors,
        "shape (200, 200)": lambda p: factored(p, 0) + 2 * p.a * (p.wA @ p.B).diag(),
        "squares of W": lambda p: factored(p) - p.squares + p.w.square().sum(1),
    },
    "mixed_batch": {
        "the first row's adapter": lambda p: p.but(A=p.A[0], B=p.B[0], c=p.c[0]).dora,
        "bias is scaled": lambda p: p.c * (p.y + p.b),
        "where is c": lambda p: p.y + p.b,
        "should scale the frozen product too": lambda p: p.base + p.c * p.update + p.b,
        "should scale the update too": lambda p: p.c * p.base + p.update + p.b,
        "m/‖V‖ already": lambda p: p.c / p.V.norm(dim=2) * p.y + p.b,
        "with a loop": mixed_by_rows,
        "right, but with a loop": mixed_by_customers,
        "a weight was": lambda p: p.b + (p.c[..., None] * p.V @ p.x[..., None])[..., 0],
        "weight was": lambda p: (
            p.c * (p.base + (p.x[:, None] @ (p.A @ p.B))[:, 0]) + p.b
        ),
        "bias is missing": lambda p: p.c * p.y,
        "added up": lambda p: p.c * (p.base + p.by_all.sum(0)) + p.b,
    },
    "training_bytes": {
        "weights alone: what is trained": lambda w, _, size: w * size,
        "the weights are missing": lambda _, t, __: 12 * t,
        "two of the three": lambda w, t, size: held_in_training(w, t, size, 8),
        "one of the three": lambda w, t, size: held_in_training(w, t, size, 4),
        "one number too many": lambda w, t, size: held_in_training(w, t, size, 16),
        "in float32": lambda w, t, size: held_in_training(w, t, size, 3 * size),
        "4 bytes each": lambda w, t, size: held_in_training(w, t, size, 3),
        "for what is trained alone": lambda w, _, size: held_in_training(w, w, size),
        "frozen weights lie in memory": lambda _, t, size: t * (size + 12),
        "counted twice": lambda w, t, size: held_in_training(w + t, t, size),
        "is a weight, too": lambda w, t, size: held_in_training(w - t, t, size),
        "not 4": lambda w, t, _: held_in_training(w, t, 4),
        "in bits": lambda *given: 8 * held_in_training(*given),
        "in bytes already": lambda w, t, size: held_in_training(w, t, size / 8),
        "in GB": lambda *given: held_in_training(*given) / 1e9,
        "in MiB": lambda *given: held_in_training(*given) / 2**20,
        "isn't right yet": lambda *_: 13_600,
    },
    "mean_of_tokens": {
        "over all places": lambda h, _: h.mean(dim=1),
        "is 0 now, but it is counted": lambda h, m: (h * m[..., None]).mean(dim=1),
        "in the sum still": lambda h, m: h.sum(1) / m.sum(1)[:, None],
        "that is the sum: divide": lambda h, m: (h * m[..., None]).sum(1),
        "the sum over all places": lambda h, _: h.sum(1),
        "the first place": lambda h, _: h[:, 0],
        "over the sentences": lambda h, _: h.mean(dim=0),
        "yours goes over the columns": lambda h, _: h.mean(dim=2),
        "dim=0": lambda h, m: mean_of_tokens(h, m, dim=0),
        "wrong way round": lambda h, m: mean_of_tokens(h, ~m),
        "of all sentences": lambda h, m: h[m].mean(0),
        "by that of all": lambda h, m: (h * m[..., None]).sum(1) / m.sum(),
        "in front here": lambda h, m: torch.stack(
            [row[:n].mean(0) for row, n in zip(h, m.sum(1), strict=True)]
        ),
        "with a loop": lambda h, m: torch.stack(
            [row[kept].mean(0) for row, kept in zip(h, m, strict=True)]
        ),
        "lack a dimension": lambda h, m: (h * m).sum(1) / m.sum(1),
        "wrong shape": lambda h, m: mean_of_tokens(h, m)[:, None].expand(-1, 2, -1),
    },
    "accumulated_step": {
        "mean of the batches' means": weighed(lambda *n: 1 / n[2]),
        "means were added up": weighed(lambda *_: 1),
        "the sum over all examples": weighed(lambda rows, *_: rows),
        "by the number of batches": weighed(lambda *n: n[0] / n[2]),
        "throws away": clears_in_the_loop,
        "of an earlier step": never_clears,
        "3 steps: optimizer.step() comes once": lambda model, optimizer, batches: sum(
            accumulated_step(model, optimizer, [batch]) for batch in batches
        ),
        "yours are 2": lambda model, optimizer, batches: (
            accumulated_step(model, optimizer, batches),
            optimizer.step(),
        ),
        "nothing has moved": accumulate,
        "are frozen, and have moved": lambda model, *others: accumulated_step(
            model.requires_grad_(True), *others
        ),
        "`return`": lambda *given: accumulated_step(*given) and None,
        "right, but the activations of all": one_backward,
        "went through the model at once": one_batch,
        "isn't right yet": lambda *given: accumulated_step(*given) + 1,
    },
    "bits_per_weight": {
        "the code alone": lambda code, *_: code,
        "pays its share": lambda code, scale, _: code + scale,
        "not paid more often": lambda code, scale, block: code + scale * block,
        "only the scale is shared": lambda code, scale, block: (code + scale) / block,
        "the whole block": lambda code, scale, block: code * block + scale,
        "count bits": lambda code, scale, block: (code + scale / block) / 8,
        "the scale's share alone": lambda _, scale, block: scale / block,
        "isn't right yet": lambda code, scale, block: code + scale // block + 1,
    },
    "round_to_levels": {
        "a negative number can have it": lambda block, levels: read_back(
            block, levels, block.max()
        ),
        "multiply by the scale again": lambda block, levels: (
            read_back(block, levels) / block.abs().max()
        ),
        "divide by the scale first": lambda block, levels: read_back(
            block, levels, torch.tensor(1.0)
        ),
        "once each": lambda block, levels: read_back(block, levels) * block.abs().max(),
        "not the standard deviation": lambda block, levels: read_back(
            block, levels, block.std()
        ),
        "not the length": lambda block, levels: read_back(block, levels, block.norm()),
        "nothing was rounded": lambda block, _: block.clone(),
        "comes back as NaN": lambda block, levels: (
            read_back(block, levels) / block.abs().max() * block.abs().max()
        ),
    },
    "gradient_of_x": {
        "the scales are missing": lambda g, codes, levels, _: g @ levels[codes],
        "scale once": lambda g, codes, levels, scales: g * scales**2 @ levels[codes],
        "not divided": lambda g, codes, levels, scales: g / scales @ levels[codes],
        "not its value": lambda g, codes, _, scales: g @ (codes * scales[:, None]),
        "times W as it is": lambda g, codes, levels, scales: (
            g @ (levels[codes] * scales[:, None]).T
        ),
        "keep the batch": lambda g, codes, levels, scales: (
            (g * scales).sum(0) @ levels[codes]
        ),
        "multiply the gradient": lambda _, codes, levels, scales: (
            levels[codes] * scales[:, None]
        ),
    },
}


# Of these the remarks: the numbers are right, and something else is as it shouldn't be.
REMARKS = {
    "smallest_rank": ["finds none of these ranks"],
    "apply_update": ["A·B was built in full"],
    "dora_output": ["the merged form", "A·B was built in full"],
    "factored_squares": [
        "right, but",
        "was stored",
        "shape (200, 200)",
        "squares of W",
        "A·B was built in full",
    ],
    "to_peft": ["lies transposed in memory"],
    "mean_of_tokens": ["with a loop"],
    "accumulated_step": [
        "right, but the activations of all",
        "went through the model at once",
    ],
    "mixed_batch": [
        "with a loop",
        "right, but with a loop",
        "a weight was",
        "weight was",
    ],
}


def check(name, answer):
    getattr(checks, f"check_{name}")(answer)


def refused(name, answer, hint=""):
    with pytest.raises(ExerciseError) as raised:
        check(name, answer)
    assert hint in str(raised.value)


def untouched(*_):
    raise NotImplementedError("Exercise 0.0: write it")


def test_every_check_has_a_solution_and_four_mistakes_or_more():
    names = {name[6:] for name in vars(checks) if name.startswith("check_")}
    assert names == SOLUTIONS.keys() == MISTAKES.keys()
    assert min(len(m.keys() - {"isn't right yet"}) for m in MISTAKES.values()) >= 4


@pytest.mark.parametrize("name", SOLUTIONS)
def test_right_answers_pass_others_are_refused_and_untouched_is_not_begun(name, capsys):
    for answer in [SOLUTIONS[name], *OTHER_SOLUTIONS.get(name, [])]:
        check(name, answer if answer is SOLUTIONS[name] else written_out(name, answer))
        assert capsys.readouterr().out.endswith(": correct\n")
    check(name, untouched)
    assert capsys.readouterr().out == "To do: Exercise 0.0: write it\n"
    for nonsense in (None, "42", float("nan")):
        refused(name, lambda *_, nonsense=nonsense: nonsense)


@pytest.mark.parametrize("default", ["float32", "float64"])
def test_a_merged_layer_keeps_the_dtype_whatever_the_default_is(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, default))
    try:
        checks.check_merge(merge)
        refused(
            "merge", lambda layer: merge(layer, dtype=None), f"{default} instead of"
        )
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("name", "hint", "wrong"),
    [(name, *mistake) for name in MISTAKES for mistake in MISTAKES[name].items()]
    + [("factored_squares", "A·B was built in full", norms) for norms in FULL_UPDATES],
)
def test_a_known_mistake_gets_its_hint(name, hint, wrong, capsys):
    if hint in REMARKS.get(name, []):
        # The answer is right, and isn't refused for how it was computed.
        check(name, written_out(name, wrong))
        said = capsys.readouterr().out
        assert ": right, but " in said
        assert hint in said
        return
    refused(name, written_out(name, wrong), hint)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name in SOLUTIONS if name not in ON_MODELS])
def test_the_answer_to_the_first_example_is_refused_for_the_next(name):
    answers = []

    def hard_coded(*inputs):
        answers.append(SOLUTIONS[name](*inputs))
        return answers[0]

    refused(name, hard_coded)


@pytest.mark.parametrize("name", RETURNS_TENSORS | OTHERS)
def test_a_right_answer_that_changes_what_it_was_given_is_refused(name):
    def in_place(*inputs):
        answer = SOLUTIONS[name](*inputs)
        if isinstance(inputs[0], torch.Tensor):
            inputs[0].add_(1)
        else:
            inputs[0].clear()
        return answer

    refused(name, in_place, "was changed in place")


def with_tensors(answer, change):
    """Return the answer with ``change`` applied to its tensors that aren't single
    numbers."""
    if isinstance(answer, tuple):
        return tuple(with_tensors(part, change) for part in answer)
    return (
        change(answer) if isinstance(answer, torch.Tensor) and answer.ndim else answer
    )


@pytest.mark.parametrize("name", RETURNS_TENSORS)
def test_right_values_of_another_kind_are_told_from_wrong_values(name):
    for change, hint in (
        (torch.Tensor.float, "wrong dtype: torch.float32 instead of torch.float64"),
        (lambda tensor: tensor.unsqueeze(0), "right values in the wrong shape"),
        (lambda tensor: tensor[:1], "wrong shape"),
    ):
        refused(
            name,
            lambda *given, c=change: with_tensors(SOLUTIONS[name](*given), c),
            hint,
        )


def forgot_a_transpose(x, weight, A, B):
    base = x @ weight
    return base + x @ A @ B


def asks_for_what_torch_has_not(*_):
    raise NotImplementedError('"addmm_cpu" not implemented for this dtype')


def unpacks_too_much(singular_values, share):
    first, second = singular_values
    return first if second else share


def test_a_notebooks_own_solution_announces_no_success_of_the_readers(capsys):
    source = "# Solution 1.1\ndef count(i, o, r):\n    return r * (i + o)\n"
    for text, whose in ((source, "Solution"), (source[15:], "Exercise")):
        linecache.cache["<cell>"] = len(text), None, text.splitlines(True), "<cell>"
        names = {}
        exec(compile(text, "<cell>", "exec"), names)
        checks.check_adapter_parameters(names["count"])
        assert capsys.readouterr().out == f"{whose} 1.1: correct\n"


@pytest.mark.parametrize(
    ("name", "answer", "hints"),
    [
        (
            "apply_update",
            forgot_a_transpose,
            [
                "stopped at `base = x @ weight`",
                "weight (4, 7)",
                "is a transpose missing",
            ],
        ),
        ("apply_update", lambda x: x, ["It is called with 4 arguments"]),
        (
            "smallest_rank",
            unpacks_too_much,
            ["stopped at `first, second = singular_values`", "ValueError"],
        ),
        ("merged_weight", lambda *_: 1 / 0, ["ZeroDivisionError"]),
        ("lora_output", lambda *_: [][0], ["IndexError", "The shapes are x"]),
        ("lora_output", asks_for_what_torch_has_not, ['"addmm_cpu" not implemented']),
    ],
)
def test_an_error_of_the_function_is_a_hint_with_the_line_and_the_shapes(
    name, answer, hints
):
    with pytest.raises(ExerciseError) as raised:
        check(name, answer)
    for hint in hints:
        assert hint in str(raised.value)


# --- The layer that notebook 2 leaves a line of open ----------------------------------------


def layer_with(forward):
    """Return the reader's class with this line in it."""

    class LoRALayer(nn.Module):
        def __init__(self, in_dim, out_dim, rank, alpha):
            super().__init__()
            self.A = nn.Parameter(torch.randn(in_dim, rank))
            self.B = nn.Parameter(torch.zeros(rank, out_dim))
            self.alpha = alpha

        def forward(self, x):
            return forward(self, x)

    return LoRALayer


@pytest.mark.parametrize(
    "line",
    [
        lambda self, x: self.alpha * (x @ self.A @ self.B),
        lambda self, x: x @ (self.A @ self.B) * self.alpha,
        lambda self, x: F.linear(F.linear(x, self.A.T), self.B.T * self.alpha),
    ],
)
def test_the_readers_layer_is_the_readers_own(line, capsys):
    mine = layer_with(line)
    state = torch.get_rng_state()
    assert checks.checked_lora_layer(mine) is mine
    assert capsys.readouterr().out.startswith("Right: ")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("nothing", [..., None])
def test_without_the_line_the_notebook_goes_on_with_a_layer_that_has_it(
    nothing, capsys
):
    mine = layer_with(lambda *_: nothing)
    finished = checks.checked_lora_layer(mine)
    assert capsys.readouterr().out.startswith("To do: ")
    assert finished.__name__ == "LoRALayer"
    layer, x = finished(7, 5, 2, 1.5), torch.randn(3, 7)
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), 1.5 * (x @ layer.A @ layer.B))
    assert mine(7, 5, 2, 1.5)(x) is nothing


def first_that_reaches(sigma, share):
    squares = sigma.square()
    for rank, kept in enumerate(squares.cumsum(0) / squares.sum(), start=1):
        if kept >= share:
            return rank
    return None


def test_a_loop_that_finds_no_rank_at_share_one_gets_the_remark(capsys):
    check("smallest_rank", first_that_reaches)
    assert "it finds none of these ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (lambda self, x: x @ self.A @ self.B, "where is alpha"),
        (lambda self, x: x @ self.A @ self.B + self.alpha, "is a factor"),
        (lambda self, x: x @ self.A @ self.B / self.alpha, "doesn't divide"),
        (lambda self, x: self.alpha * (x @ self.B @ self.A), "is a transpose missing"),
        (lambda self, _: self.alpha * (self.A @ self.B), "wrong shape"),
        (lambda self, x: (x @ self.A @ self.B).T * self.alpha, "is transposed"),
        (lambda self, x: self.alpha * (x @ self.A @ self.B) ** 2, "isn't right yet"),
        (lambda *_: 3.0, "must be a tensor"),
        (lambda self, x: self.alpha * (x @ A @ self.B), "Inside the class they are"),  # noqa: F821
        (lambda self, x: x @ self.B, r"shapes are A \(6, 2\), B \(2, 4\), x \(5, 6\)"),
    ],
)
def test_a_mistake_in_the_line_gets_its_hint(line, hint):
    with pytest.raises(ExerciseError, match=hint):
        checks.checked_lora_layer(layer_with(line))
