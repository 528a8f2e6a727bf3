"""Further answers to the exercises of notebook 9, as learners would write them: right
ones in other styles, and wrong ones with the hint that they get."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowrank_utils import checks
from lowrank_utils.checks import ExerciseError

# --- Right ----------------------------------------------------------------------------


def count_bytes(weights, trained, weight_bytes):
    FLOAT32 = 4
    memory = {"weights": weights * weight_bytes}
    for name in ("gradient", "first average", "second average"):
        memory[name] = trained * FLOAT32
    return sum(memory.values())


def by_einsum(hidden, mask):
    kept = mask.to(hidden)
    return torch.einsum("ntw,nt->nw", hidden, kept) / kept.sum(-1, keepdim=True)


def by_shares(hidden, mask):
    """A matrix product with each token's share."""
    shares = mask / mask.sum(dim=1, keepdim=True)
    return (shares.to(hidden).unsqueeze(1) @ hidden).squeeze(1)


def by_nan(hidden, mask):
    return hidden.masked_fill(~mask[:, :, None], math.nan).nanmean(dim=1)


def by_sums_without_reduction(model, optimizer, batches):
    optimizer.zero_grad(set_to_none=False)
    examples = torch.cat([labels for _, labels in batches]).numel()
    losses = []
    for x, labels in batches:
        each = F.cross_entropy(model(x), labels, reduction="none")
        (each.sum() / examples).backward()
        losses.extend(each.tolist())
    optimizer.step()
    return sum(losses) / len(losses)


def by_gradients_divided_at_the_end(model, optimizer, batches):
    model.zero_grad()
    total, examples = 0.0, 0
    for x, labels in batches:
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        loss.backward()
        total += loss.item()
        examples += len(x)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= examples
    optimizer.step()
    optimizer.zero_grad()
    return np.float64(total / examples)


