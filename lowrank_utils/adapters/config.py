"""The settings of an adapter in PEFT's ``adapter_config.json``: which are understood,
written, and refused.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from lowrank_utils._arguments import (
    check_finite_number,
    check_one_of,
    check_whole_number,
)
from lowrank_utils.adapters.patterns import (
    KEPT_OUT,
    VALUE_OF,
    SavedModules,
    Targets,
    Values,
)

CONFIG = "adapter_config.json"


class AdapterFileError(ValueError):
    """An adapter's files can't be used as they are; the message names the file and says
    what to do.
    """


def fail(file: str, what: str) -> NoReturn:
    """Raise ``AdapterFileError``, with the file's name first."""
    raise AdapterFileError(f"{file}: {what}")


# Settings that say nothing about the numbers. Those of an initialisation have done
# their work when the adapter is saved; init_lora_weights says if it is a plain one.
INFORMATIVE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "eva_config", "corda_config"),
    "lora_ga_config",
}
USED = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora"),
    *("use_rslora", "target_modules", "exclude_modules", "init_lora_weights", "bias"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout"),
    "fan_in_fan_out",
}
# After these, A and B are all that there is. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) change the base weight.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# How PEFT finds the number of a layer in a name where layers_pattern is empty, and the
# expressions that it puts the patterns of these settings into.
ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."
LAYER_OF = r"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."
FORMS = {
    "layers_pattern": LAYER_OF,
    "rank_pattern": VALUE_OF,
    "alpha_pattern": VALUE_OF,
    "modules_to_save": KEPT_OUT,
}


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
        layers: the numbers of the layers that ``targets`` means; empty for all.
        layers_patterns: what stands before such a number; empty for anything.
        saved: ends of the names of modules that were trained as a whole.
        bias: which biases were trained: ``"none"``, ``"lora_only"`` (those of the
            adapted layers) or ``"all"``.
        dropout: the share of inputs that is dropped before A in training.
        transposed: the layers hold their weight as (in, out).
    """

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    dora: bool
    rslora: bool
    targets: str | list[str]
    excluded: str | list[str]
    layers: list[int]
    layers_patterns: list[str]
    saved: list[str]
    bias: str
    dropout: float
    transposed: bool

    def names(self, layer: str) -> bool:
        """Tell whether ``layer`` is one of the adapted layers."""
        if layer in self._excluded or self.saved_modules.keep_out(layer):
            return False
        if layer not in self._targets:
            return False
        # A name that is listed as a whole is meant, whatever its number.
        return not self.layers or layer in self._targets.names or self._counted(layer)

    def _counted(self, layer: str) -> bool:
        patterns = [LAYER_OF.format(pattern=p) for p in self.layers_patterns]
        matches = (re.match(pattern, layer) for pattern in patterns or [ANY_LAYER])
        found = next((match for match in matches if match), None)
        return found is not None and int(found["index"]) in self.layers

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer."""
        return self._ranks.of(name, self.rank)

    def scaling_of(self, name: str, rank: int) -> float:
        """Return the scaling s of a layer, which is our ``alpha``."""
        return self._alphas.of(name, self.alpha) / (
            math.sqrt(rank) if self.rslora else rank
        )

    def digest(self) -> str:
        """Return the SHA-256 of all that changes outputs, in a form that doesn't depend
        on how the file writes it.
        """
        settings = {
            key: sorted(value) if isinstance(value, list) else value
            for key, value in asdict(self).items()
            # What is off is left out, so that a setting that a later version knows
            # doesn't change the digest of older files.
            if value not in (False, 0, "", [], {}) and (key, value) != ("bias", "none")
        }
        text = json.dumps(settings, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def saved_modules(self) -> SavedModules:
        """The modules that were trained as a whole."""
        return SavedModules(self.saved)

    @cached_property
    def _targets(self) -> Targets:
        return Targets(self.targets)

    @cached_property
    def _excluded(self) -> Targets:
        return Targets(self.excluded)

    @cached_property
    def _ranks(self) -> Values:
        return Values(self.ranks)

    @cached_property
    def _alphas(self) -> Values:
        return Values(self.alphas)


def read_config(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json``; whatever changes the numbers and isn't supported is
    refused by name.

    Raises:
        AdapterFileError: it is no JSON, from another tuner, or needs what isn't
            supported.
    """
    return parse_config(path.read_bytes())


def parse_config(content: bytes) -> AdapterConfig:
    """Return what the bytes of ``adapter_config.json`` say; see ``read_config``."""
    try:
        raw = json.loads(
            content.decode("utf-8"),
            parse_constant=_no_constant,
            object_pairs_hook=_no_key_twice,
        )
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:
        fail(CONFIG, f"isn't JSON ({error}); save the adapter again")
    if not isinstance(raw, dict):
        fail(CONFIG, f"must hold an object with settings; got {type(raw).__name__}")
    if raw.get("peft_type") != "LORA":
        fail(
            CONFIG,
            f"peft_type must be 'LORA', which DoRA is too; got {raw.get('peft_type')!r}, another tuner",
        )
    if raw.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        what = f"init_lora_weights={raw['init_lora_weights']!r} changes the base weight too"
        fail(
            CONFIG,
            f"{what}, and the file has only A and B; let PEFT convert the adapter to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)",
        )
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


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} isn't a number of JSON")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON's readers take the last one without a word, others the first.
    keys = Counter(key for key, _ in pairs)
    if twice := [key for key, count in keys.items() if count > 1]:
        fail(
            CONFIG,
            f"{', '.join(map(repr, twice))} stands there more than once; "
            "keep the one that is meant, or save the adapter again",
        )
    return dict(pairs)


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

    def words(name: str, what: str) -> list[str]:
        value = raw.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(
            isinstance(word, str) and word for word in value
        ):
            raise TypeError(f"{name} must be {what}; got {value!r}")
        for word in value:
            _check_pattern(name, word)
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

    if isinstance(raw.get("modules_to_save"), str):
        # PEFT would take each letter for a name.
        raise TypeError(
            f"modules_to_save must be a list of names; got {raw['modules_to_save']!r}"
        )
    config = AdapterConfig(
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
        layers=_layers(raw.get("layers_to_transform")),
        layers_patterns=words("layers_pattern", "a name or a list of names"),
        saved=words("modules_to_save", "a list of names"),
        bias=_bias(raw.get("bias", "none")),
        dropout=_share("lora_dropout", raw.get("lora_dropout", 0)),
        transposed=flag("fan_in_fan_out"),
    )
    if isinstance(config.targets, str):
        if config.targets.lower() == "all-linear":
            raise ValueError(
                "target_modules='all-linear' stands for names that PEFT puts there when it adapts the model; write these names"
            )
        if config.layers or config.layers_patterns:
            raise ValueError(
                "layers_to_transform and layers_pattern go with a list in target_modules, and not with a pattern; put the numbers into the pattern"
            )
    if config.layers_patterns and not config.layers:
        raise ValueError(
            "layers_pattern needs layers_to_transform, which says which layers are meant"
        )
    return config


def _layers(value: Any) -> list[int]:
    what = "layers_to_transform must be a whole number, a list of them, or null"
    values = [] if value is None else value if isinstance(value, list) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{what}; got {value!r}")
    return values


def _bias(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"bias must be a word; got {value!r}")
    return check_one_of("bias", value, ["none", "lora_only", "all"])


def _share(name: str, value: Any) -> float:
    number = check_finite_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be at least 0 and below 1; got {value!r}")
    return number


def _check_pattern(name: str, pattern: str) -> None:
    form = FORMS.get(name, "{pattern}")
    try:
        re.compile(form.format(pattern=pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} isn't a pattern ({error})") from None


def config_text(
    layers: Mapping[str, tuple[int, float]],
    dora: bool,
    all_names: Iterable[str],
    *,
    saved: Sequence[str] = (),
    bias: str = "none",
    dropout: float = 0.0,
) -> str:
    """Return the text of ``adapter_config.json`` for adapted layers.

    The config holds the most frequent rank and scaling, and per layer what differs from
    them.

    Args:
        layers: name → rank and scaling s.
        dora: the layers have a magnitude.
        all_names: of all modules of the model, which no setting must hit by mistake.
        saved: modules that were trained as a whole.
        bias: which biases were trained, in PEFT's words.
        dropout: the share of inputs that is dropped before A in training.
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
    targets = Targets(names)
    listed = [name for name in all_names if name in targets]
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
        "lora_dropout": dropout,
        "bias": bias,
        "modules_to_save": list(saved) or None,
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
