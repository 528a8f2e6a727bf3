"""Further answers to the exercises of notebook 6, as learners would write them: right
ones in other styles, and wrong ones with the hint that they get."""

import math
import re
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import checks
from lowrank_utils.adapt import parameter_groups
from lowrank_utils.checks import ExerciseError
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.training import adam


def loop(optimizers, model, batches, loss_of=F.cross_entropy):
    """Take a step for each batch, and return the last loss as a tensor."""
    for images, labels in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return loss


def by_the_package(model, batches, learning_rate, factor):
    groups = parameter_groups(model, learning_rate, {"*.m": factor})
    return loop([torch.optim.Adam(groups)], model, batches).item()


def by_layers(model, batches, learning_rate, factor):
    """Two lists of parameters that the modules give, not the names."""
    layers = [layer for layer in model.modules() if isinstance(layer, LinearWithDoRA)]
    magnitudes = [layer.m for layer in layers]
    others = [p for p in model.parameters() if all(p is not m for m in magnitudes)]
    groups = [{"params": others}, {"params": magnitudes, "lr": learning_rate * factor}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    return loop([optimizer], model, batches).detach().numpy()[()]


def with_two_optimizers(model, batches, learning_rate, factor):
    named = dict(model.named_parameters())
    magnitudes = [p for name, p in named.items() if name.split(".")[-1] == "m"]
    others = [p for name, p in named.items() if not name.endswith(".m")]
    optimizers = [
        torch.optim.Adam(others, lr=learning_rate),
        torch.optim.Adam(magnitudes, lr=factor * learning_rate),
    ]
    return loop(optimizers, model, batches).item()


def by_a_rate_set_afterwards(model, batches, learning_rate, factor):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = adam([{"params": [p]} for _, p in named], learning_rate)
    for (name, _), group in zip(named, optimizer.param_groups, strict=True):
        if name[-2:] == ".m":
            group["lr"] *= factor
    return loop([optimizer], model, batches).detach()


def by_log_softmax(model, batches, learning_rate, factor):
    def loss_of(scores, labels):
        return -scores.log_softmax(dim=1)[torch.arange(len(labels)), labels].mean()

    groups = parameter_groups(model, learning_rate, {"*.m": factor})
    return loop([torch.optim.Adam(groups)], model, batches, loss_of).item()


RIGHT = [
    ("standard_error", lambda p, n: math.sqrt(p * (1 - p) / n)),
    ("standard_error", lambda p, n: np.sqrt(p - p**2) / np.sqrt(n)),
    ("standard_error", lambda p, n: torch.tensor(p * (1 - p) / n).sqrt()),
    ("paired_difference", lambda a, b: [(a - b).mean(), (a - b).std() / len(a) ** 0.5]),
    ("paired_difference", lambda a, b: paired_by_statistics(a.tolist(), b.tolist())),
    (
        "paired_difference",
        lambda a, b: (a.mean() - b.mean(), ((a - b).var() / a.numel()).sqrt()),
    ),
    ("fine_tune", by_the_package),
    ("fine_tune", by_layers),
    ("fine_tune", with_two_optimizers),
    ("fine_tune", by_a_rate_set_afterwards),
    ("fine_tune", by_log_softmax),
]


def paired_by_statistics(first, second):
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), error


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_in_another_style_passes(name, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


def rates(rate_of):
    """Return a loop in which a function of name, rate and factor gives the rates."""

    def answer(model, batches, learning_rate, factor):
        groups = [
            {"params": [p], "lr": rate_of(name, learning_rate, factor)}
            for name, p in model.named_parameters()
        ]
        return loop([torch.optim.Adam(groups)], model, batches).item()

    return answer


def changed(change):
    """Return a loop before which something is done to its model, batches or loss."""

    def answer(model, batches, learning_rate, factor):
        loss_of = change(model, batches) or nn.CrossEntropyLoss()
        groups = parameter_groups(model, learning_rate, {"*.m": factor})
        return loop([torch.optim.Adam(groups)], model, batches, loss_of).item()

    return answer


def unfreeze(model, _):
    model.requires_grad_(True)


def keep_weights_and_magnitudes(model, _):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name == "norm.weight" or name[-2:] in (".A", ".B", ".m")
        )


def shift_images(_, batches):
    batches[0][0].add_(1)


def empty(_, batches):
    batches.clear()


def of_softmax(scores, labels):
    return F.cross_entropy(scores.softmax(dim=1), labels)


def of_squares(scores, labels):
    return F.mse_loss(scores, F.one_hot(labels, 3).to(scores))


def twice(batches):
    return [batch for batch in batches for _ in range(2)]


def before_each_step(model, batches, learning_rate, factor):
    for batch in batches:
        loss = by_the_package(model, [batch], learning_rate, factor)
    return loss