def by_autograd(model, optimizer, batches):
    examples = sum(len(x) for x, _ in batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    total = 0.0
    for x, labels in batches:
        loss = F.cross_entropy(model(x), labels, reduction="sum") / examples
        for kept, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            kept += part
        total += loss.detach()
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return total


RIGHT = [
    ("training_bytes", count_bytes),
    ("training_bytes", lambda w, t, b: (w - t) * b + t * (b + 3 * 4)),
    ("training_bytes", lambda *given: torch.tensor(float(count_bytes(*given)))),
    ("mean_of_tokens", by_einsum),
    ("mean_of_tokens", by_shares),
    ("mean_of_tokens", by_nan),
    ("accumulated_step", by_sums_without_reduction),
    ("accumulated_step", by_gradients_divided_at_the_end),
    ("accumulated_step", by_autograd),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_in_another_style_passes(name, answer, capsys):
    getattr(checks, f"check_{name}")(answer)
    assert capsys.readouterr().out.endswith(": correct\n")


# --- Right, with a remark -------------------------------------------------------------


def losses_in_a_list(model, optimizer, batches):
    optimizer.zero_grad()
    losses = [F.cross_entropy(model(x), y, reduction="none") for x, y in batches]
    loss = torch.cat(losses).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def scores_of_all_at_once(model, optimizer, batches):
    optimizer.zero_grad()
    scores = model(torch.cat([x for x, _ in batches]))
    loss = F.cross_entropy(scores, torch.cat([y for _, y in batches]))
    loss.backward()
    optimizer.step()
    return loss.item()


def returns_a_tensor(model, optimizer, batches):
    optimizer.zero_grad()
    examples, total = sum(len(y) for _, y in batches), 0
    for x, y in batches:
        loss = F.cross_entropy(model(x), y) * len(y) / examples
        loss.backward()
        total = total + loss
    optimizer.step()
    return total


def filled_row_by_row(hidden, mask):
    means = torch.empty_like(hidden[:, 0])
    for row in range(len(hidden)):
        means[row] = hidden[row, mask[row]].mean(dim=0)
    return means


@pytest.mark.parametrize(
    ("name", "answer", "remark"),
    [
        ("accumulated_step", losses_in_a_list, "until one backward()"),
        ("accumulated_step", scores_of_all_at_once, "went through the model at once"),
        ("accumulated_step", returns_a_tensor, "return a float"),
        ("mean_of_tokens", filled_row_by_row, "for 4 sentences became"),
    ],
)
def test_what_is_right_and_costs_more_than_it_need_gets_a_remark(
    name, answer, remark, capsys
):
    getattr(checks, f"check_{name}")(answer)
    said = capsys.readouterr().out
    assert ": right, but " in said
    assert remark in said


# --- Wrong ----------------------------------------------------------------------------


def step(model, optimizer, batches, loss_of=F.cross_entropy, before="zero_grad"):
    """Accumulate means divided by the number of batches, as it is often written."""
    getattr(optimizer, before)()
    losses = []
    for x, y in batches:
        loss = loss_of(model(x), y) / len(batches)
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return sum(losses)


def right_step(model, optimizer, batches, returned=lambda *_: 0.0):
    """Take the right step, and return something else."""
    optimizer.zero_grad()
    sizes, losses = [len(y) for _, y in batches], []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        (loss * len(y) / sum(sizes)).backward()
        losses.append(loss.item())
    optimizer.step()
    return returned(losses, sizes)


def returning(returned):
    return lambda *given: right_step(*given, returned)


def steps_while_it_returns_in_the_loop(model, optimizer, batches):
    optimizer.zero_grad()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()
    return None


def backward_behind_the_loop(model, optimizer, batches):
    optimizer.zero_grad()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def clears_after_backward(model, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()
    return 1.0


def an_optimizer_of_its_own(model, _, batches):
    return right_step(model, torch.optim.Adam(model.parameters(), 0.01), batches)


def unfreezes_first(model, optimizer, batches):
    for parameter in model.parameters():
        parameter.requires_grad = True
    return right_step(model, optimizer, batches)


def takes_the_last_batch_out(model, optimizer, batches):
    batches.pop()
    return right_step(model, optimizer, batches)


def after_the_step(model, optimizer, batches):
    right_step(model, optimizer, batches)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


def of_softmax(scores, labels):
    return F.cross_entropy(scores.softmax(dim=1), labels)


WRONG = [
    # Adam's second average forgotten; the learner thinks of momentum.
    ("training_bytes", lambda w, t, b: w * b + t * (4 + 4), "two of the three"),
    ("training_bytes", lambda w, t, b: w * b + t * b * 3, "in float32"),
    ("training_bytes", lambda w, t, b: (w * b + 12 * t) / 1024**3, "in GiB"),
    ("training_bytes", lambda w, t, b: w * b + w * 4 + t * 8, "isn't right yet"),
    ("training_bytes", lambda w, t, _: w + 12 * t, "each takes weight_bytes"),
    ("training_bytes", lambda w, t, b: print(w * b + 12 * t), "`return`"),
    ("training_bytes", lambda w, t, b: [w * b, 12 * t], "must be one number"),
    ("mean_of_tokens", lambda h, m: (h * m.unsqueeze(-1)).mean(1), "counted still"),
    ("mean_of_tokens", lambda h, m: h.sum(1) / m.shape[1], "over all places"),
    (
        "mean_of_tokens",
        lambda h, m: h[m].reshape(len(h), -1, 3),
        "your function stopped",
    ),
    ("mean_of_tokens", lambda h, m: (h * m).sum(1) / m.sum(1), "unsqueeze"),
    ("mean_of_tokens", lambda h, m: by_nan(h, m).nan_to_num().float(), "wrong dtype"),
    ("mean_of_tokens", lambda h, m: by_nan(h, m).T, "is transposed"),
    (
        "mean_of_tokens",
        lambda h, m: torch.stack([r[-n:].mean(0) for r, n in zip(h, m.sum(1))]),  # noqa: B905
        "stands behind the tokens",
    ),
    ("mean_of_tokens", lambda h, m: h.where(m[..., None], -9).amax(1), "largest"),
    ("accumulated_step", step, "mean of the batches' means"),
    (
        "accumulated_step",
        lambda *given: step(*given, before="state_dict"),
        "of an earlier step",
    ),
    (
        "accumulated_step",
        lambda *given: step(*given, loss_of=of_softmax),
        "without softmax",
    ),
    ("accumulated_step", steps_while_it_returns_in_the_loop, "only the first batch"),
    ("accumulated_step", backward_behind_the_loop, "only the last batch"),
    ("accumulated_step", clears_after_backward, "between zero_grad() and step()"),
    ("accumulated_step", an_optimizer_of_its_own, "optimizer that you were given"),
    ("accumulated_step", unfreezes_first, "these are frozen, and have moved"),
    ("accumulated_step", takes_the_last_batch_out, "batches was changed in place"),
    ("accumulated_step", after_the_step, "the one after it"),
    ("accumulated_step", returning(lambda losses, _: losses[-1]), "last batch"),
    ("accumulated_step", returning(lambda losses, _: losses[0]), "first batch"),
    (
        "accumulated_step",
        returning(lambda losses, _: sum(losses) / len(losses)),
        "mean of the batches' means",
    ),
    ("accumulated_step", returning(lambda losses, _: sum(losses)), "sum of the"),
    ("accumulated_step", lambda model, *_: model(1), "your function stopped"),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_the_hint_that_belongs_to_it(name, answer, hint, capsys):
    with pytest.raises(ExerciseError) as raised:
        getattr(checks, f"check_{name}")(answer)
    assert hint in str(raised.value)
    assert ": correct" not in capsys.readouterr().out
