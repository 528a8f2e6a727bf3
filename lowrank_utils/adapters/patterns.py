"""Which names PEFT's settings mean: by ends of names, or by patterns.

Every name of a model is asked about, and a setting may hold thousands of them, so what
is plain text is looked up, and only true patterns are tried one after the other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

OPERATORS = frozenset("^$*+?{}[]|()")
# PEFT's expressions around the keys of rank_pattern and alpha_pattern, and around the
# names of modules_to_save, inside of which nothing is adapted.
VALUE_OF = r"(.*\.)?({pattern})$"
KEPT_OUT = r"(^|.*\.){pattern}($|\..*)"


def plain_text(pattern: str) -> tuple[str, tuple[int, ...]] | None:
    r"""Return what a pattern without operators stands for, and the places in it at which
    any character may stand; None for a pattern with operators.

    ``"block.0"`` gives ``("block.0", (5,))``, and ``r"block\.0"`` gives
    ``("block.0", ())``.
    """
    text: list[str] = []
    places: list[int] = []
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            character = next(characters, "")
            if not character or character.isalnum():  # \d, \b, a group
                return None
        elif character in OPERATORS:
            return None
        elif character == ".":
            places.append(len(text))
        text.append(character)
    return "".join(text), tuple(places)


class Texts:
    """Texts, each with a value, that are found at given places of a name in a time that
    doesn't grow with their number.
    """

    def __init__(self) -> None:
        # Those of one length and with the same free places need one look.
        self._tables: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}

    def add(self, text: str, places: tuple[int, ...], value: Any) -> None:
        """Add a text, whose characters at ``places`` may be any; the first one counts.

        Args:
            text: with a dot at these places.
            places: where any character may stand.
            value: what to return for it.
        """
        table = self._tables.setdefault((len(text), places), {})
        table.setdefault(text, value)

    def found(self, name: str, starts: Iterable[int], *, at_end: bool) -> Iterator[Any]:
        """Yield the values of the texts that begin at one of ``starts`` and reach to
        the end of ``name`` or, if not ``at_end``, to one of its dots.
        """
        for start in starts:
            for (length, places), table in self._tables.items():
                end = start + length
                if end > len(name) or (
                    end < len(name) and (at_end or name[end] != ".")
                ):
                    continue
                text = name[start:end]
                for place in places:
                    text = f"{text[:place]}.{text[place + 1 :]}"
                if text in table:
                    yield table[text]


def starts_of_parts(name: str) -> list[int]:
    """Return where the parts of a name begin, which dots separate."""
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


class Targets:
    """Names as ``target_modules`` gives them: a text is a pattern for whole names, a
    list holds ends of names.
    """

    def __init__(self, targets: str | list[str]) -> None:
        self.names = frozenset(() if isinstance(targets, str) else targets)
        self._whole, self._pattern = Texts(), None
        if isinstance(targets, str):
            # What save_adapter writes for many layers is a row of names.
            texts = [plain_text(word) for word in targets.split("|")]
            if None in texts:
                self._pattern = re.compile(targets)
            for text in texts if self._pattern is None else ():
                assert text is not None
                self._whole.add(*text, value=True)

    def __contains__(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(name) is not None
        return any(self._whole.found(name, [0], at_end=True)) or any(
            name[start:] in self.names for start in starts_of_parts(name)
        )


class Values:
    """Values by pattern, as ``rank_pattern`` gives them: a pattern holds for a whole
    name or its end after a dot, and the first that matches counts.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._whole, self._ends = Texts(), Texts()
        self._patterns: list[tuple[int, re.Pattern[str], Any]] = []
        for order, (key, value) in enumerate(values.items()):
            text = plain_text(key.removeprefix("^"))
            if text is None:
                pattern = re.compile(VALUE_OF.format(pattern=key))
                self._patterns.append((order, pattern, value))
            else:
                texts = self._whole if key.startswith("^") else self._ends
                texts.add(*text, value=(order, value))

    def of(self, name: str, usual: Any) -> Any:
        """Return the value for ``name``, or ``usual`` if no pattern matches."""
        found = [
            *self._whole.found(name, [0], at_end=True),
            *self._ends.found(name, starts_of_parts(name), at_end=True),
        ]
        first = min((order for order, _ in found), default=None)
        for order, pattern, value in self._patterns:
            if first is not None and first < order:
                break
            if pattern.match(name):
                found.append((order, value))
                break
        return min(found, key=lambda pair: pair[0])[1] if found else usual


class SavedModules:
    """Names as ``modules_to_save`` gives them. PEFT saves each module whose name ends
    with one of them, also in the middle of a word, and adapts nothing that has one of
    them, as a pattern, among its parts.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._lengths = sorted({len(name) for name in self._names})
        self._parts = Texts()
        self._patterns: list[re.Pattern[str]] = []
        for name in self._names:
            if (text := plain_text(name)) is None:
                self._patterns.append(re.compile(KEPT_OUT.format(pattern=name)))
            else:
                self._parts.add(*text, value=True)

    def __contains__(self, name: str) -> bool:
        return any(name[-length:] in self._names for length in self._lengths)

    def keep_out(self, name: str) -> bool:
        """Tell whether a layer of this name isn't adapted because of them."""
        return any(self._parts.found(name, starts_of_parts(name), at_end=False)) or any(
            pattern.match(name) for pattern in self._patterns
        )
