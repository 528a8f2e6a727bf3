"""Files that are there whole or not at all, also if the machine stops meanwhile."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Yield where to write what then takes the place of ``path``.

    If it can't be written, nothing of it stays, and what was there is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the same ending, by which matplotlib knows the format.
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8 and with plain line ends, in one step."""
    with in_one_step(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
