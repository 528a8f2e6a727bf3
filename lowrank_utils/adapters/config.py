"""The settings of an adapter in PEFT's ``adapter_config.json``: which are understood,
written, and refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowrank_utils._arguments import check_finite_number, check_whole_number

CONFIG = "adapter_config.json"


class AdapterFileError(ValueError):
    """An adapter's files can't be used as they are; the message names the file and says
    what to do.
    """


def fail(file: str, what: str) -> NoReturn:
    """Raise ``AdapterFileError``, with the file's name first."""
    raise AdapterFileError(f"{file}: {what}")


# Settings that say nothing about the numbers.
INFORMATIVE = {
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
USED = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "use_rslora",
    ),
    *("target_modules", "exclude_modules", "init_lora_weights", "bias"),
}
# Initialisations that leave the base weight alone. The others (PiSSA, OLoRA, CorDA,
# LoftQ) change it.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What is read from the config, checked.

    Attributes:
        rank: r, for layers that ``ranks`` doesn't name.
        alpha: PEFT's ``lora_alpha``, for layers that ``alphas`` doesn't name.
        ranks: pattern → rank (``rank_pattern``).
        alphas: pattern → ``lora_alpha`` (``alpha_pattern``).
        dora: the layers have a magnitude.
        rslora: the scaling is ``lora_alpha``/√r instead of ``lora_alpha``/r.
        targets: the adapted layers, as ends of names or as one pattern for whole names.
        excluded: those that ``targets`` doesn't mean, likewise.
    """

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    dora: bool
    rslora: bool
    targets: str | list[str]
    excluded: str | list[str]

    def names(self, layer: str) -> bool:
        """Tell whether ``layer`` is one of the adapted layers."""
        return is_target(layer, self.targets) and not is_target(layer, self.excluded)

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer."""
        return self._of(self.ranks, name, self.rank)

    def scaling_of(self, name: str, rank: int) -> float:
        """Return the scaling s of a layer, which is our ``alpha``."""
        return self._of(self.alphas, name, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )

    @staticmethod
    def _of(patterns: Mapping[str, Any], name: str, usual: Any) -> Any:
        # As PEFT does: the first pattern that matches the whole name or its end after a
        # dot.
        return next(
            (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)),
            usual,
        )


def read_config(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json``; whatever changes the numbers and isn't supported is
    refused by name.

    Raises:
        AdapterFileError: it is no JSON, from another tuner, or needs what isn't
            supported.
    """

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} isn't a number of JSON")

    try:
        raw = json.loads(path.read_bytes().decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        fail(CONFIG, f"isn't JSON ({error}); save the adapter again")
    if not isinstance(raw, dict):
        fail(CONFIG, f"must hold an object with settings; got {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        fail(
            CONFIG,
            f"peft_type must be 'LORA', which DoRA is too; got {raw.get('peft_type')!r}, another tuner",
        )
    if raw.get("bias", "none") != "none":
        fail(CONFIG, f"bias={raw['bias']!r} trains biases; only 'none' is supported")
    if raw.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        what = f"init_lora_weights={raw['init_lora_weights']!r} changes the base weight too"
        fail(CONFIG, f"{what}; let PEFT convert the adapter to plain LoRA")
    for key, value in raw.items():
        # Also a setting that a later version of PEFT may bring: unknown is fine only if
        # it is off.
        if key not in INFORMATIVE | USED and value not in (None, False, 0, "", [], {}):
            fail(
                CONFIG,
                f"{key}={value!r} isn't supported; the adapter must be trained without it",
            )
    try:
        return _checked_config(raw)
    except (TypeError, ValueError) as error:
        fail(CONFIG, str(error))


def _checked_config(raw: dict[str, Any]) -> AdapterConfig:
    def flag(name: str) -> bool:
        value = raw.get(name, False)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false; got {value!r}")
        return value

    def patterns(name: str) -> dict[str, Any]:
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            raise TypeError(f"{name} must map patterns to numbers; got {value!r}")
        for key in value:
            _check_pattern(name, key)
        return value

    def names(name: str) -> str | list[str]:
        value = raw.get(name) or []
        if isinstance(value, str):
            _check_pattern(name, value)
        elif not isinstance(value, list) or not all(
            isinstance(word, str) for word in value
        ):
            raise TypeError(
                f"{name} must be a list of names or one pattern; got {value!r}"
            )
        return value

    return AdapterConfig(
        rank=check_whole_number("r", raw.get("r", 8), minimum=1),
        alpha=check_finite_number("lora_alpha", raw.get("lora_alpha", 8)),
        ranks={
            key: check_whole_number(f"rank_pattern[{key!r}]", value, minimum=1)
            for key, value in patterns("rank_pattern").items()
        },
        alphas={
            key: check_finite_number(f"alpha_pattern[{key!r}]", value)
            for key, value in patterns("alpha_pattern").items()
        },
        dora=flag("use_dora"),
        rslora=flag("use_rslora"),
        targets=names("target_modules"),
        excluded=names("exclude_modules"),
    )


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} isn't a pattern ({error})") from None


def is_target(name: str, targets: str | list[str]) -> bool:
    """Tell whether PEFT adapts ``name``: a string is a pattern for the whole name, a
    list holds ends of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def config_text(
    layers: Mapping[str, tuple[int, float]], dora: bool, all_names: Iterable[str]
) -> str:
    """Return the text of ``adapter_config.json`` for adapted layers.

    The config holds the most frequent rank and scaling, and per layer what differs from
    them.

    Args:
        layers: name → rank and scaling s.
        dora: the layers have a magnitude.
        all_names: of all modules of the model, which no setting must hit by mistake.
    """
    ranks = {name: rank for name, (rank, _) in layers.items()}
    alphas = {name: _lora_alpha(alpha, rank) for name, (rank, alpha) in layers.items()}
    usual_rank, usual_alpha = (
        Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas)
    )

    def exceptions(values: Mapping[str, float], usual: float) -> dict[str, float]:
        # PEFT takes the keys as patterns for the end of a name; these match one name
        # and no other.
        return {
            f"^{re.escape(name)}": value
            for name, value in values.items()
            if value != usual
        }

    names = list(layers)
    listed = [name for name in all_names if is_target(name, names)]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual_rank,
        "lora_alpha": usual_alpha,
        "rank_pattern": exceptions(ranks, usual_rank),
        "alpha_pattern": exceptions(alphas, usual_alpha),
        "use_dora": dora,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # A list matches the ends of names too. Where that hits another layer, a pattern
        # says what is meant.
        "target_modules": names if listed == names else "|".join(map(re.escape, names)),
    }
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _lora_alpha(alpha: float, rank: int) -> float:
    """Return the ``lora_alpha`` whose quotient by the rank is ``alpha``, if possible to
    the last bit.
    """
    product = alpha * rank
    near = (
        product,
        math.nextafter(product, math.inf),
        math.nextafter(product, -math.inf),
    )
    found = next((number for number in near if number / rank == alpha), product)
    return int(found) if found.is_integer() and abs(found) < 2**53 else found
