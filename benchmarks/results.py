"""Where measured results are kept, and how they are written."""

import json
from pathlib import Path
from typing import Any

from lowrank_utils.comparison.whole import write_whole

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "results"


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` as JSON in one step, so that a crash leaves the old results or
    the new ones.
    """
    path = FOLDER / f"{name}.json"
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
