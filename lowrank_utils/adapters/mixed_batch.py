"""The low-rank updates of a batch in which each row has an adapter of its own: two
batched products, however many adapters there are.

The rows are sorted into blocks, each of which has one adapter and the same number of
rows; what is missing in a block is filled up. Then one batched product multiplies every
block with its A, and one with its B. Blocks of one row need an A and a B for every row,
as in Punica (arXiv 2310.18547), whose kernel reads them in place; torch's products need
copies, and to copy takes longer than to multiply. Blocks of many rows need no copies but
are filled up where one adapter has more rows than another. ``block_size`` chooses.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_utils.norms import values_can_be_read

# How many rows could be multiplied with an adapter's factors in the time that it takes
# to copy these factors, and to copy one row and its result
# (benchmarks/mixed_batches.py).
COPY_FACTORS, COPY_ROW = 20, 3

R = TypeVar("R")
T = TypeVar("T")


class LowRank(Protocol):
    """An adapter in one layer: A (in, r) and B (r, out), the rank r, the scaling s."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]: ...  # noqa: D102

    rank: int
    alpha: float


L = TypeVar("L", bound=LowRank)


def block_size(counts: Sequence[int], positions: int) -> int:
    """Return how many rows a block has; 0 if each row is a block and stays where it is.

    Args:
        counts: the rows of each adapter, 1 or more.
        positions: of each row, that are all multiplied.
    """
    least, best = sum(counts) * (positions + COPY_FACTORS), 0
    row, largest = positions * (1 + COPY_ROW), max(counts)
    size = 1
    while True:
        blocks = sum(-(-count // size) for count in counts)
        # Where each adapter has one block, its factors stay where they are.
        copies = blocks if blocks > len(counts) else 0
        time = blocks * size * row + copies * COPY_FACTORS
        if time < least:
            least, best = time, size
        if size >= largest:
            return best
        size = min(2 * size, largest)


class Layout(NamedTuple):
    """Where the rows of a batch stand in blocks.

    Attributes:
        adapters: (blocks,), of each block; None if block i has adapter i.
        rows: (blocks · size,), which row of the batch stands there; None if they stand
            as in the batch. What is filled up repeats a row.
        places: (rows with an adapter,), where each of them stands in the blocks; None
            if nothing was filled up.
        adapted: (rows with an adapter,), which rows these are, in the order of
            ``places`` or else of the blocks; None if they stand as in the batch.
        size: rows in a block.
    """

    adapters: Tensor | None
    rows: Tensor | None
    places: Tensor | None
    adapted: Tensor | None
    size: int


def layout_of(
    rows: tuple[int, ...], adapters: int, positions: int, device: torch.device
) -> Layout:
    """Return how a batch is sorted into blocks.

    Args:
        rows: the adapter of each row, from 0 to ``adapters`` − 1, or −1 if it has none.
            Each adapter has one row or more.
        adapters: how many there are.
        positions: of each row.
        device: of the indices in the layout.
    """
    members: list[list[int]] = [[] for _ in range(adapters)]
    for row, adapter in enumerate(rows):
        if adapter >= 0:
            members[adapter].append(row)
    size = block_size([len(group) for group in members], positions)
    adapted = [row for row, adapter in enumerate(rows) if adapter >= 0]
    if size == 0:
        size, order = 1, [(rows[row], [row]) for row in adapted]
    else:
        order = [
            (adapter, group[start : start + size])
            for adapter, group in enumerate(members)
            for start in range(0, len(group), size)
        ]
    blocks: list[int] = []
    place: dict[int, int] = {}
    for number, (_, block) in enumerate(order):
        place |= {row: number * size + i for i, row in enumerate(block)}
        blocks += block + [block[0]] * (size - len(block))

    def index(values: list[int], *, known: int) -> Tensor | None:
        as_it_is = values == list(range(known))
        return None if as_it_is else torch.tensor(values, device=device)

    whose, filled_up = [adapter for adapter, _ in order], len(blocks) > len(adapted)
    return Layout(
        index(whose, known=adapters),
        index(blocks, known=len(rows)),
        index([place[row] for row in adapted], known=-1) if filled_up else None,
        index(adapted if filled_up else blocks, known=len(rows)),
        size,
    )


def by_rank(
    ranks: tuple[int, ...], rows: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the adapters in classes of similar rank, so that no factor is filled up to
    twice its size: of each class which adapters are its members, and of each row the
    number of its adapter among them, or −1.
    """
    classes = []
    sizes = [(rank - 1).bit_length() for rank in ranks]
    for size in sorted(set(sizes)):
        members = tuple([i for i, its in enumerate(sizes) if its == size])
        number = {member: place for place, member in enumerate(members)}
        classes.append((members, tuple([number.get(row, -1) for row in rows])))
    return classes


class Mixture(Generic[L]):
    """The adapters that a layer has for a batch, and which row has which.

    Attributes:
        adapters: each once.
        places: of each row, the place of its adapter among them, or −1 if it has none.
        has_plain: whether a row has none.
        classes: see ``by_rank``.
    """

    def __init__(self, adapters: list[L], places: tuple[int, ...]) -> None:
        self.adapters = adapters
        self.places = places
        self.has_plain = -1 in places
        self.classes = by_rank(tuple([a.rank for a in adapters]), places)


@lru_cache(maxsize=16)
def _kept_layout(
    rows: tuple[int, ...], adapters: int, positions: int, device: torch.device
) -> Layout:
    # Not as tensors that only inference mode can use, if this is one.
    with torch.inference_mode(mode=False):
        return layout_of(rows, adapters, positions, device)


@lru_cache(maxsize=16)
def _kept_index(places: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(places, device=device)


def index_of(places: tuple[int, ...], x: Tensor) -> Tensor:
    """Return ``places`` as an index of tensors beside x."""
    # Under a mode in which tensors hold no numbers, indices hold none.
    if values_can_be_read(x):
        return _kept_index(places, x.device)
    return torch.tensor(places, device=x.device)


class Stacks(NamedTuple):
    """The factors of several adapters, lower ranks filled up with zeros.

    Attributes:
        A: (adapters, in, r).
        B: (adapters, r, out), multiplied with s.
    """

    A: Tensor
    B: Tensor


def stacked(adapters: Sequence[LowRank], dtype: torch.dtype) -> Stacks:
    """Return the factors of ``adapters`` in ``dtype``."""
    rank = max(adapter.rank for adapter in adapters)

    def filled_up(factor: Tensor) -> Tensor:
        return F.pad(factor.to(dtype), (0, 0, 0, rank - factor.shape[0]))

    A = [filled_up(adapter.factors[0].T) for adapter in adapters]
    B = [adapter.alpha * filled_up(adapter.factors[1]) for adapter in adapters]
    return Stacks(torch.stack(A).mT, torch.stack(B))


class Kept:
    """What a layer put together last, for the next batch of the same adapters.

    It isn't used if a tensor that it came from was exchanged or changed since then, as
    far as torch counts changes, nor where a gradient would be lost. It takes as much
    memory as the adapters of that batch. A copy has none. Compiled code doesn't look at
    it, because its guards would fail when another thread puts something there.
    """

    def __init__(self) -> None:
        self._last: dict[object, tuple[list[Tensor], list[int], Any]] = {}
        self._mixture: tuple[object, Mixture[Any]] | None = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()

    def clear(self) -> None:
        """Drop all, and their memory."""
        self._last, self._mixture = {}, None

    def mixture(self, rows: R, find: Callable[[R], Mixture[L]]) -> Mixture[L]:
        """Return what ``find`` finds for ``rows``, now or the last time."""
        if torch.compiler.is_compiling():
            return find(rows)
        # Read once, since another thread may put its own there.
        last = self._mixture
        if last is None or last[0] != rows:
            found = find(rows)
            if last is not None and last[1].adapters != found.adapters:
                # What was put together of other adapters makes room.
                self._last = {}
            last = self._mixture = (rows, found)
        return last[1]

    def value(self, key: object, sources: list[Tensor], make: Callable[[], T]) -> T:
        """Return what ``make`` makes of ``sources``, now or the last time for ``key``."""
        if (
            not values_can_be_read(sources[0])
            # Nobody counts their changes.
            or any(map(torch.is_inference, sources))
            or any(source.requires_grad for source in sources)
        ):
            return make()
        versions = [source._version for source in sources]
        # Read once, since another thread may put its own there.
        last = self._last.get(key)
        if (
            last is None
            or last[1] != versions
            or not all(map(operator.is_, last[0], sources))
        ):
            # Not as tensors that only inference mode can use, if this is one.
            with torch.inference_mode(mode=False), torch.no_grad():
                last = self._last[key] = (sources, versions, make())
        value: T = last[2]
        return value


def add_updates(
    base: Tensor,
    x: Tensor,
    mixture: Mixture[Any],
    batch_dim: int,
    kept: Kept,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return base + s·xAB, with each row's own A, B and s; base alone where a row has
    no adapter.

    Args:
        base: (…, out).
        x: (…, in), in the dtype of base but for autocast.
        mixture: says which row has which adapter.
        batch_dim: of x and base.
        kept: by the layer.
        in_place: base is overwritten.
    """
    if 0 in x.shape:
        return base
    y = base
    if batch_dim:
        y, x = base.movedim(batch_dim, 0), x.movedim(batch_dim, 0)
    # Under a mode in which tensors hold no numbers, indices hold none.
    find_layout = _kept_layout if values_can_be_read(x) else layout_of
    positions = math.prod(x.shape[1:-1])
    for members, rows in mixture.classes:
        alike = [mixture.adapters[member] for member in members]
        factors = [factor for adapter in alike for factor in adapter.factors]
        key = (base.dtype, members, *[adapter.alpha for adapter in alike])
        A, B = kept.value(key, factors, partial(stacked, alike, base.dtype))
        layout = find_layout(rows, len(members), positions, x.device)
        y = _added(y, x, A, B, layout, in_place=in_place)
    return y.movedim(0, batch_dim) if batch_dim else y


def _added(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, layout: Layout, *, in_place: bool
) -> Tensor:
    """Return base (rows, …, out) + s·xAB, with x (rows, …, in)."""
    if layout.adapters is not None:
        A, B = (factors.index_select(0, layout.adapters) for factors in (A, B))
    blocks = x if layout.rows is None else x.index_select(0, layout.rows)
    positions = math.prod(x.shape[1:-1])
    blocks = blocks.reshape(len(A), layout.size * positions, x.shape[-1])
    between = torch.bmm(blocks, A)
    moved = layout.places is not None or layout.adapted is not None
    if in_place and not moved and base.is_contiguous() and between.dtype == base.dtype:
        base.view(len(A), -1, base.shape[-1]).baddbmm_(between, B)
        return base
    update = torch.bmm(between, B).view(-1, *base.shape[1:]).to(base.dtype)
    if layout.places is not None:
        update = update.index_select(0, layout.places)
    if layout.adapted is None:
        return base.add_(update) if in_place else base + update
    add = base.index_add_ if in_place else base.index_add
    return add(0, layout.adapted, update)


def along(values: Tensor, x: Tensor, batch_dim: int) -> Tensor:
    """Return ``values`` (rows, n) in the shape that goes with x, the rows in its
    dimension ``batch_dim`` and n in the last.
    """
    shape = [1] * x.dim()
    shape[batch_dim], shape[-1] = values.shape
    return values.view(shape)
