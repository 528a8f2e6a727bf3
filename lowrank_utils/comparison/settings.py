"""The settings of an experiment: all that decides what it computes."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from lowrank_utils._arguments import (
    check_finite_number,
    check_one_of,
    check_seed,
    check_whole_number,
)
from lowrank_utils.comparison.methods import METHODS, SCALINGS
from lowrank_utils.comparison.shifts import SHIFTS
from lowrank_utils.data import DATA_SETS
from lowrank_utils.lora import INITIALISATIONS

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what an experiment computes; wrong ones are refused at once.

    Attributes:
        data_set: ``"mnist-5k"`` or ``"mnist"``.
        shift: what is new when the network is adapted: a name in ``SHIFTS``.
        rotation: degrees counter-clockwise, for the shift of that name.
        networks: seeds of pretrained networks. Each has its own splits, initialisation,
            pretraining and tuning.
        methods: names in ``METHODS``.
        ranks: inner dimensions of A and B; each method that has a rank runs with each
            of them.
        alpha: the numerator of the scaling.
        scaling: ``"alpha"``, ``"alpha/rank"`` or ``"alpha/sqrt(rank)"``.
        init: initialisation of A, ``"article"`` or ``"peft"``.
        adaptation_examples: digits to learn from, another stratified sample for each
            seed.
        batch_size: digits per step.
        steps: lengths of a run in steps, the shortest first; each is tuned and measured
            by itself.
        tuning_points: learning rates, with factors where the method has one, that each
            method and rank tries: a power of two.
        tuning_seeds: those that the rates are chosen with; none of ``seeds``.
        seeds: each gives another sample, another A and another order of the digits.
        pretraining_epochs: passes over the training split before the shift.
        dtype: ``"float64"`` gives the same decimals on every processor, ``"float32"``
            is faster.
        device: where to train, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a setting isn't what is allowed.
    """

    data_set: str = "mnist-5k"
    shift: str
    rotation: float = -45.0
    networks: list[int]
    methods: list[str]
    ranks: list[int]
    alpha: float = 8.0
    scaling: str = "alpha/rank"
    init: str = "peft"
    adaptation_examples: int = 1000
    batch_size: int = 64
    steps: list[int]
    tuning_points: int = 8
    tuning_seeds: list[int]
    seeds: list[int]
    pretraining_epochs: int = 10
    dtype: str = "float64"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_one_of("data_set", self.data_set, DATA_SETS)
        check_one_of("shift", self.shift, SHIFTS)
        # What is kept is of one type whatever came, since a run is known by it: 8, 8.0
        # and NumPy's are one setting. So are 0.0 and -0.0.
        for name in ("rotation", "alpha"):
            self._keep(name, check_finite_number(name, getattr(self, name)) + 0.0)
        check_one_of("scaling", self.scaling, SCALINGS)
        check_one_of("init", self.init, INITIALISATIONS)
        check_one_of("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "pretraining_epochs", "tuning_points"):
            self._keep(name, check_whole_number(name, getattr(self, name), minimum=1))
        if self.tuning_points & (self.tuning_points - 1):
            raise ValueError(
                f"tuning_points must be a power of two; got {self.tuning_points}"
            )
        # Ten classes, each of which needs a digit.
        examples = self.adaptation_examples
        examples = check_whole_number("adaptation_examples", examples, minimum=10)
        self._keep("adaptation_examples", examples)
        checks: dict[str, Callable[[Any], Any]] = {
            "networks": check_seed,
            "methods": lambda value: check_one_of("a method", value, METHODS),
            "ranks": lambda value: check_whole_number("a rank", value, minimum=1),
            "steps": lambda value: check_whole_number("a number of steps", value, 1),
            "seeds": check_seed,
            "tuning_seeds": check_seed,
        }
        for name, check in checks.items():
            self._keep(name, _checked_list(name, getattr(self, name), check))
        if self.steps != sorted(self.steps):
            raise ValueError(f"steps must begin with the shortest; got {self.steps}")
        if odd := [steps for steps in self.steps if steps % self.steps_per_epoch]:
            raise ValueError(
                f"steps must be whole epochs, multiples of {self.steps_per_epoch} with "
                f"{self.adaptation_examples:,} examples in batches of {self.batch_size}; got {odd}"
            )
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(
                f"seeds and tuning_seeds must have none in common; got {both} in both. "
                "A rate that was chosen with a seed would be favoured by it"
            )
        self._keep("device", _checked_device(self.device))

    def _keep(self, name: str, value: Any) -> None:
        # The class is frozen for all others.
        object.__setattr__(self, name, value)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps one pass over the adaptation examples takes."""
        return -(-self.adaptation_examples // self.batch_size)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings with the ``values``; an unknown or a missing name is an
        error.
        """
        if unknown := [name for name in values if name not in cls.names()]:
            raise ValueError(
                f"unknown: {', '.join(unknown)}; the settings are {', '.join(cls.names())}"
            )
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


def _checked_device(device: Any) -> str:
    """Return the device's name; it must be one that torch has here."""
    try:
        if not isinstance(device, (str, torch.device)):
            # None would be whatever is the default, and a number any accelerator.
            raise TypeError(f"{type(device).__name__} instead of text")
        found = torch.device(device)
        if found.type == "cpu" and found.index:
            # Torch would take the one that there is.
            raise RuntimeError("there is one CPU, number 0")
        # The meta device computes nothing.
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that torch has here, such as 'cpu'; got {device!r} ({reason})"
        ) from None
    return str(device)


def _checked_list(name: str, values: Any, check: Callable[[Any], Any]) -> list[Any]:
    """Return the checked entries; refuse anything but a list, an empty one, and one
    with a repetition.
    """
    if not isinstance(values, list):
        raise TypeError(
            f"{name} must be a list; got {values!r} ({type(values).__name__})"
        )
    if not values:
        raise ValueError(f"{name} is empty; it needs at least one entry")
    values = [check(value) for value in values]
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name} must have each entry once; got {twice} more often")
    return values


def settings_of_notebook(namespace: Mapping[str, Any]) -> Settings:
    """Return the settings that stand in a notebook's variables.

    papermill only logs a parameter that the notebook doesn't have, and runs with the
    defaults. Here it is an error.

    Args:
        namespace: the notebook's ``globals()``.

    Raises:
        TypeError, ValueError: a setting isn't what is allowed, or papermill was given
            an unknown one.
    """
    # papermill writes what it was given into a cell that begins with this comment.
    given = [
        source
        for source in namespace.get("In", ())
        if source.startswith("# Parameters\n")
    ]
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
        raise ValueError(
            f"unknown parameter: {', '.join(unknown)}; the parameters are {', '.join(known)}"
        )
    return Settings.of(
        {name: namespace[name] for name in Settings.names() if name in namespace}
    )
