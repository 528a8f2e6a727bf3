"""Where measured results are kept, and how they are written."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "results"


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` as JSON in one step, so that a crash leaves the old results or
    the new ones.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return temporary.replace(path)
