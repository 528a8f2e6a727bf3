"""The low-rank updates of a batch in which each row has an adapter of its own, in a few
products, however many adapters there are.

One product with the A of several adapters side by side, of which each row keeps its own
columns, and one with their B: that computes more than is needed, in two calls. Two
products per adapter compute what is needed and no more, in two calls each. So the
adapters are taken in groups, and ``group_size`` says how large these are. To gather an A
and a B for every row, as Punica (arXiv 2310.18547) does it in a kernel of its own, moves
more memory than either (benchmarks/mixed_batches.py).
"""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_utils.norms import values_can_be_read

# A group more, with all that goes with it, takes about as long as this many
# multiplications more in a product that is made anyway (benchmarks/mixed_batches.py).
CALL = 1_000_000


class LowRank(Protocol):
    """An adapter in one layer: A (in, r), B (r, out), the scaling s, and whether all
    numbers are finite.
    """

    A: Tensor
    B: Tensor
    alpha: float
    is_finite: bool


def group_size(adapters: int, rows: int, features: int, rank: float) -> int:
    """Return how many adapters share a product.

    With g in a group there are rows · features · rank · g multiplications and
    adapters / g groups; together they take least time at the root of adapters · ``CALL``
    / (rows · features · rank).

    Args:
        adapters: how many there are in the batch, 1 or more.
        rows: that are multiplied, one per position of each example.
        features: in and out, together.
        rank: of an adapter, on average.
    """
    least = math.sqrt(adapters * CALL / max(1, rows * features * rank))
    return min(adapters, max(1, round(least)))


class Group(NamedTuple):
    """The factors of some adapters side by side.

    Attributes:
        A: (in, R), with R the sum of their ranks.
        B: (R, out), each multiplied with its s; without it, where there is one adapter
            alone.
        others: (adapters + 1, R): the columns of A that aren't an adapter's own. The
            last row is that of no adapter. None where there is one adapter alone.
        alpha: s, where there is one adapter alone, else 1.
    """

    A: Tensor
    B: Tensor
    others: Tensor | None
    alpha: float


def together(adapters: Sequence[LowRank], dtype: torch.dtype) -> Group:
    """Put the factors of ``adapters`` side by side, in ``dtype``. Those of one alone
    aren't copied.
    """
    if len(adapters) == 1:
        (one,) = adapters
        return Group(one.A.to(dtype), one.B.to(dtype), None, one.alpha)
    A = torch.cat([adapter.A.to(dtype) for adapter in adapters], dim=1)
    B = torch.cat([adapter.alpha * adapter.B.to(dtype) for adapter in adapters])
    others = A.new_ones(len(adapters) + 1, A.shape[1], dtype=torch.bool)
    end = 0
    for row, adapter in enumerate(adapters):
        start, end = end, end + adapter.A.shape[1]
        others[row, start:end] = False
    return Group(A, B, others, 1.0)


def in_groups(adapters: Sequence[LowRank], size: int) -> list[list[int]]:
    """Return the places of ``adapters`` in groups of ``size``.

    One with an infinity or NaN in it stands alone: zero times infinity is NaN, which
    would get into the rows of others.
    """
    finite = [place for place, each in enumerate(adapters) if each.is_finite]
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return groups + [[p] for p, each in enumerate(adapters) if not each.is_finite]