def losses(combine):
    """Return a loop that makes its answer from the list of all losses."""

    def answer(model, batches, learning_rate, factor):
        seen = []

        def loss_of(scores, labels):
            seen.append(F.cross_entropy(scores, labels))
            return seen[-1]

        groups = parameter_groups(model, learning_rate, {"*.m": factor})
        loop([torch.optim.Adam(groups)], model, batches, loss_of)
        return combine([loss.item() for loss in seen])

    return answer


def after_the_last_step(model, batches, learning_rate, factor):
    by_the_package(model, batches, learning_rate, factor)
    return F.cross_entropy(model(batches[-1][0]), batches[-1][1]).item()


WRONG = [
    ("standard_error", "over n as well", lambda p, n: math.sqrt(p * (1 - p)) / n),
    ("standard_error", "the root goes over p", lambda p, n: p * (1 - p) / math.sqrt(n)),
    ("standard_error", "number of images", lambda p, _: math.sqrt(p * (1 - p))),
    ("standard_error", "must be one number", lambda p, n: [(p * (1 - p) / n) ** 0.5]),
    ("standard_error", "your function stopped", lambda p, _: p.sqrt()),
    ("paired_difference", "tuple of 2", lambda a, b: (a - b).mean()),
    ("paired_difference", "wrong shape", lambda a, b: (a - b, (a - b).std())),
    (
        "paired_difference",
        "unrelated",
        lambda a, b: ((a - b).mean(), (a.var() / len(a) + b.var() / len(b)).sqrt()),
    ),
    ("paired_difference", "your function stopped", lambda a, b: a @ b.reshape(2, -1)),
    ("fine_tune", "where is factor", rates(lambda _n, rate, _f: rate)),
    ("fine_tune", "for m alone", rates(lambda _n, rate, factor: rate * factor)),
    (
        "fine_tune",
        "wrong way round",
        rates(lambda n, rate, factor: rate if n.endswith(".m") else rate * factor),
    ),
    (
        "fine_tune",
        "isn't a rate itself",
        rates(lambda n, rate, factor: factor if n.endswith(".m") else rate),
    ),
    (
        "fine_tune",
        "don't divide",
        rates(lambda n, rate, factor: rate / factor if n.endswith(".m") else rate),
    ),
    (
        "fine_tune",
        "don't add",
        rates(lambda n, rate, factor: rate + factor if n.endswith(".m") else rate),
    ),
    (
        "fine_tune",
        "norm.weight is no m",
        rates(lambda n, rate, factor: rate * factor if "m" in n else rate),
    ),
    (
        "fine_tune",
        "takes Adam's 0.001",
        rates(lambda n, rate, factor: rate * factor if n.endswith(".m") else 0.001),
    ),
    ("fine_tune", "default rates", rates(lambda *_: 0.001)),
    ("fine_tune", "make the optimizer once", before_each_step),
    (
        "fine_tune",
        "is the `return` inside",
        lambda m, b, *r: by_the_package(m, b[:1], *r),
    ),
    ("fine_tune", "you took two", lambda m, b, *r: by_the_package(m, twice(b), *r)),
    ("fine_tune", "batches once", lambda m, b, *r: by_the_package(m, b + b, *r)),
    ("fine_tune", "in their order", lambda m, b, *r: by_the_package(m, b[::-1], *r)),
    ("fine_tune", "haven't moved: norm.bias", changed(keep_weights_and_magnitudes)),
    ("fine_tune", "these are frozen", changed(unfreeze)),
    ("fine_tune", "without softmax", changed(lambda *_: of_softmax)),
    (
        "fine_tune",
        "not the sum",
        changed(lambda *_: nn.CrossEntropyLoss(reduction="sum")),
    ),
    ("fine_tune", "to where two rates", changed(lambda *_: of_squares)),
    ("fine_tune", "changed in place", changed(shift_images)),
    ("fine_tune", "your function stopped", changed(empty)),
    ("fine_tune", "after the last step", after_the_last_step),
    ("fine_tune", "of the first batch", losses(lambda seen: seen[0])),
    ("fine_tune", "the mean of all", losses(statistics.mean)),
    ("fine_tune", "must be one number", losses(list)),
    ("fine_tune", "is the `return` missing", losses(lambda _: None)),
]


@pytest.mark.parametrize(("name", "hint", "answer"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, hint, answer, capsys):
    with pytest.raises(ExerciseError, match=re.escape(hint)):
        getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out == ""


def test_a_loss_that_keeps_its_graph_gets_a_remark(capsys):
    def fine_tune(model, batches, learning_rate, factor):
        groups = parameter_groups(model, learning_rate, {"*.m": factor})
        return loop([torch.optim.Adam(groups)], model, batches)

    checks.check_fine_tune(fine_tune)
    assert "Exercise 6.3: right, but return loss.item()" in capsys.readouterr().out


def test_the_check_draws_nothing_from_the_reader_s_random_numbers():
    before = torch.get_rng_state()
    checks.check_fine_tune(by_the_package)
    assert torch.equal(before, torch.get_rng_state())
