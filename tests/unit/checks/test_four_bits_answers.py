"""Answers to the exercises of notebook 10 as other learners would write them: right in
another style, or wrong in a likely way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowrank_utils import checks
from lowrank_utils.checks import ExerciseError

# --- 10.1: bits for a weight ------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        lambda code, scale, block: (code * block + scale) / block,
        lambda code, scale, block: torch.tensor(code + scale / block),
        lambda code_bits, scale_bits, block_size: code_bits + scale_bits / block_size,
    ],
)
def test_bits_in_other_styles_are_right(answer, capsys):
    checks.check_bits_per_weight(answer)
    assert capsys.readouterr().out == "Exercise 10.1: correct\n"


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda code, scale, block: code + block / scale, "not the other way round"),
        (lambda code, scale, block: code - scale / block, "don't subtract"),
        (lambda code, scale, block: 32 - code - scale / block, "saved of 32"),
        (lambda code, scale, block: [code, scale / block], "must be one number"),
        (lambda code, scale, block: code + scale // block, "a fraction of a bit"),
        (lambda code, _, block: code + 32 / block, "use scale_bits"),
        (lambda code, *_: print(code), "is the `return` missing"),
    ],
)
def test_wrong_bits_get_their_hint(answer, hint):
    with pytest.raises(ExerciseError, match=hint):
        checks.check_bits_per_weight(answer)


# --- 10.2: a block, read back -----------------------------------------------------------


def by_loops(block, levels):
    scale = max(abs(number) for number in block.tolist()) or 1.0
    return torch.tensor(
        [
            min(levels.tolist(), key=lambda level: abs(level - number / scale)) * scale
            for number in block.tolist()
        ],
        dtype=block.dtype,
    )


def by_buckets(block, levels):
    scale = block.abs().max()
    between = (levels[1:] + levels[:-1]) / 2 * scale
    return levels[torch.bucketize(block, between)] * scale


def by_distances_to_what_they_stand_for(block, levels):
    values = levels * block.norm(p=torch.inf)
    return values[torch.cdist(block[:, None], values[:, None]).argmin(1)]


def by_numpy(block, levels):
    values = levels.numpy() * np.abs(block.numpy()).max()
    nearest = np.abs(block.numpy()[:, None] - values).argmin(1)
    return torch.from_numpy(values[nearest])


@pytest.mark.parametrize(
    "answer", [by_loops, by_buckets, by_distances_to_what_they_stand_for, by_numpy]
)
def test_rounding_in_other_styles_is_right(answer, capsys):
    checks.check_round_to_levels(answer)
    assert capsys.readouterr().out == "Exercise 10.2: correct\n"


def codes_of(block, levels):
    return (block[:, None] / block.abs().max() - levels).abs().argmin(1)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (codes_of, "those are the codes"),
        (lambda b, levels: codes_of(b, levels) * b.abs().max(), "stands for a level"),
        (
            lambda b, levels: (
                levels[torch.searchsorted(levels, b / b.abs().max(), right=True) - 1]
                * b.abs().max()
            ),
            "next one below",
        ),
        (
            lambda b, levels: (
                levels[torch.searchsorted(levels, b / b.abs().max())] * b.abs().max()
            ),
            "next one above",
        ),
        (lambda b, levels: levels[b.abs().argmin()] * b.abs().max(), "wrong shape"),
        (lambda b, levels: b @ levels, "your function stopped"),
        (
            lambda b, levels: (
                levels[(b[:, None] / b.abs().max() - levels).argmin(1)] * b.abs().max()
            ),
            r"is an abs\(\) missing",
        ),
        (
            lambda b, levels: (
                levels[(b[:, None] / b.abs().max() - levels).abs().argmin()]
                * b.abs().max()
            ),
            "which dim",
        ),
        (
            lambda b, _: (b / b.abs().max() * 7).round() / 7 * b.abs().max(),
            "needn't be evenly spaced",
        ),
    ],
)
def test_wrong_rounding_gets_its_hint(answer, hint):
    with pytest.raises(ExerciseError, match=hint):
        checks.check_round_to_levels(answer)


# --- 10.3: the backward pass ------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        lambda g, codes, levels, scales: (g * scales) @ levels[codes],
        lambda g, codes, levels, scales: g @ torch.diag(scales) @ levels.take(codes),
        lambda g, codes, levels, scales: F.linear(
            g, (levels[codes] * scales.unsqueeze(1)).T
        ),
        lambda g, codes, levels, scales: torch.einsum(
            "bo,oi,o->bi", g, levels[codes], scales
        ),
    ],
)
def test_gradients_in_other_styles_are_right(answer, capsys):
    checks.check_gradient_of_x(answer)
    assert capsys.readouterr().out == "Exercise 10.3: correct\n"


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (
            lambda g, codes, levels, scales: g @ (levels[codes] * scales[:, None]).T,
            "times W as it is",
        ),
        (
            lambda g, codes, levels, scales: g @ (levels[codes] * scales),
            "yours went to its columns",
        ),
        (lambda g, codes, *_: codes @ g.T[:3], "your function stopped"),
        (
            lambda g, codes, levels, scales: ((g * scales) @ levels[codes]).T,
            "transposed",
        ),
        (lambda g, codes, levels, scales: g.mul_(scales) @ levels[codes], "in place"),
    ],
)
def test_wrong_gradients_get_their_hint(answer, hint):
    with pytest.raises(ExerciseError, match=hint):
        checks.check_gradient_of_x(answer)