class Kept:
    """The groups of a layer that were put together last, for the next batch of the same
    adapters.

    They aren't used if a factor was exchanged or changed since then. A copy has none.
    """

    def __init__(self) -> None:
        self._last: tuple[list[object], list[Tensor], list[Group]] | None = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        # A copy of a model begins with nothing.
        return Kept, ()

    def clear(self) -> None:
        """Drop them, and their memory."""
        self._last = None

    def groups(
        self, adapters: Sequence[LowRank], places: list[list[int]], dtype: torch.dtype
    ) -> list[Group]:
        """Return ``adapters`` put together as ``places`` says."""

        def all_together() -> list[Group]:
            return [
                together([adapters[place] for place in group], dtype)
                for group in places
            ]

        factors = [factor for each in adapters for factor in (each.A, each.B)]
        if not (
            values_can_be_read(factors[0])
            and all(type(factor) is Tensor for factor in factors)
            and not any(map(torch.is_inference, factors))
        ):
            return all_together()
        marks = [places, dtype, *(factor._version for factor in factors)]
        # Read once, since another thread may put its own there.
        last = self._last
        if (
            last is None
            or last[0] != marks
            or not all(map(operator.is_, last[1], factors))
        ):
            # Not as tensors that only inference mode can use, if this is one.
            with torch.inference_mode(mode=False), torch.no_grad():
                last = self._last = (marks, factors, all_together())
        return last[2]


def add_updates(
    base: Tensor,
    x: Tensor,
    adapters: Sequence[LowRank],
    rows: Sequence[int],
    batch_dim: int,
    kept: Kept,
) -> Tensor:
    """Return base + s·xAB, in the dtype of ``base``, with A, B and s of
    ``adapters[rows[i]]`` for index i of the batch; base alone where ``rows[i]`` is
    ``len(adapters)``.

    Args:
        base: (…, out).
        x: (…, in), in the dtype of base but for autocast.
        adapters: which there are in the batch.
        rows: whose row it is.
        batch_dim: of x and base.
        kept: by the layer.
    """
    in_dim, out_dim = x.shape[-1], base.shape[-1]
    rank = sum(each.A.shape[1] for each in adapters) / len(adapters)
    count = x.numel() // max(1, in_dim)
    size = group_size(len(adapters), count, in_dim + out_dim, rank)
    places = in_groups(adapters, size)
    groups = kept.groups(adapters, places, base.dtype)
    # One adapter alone has no column that a row without it could be left with.
    if len(groups) == 1 and (groups[0].others is not None or len(adapters) not in rows):
        between = _own_columns(x @ groups[0].A, groups[0], rows, batch_dim)
        y = torch.addmm(
            base.reshape(-1, out_dim),
            between.reshape(-1, between.shape[-1]),
            groups[0].B,
            alpha=groups[0].alpha,
        )
        return y.view(base.shape)
    y = base.clone()
    x_rows, y_rows = x.movedim(batch_dim, 0), y.movedim(batch_dim, 0)
    of_group = {p: number for number, group in enumerate(places) for p in group}
    members: list[list[int]] = [[] for _ in groups]
    for row, place in enumerate(rows):
        if place in of_group:
            members[of_group[place]].append(row)
    for group, group_places, group_rows in zip(groups, places, members, strict=True):
        own = [group_places.index(rows[row]) for row in group_rows]
        first, last = group_rows[0], group_rows[-1]
        if last - first + 1 == len(group_rows):
            part: slice | Tensor = slice(first, last + 1)
            between = x_rows[part] @ group.A
        else:
            part = torch.tensor(group_rows, device=x.device)
            between = x_rows.index_select(0, part) @ group.A
        between = _own_columns(between, group, own, 0)
        update = (between @ group.B).to(y.dtype)
        if isinstance(part, slice):
            y_rows[part].add_(update, alpha=group.alpha)
        else:
            y_rows.index_add_(0, part, update, alpha=group.alpha)
    return y


def _own_columns(
    between: Tensor, group: Group, rows: Sequence[int], batch_dim: int
) -> Tensor:
    """Return x·A with zeros in the columns of other adapters."""
    if group.others is None:
        return between
    others = group.others.index_select(0, torch.tensor(rows, device=between.device))
    return between.masked_fill(along(others, between, batch_dim), 0)


def along(values: Tensor, x: Tensor, batch_dim: int) -> Tensor:
    """Return ``values`` (rows, n) in the shape that goes with x, the rows in its
    dimension ``batch_dim`` and n in the last.
    """
    shape = [1] * x.dim()
    shape[batch_dim], shape[-1] = values.shape
    return values.view(shape)
