"""The settings of an experiment: all that decides what it computes."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from lowrank_utils._arguments import check_finite_number, check_one_of, check_seed, check_whole_number
from lowrank_utils.data import DATA_SETS
from lowrank_utils.lora import INITIALISATIONS
from lowrank_utils.methods import METHODS, SCALINGS

SHIFTS = ("rotation", "inversion", "permutation", "unseen classes")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what an experiment computes; wrong ones are refused at once.

    Attributes:
        data_set: ``"mnist-5k"`` or ``"mnist"``.
        shift: what the digits of the adaptation differ by: ``"rotation"``, ``"inversion"``,
            ``"permutation"`` of the pixels, or ``"unseen classes"`` (pretrained on 0–4, adapted to 5–9).
        rotation: degrees counter-clockwise, for the shift of that name.
        adaptation_examples: digits to learn from, another stratified sample for each seed.
        methods: names in ``METHODS``.
        ranks: inner dimensions of A and B; each method that has a rank runs with each of them.
        alpha: the numerator of the scaling.
        scaling: ``"alpha"``, ``"alpha/rank"`` or ``"alpha/sqrt(rank)"``.
        init: initialisation of A, ``"article"`` or ``"peft"``.
        learning_rates: the grid that each method and rank chooses from on the validation split.
        epochs: passes over the adaptation examples, the same for all.
        batch_size: digits per step.
        seeds: each gives another sample, another A and another order of the digits; two or more.
        tuning_seeds: those that the learning rate is chosen with; none of ``seeds``.
        pretraining_epochs: passes over the training split before the shift.
        pretraining_seed: of the splits and of the pretrained network, which all methods share.
        dtype: ``"float64"`` gives the same digits on every processor, ``"float32"`` is faster.
        device: where to train, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a setting isn't what is allowed.
    """

    data_set: str
    shift: str
    rotation: float
    adaptation_examples: int
    methods: list[str]
    ranks: list[int]
    alpha: float
    scaling: str
    init: str
    learning_rates: list[float]
    epochs: int
    batch_size: int
    seeds: list[int]
    tuning_seeds: list[int]
    pretraining_epochs: int
    pretraining_seed: int
    dtype: str
    device: str

    def __post_init__(self) -> None:
        check_one_of("data_set", self.data_set, DATA_SETS)
        check_one_of("shift", self.shift, SHIFTS)
        check_finite_number("rotation", self.rotation)
        check_finite_number("alpha", self.alpha)
        check_one_of("scaling", self.scaling, SCALINGS)
        check_one_of("init", self.init, INITIALISATIONS)
        check_one_of("dtype", self.dtype, DTYPES)
        for name in ("epochs", "batch_size", "pretraining_epochs"):
            check_whole_number(name, getattr(self, name), minimum=1)
        # Ten classes, each of which needs a digit.
        check_whole_number("adaptation_examples", self.adaptation_examples, minimum=10)
        check_seed(self.pretraining_seed)
        _check_each("methods", self.methods, lambda value: check_one_of("a method", value, METHODS))
        _check_each("ranks", self.ranks, lambda value: check_whole_number("a rank", value, minimum=1))
        _check_each(
            "learning_rates",
            self.learning_rates,
            lambda value: check_finite_number("a learning rate", value, above=0),
        )
        _check_each("seeds", self.seeds, check_seed)
        if len(self.seeds) < 2:
            raise ValueError(f"seeds must be two or more, since one has no interval; got {self.seeds}")
        _check_each("tuning_seeds", self.tuning_seeds, check_seed)
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(
                f"seeds and tuning_seeds must have none in common; got {both} in both. "
                "A rate that was chosen with a seed would be favoured by it"
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one that torch has here, such as 'cpu'; got {self.device!r} ({reason})"
            ) from None

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings with the ``values``; an unknown or a missing name is an error."""
        if unknown := [name for name in values if name not in cls.names()]:
            raise ValueError(f"unknown: {', '.join(unknown)}; the settings are {', '.join(cls.names())}")
        if missing := [name for name in cls.names() if name not in values]:
            raise ValueError(f"missing: {', '.join(missing)}")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return all settings by name, as JSON can hold them."""
        return asdict(self)

    def configurations(self) -> list[tuple[str, int | None]]:
        """Return each method with each rank, or with None if it has no rank."""
        return [
            (method, rank)
            for method in self.methods
            for rank in (self.ranks if METHODS[method].has_rank else [None])
        ]


def _check_each(name: str, values: Any, check: Callable[[Any], Any]) -> None:
    """Refuse anything but a list, an empty one, one with a repetition, and one with a wrong entry."""
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list; got {values!r} ({type(values).__name__})")
    if not values:
        raise ValueError(f"{name} is empty; it needs at least one entry")
    for value in values:
        check(value)
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name} must have each entry once; got {twice} more often")


def settings_of_notebook(namespace: Mapping[str, Any]) -> Settings:
    """Return the settings that stand in a notebook's variables.

    papermill only logs a parameter that the notebook doesn't have, and runs with the defaults. Here it is
    an error.

    Args:
        namespace: the notebook's ``globals()``.

    Raises:
        TypeError, ValueError: a setting isn't what is allowed, or papermill was given an unknown one.
    """
    # papermill writes what it was given into a cell that begins with this comment.
    given = [source for source in namespace.get("In", ()) if source.startswith("# Parameters\n")]
    names = [
        target.id
        for source in given
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    known = [*Settings.names(), "result_path"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown parameter: {', '.join(unknown)}; the parameters are {', '.join(known)}")
    return Settings.of({name: namespace[name] for name in Settings.names() if name in namespace})
