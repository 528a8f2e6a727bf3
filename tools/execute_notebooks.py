"""Execute the notebooks in fresh kernels and write them back in one normal form.

The executed .ipynb files are the only source of the series: edit one in JupyterLab,
then run this script, look at the difference, and commit. Two runs write the same bytes.

    python tools/execute_notebooks.py                       execute and normalise all notebooks
    python tools/execute_notebooks.py notebooks/04_*.ipynb  the same for some
    python tools/execute_notebooks.py --keep-outputs        execute nothing; write the normal form of what is stored
    python tools/execute_notebooks.py --check               execute nothing; fail if a file isn't in normal form
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contents
import nbformat
from minutes import exercise_minutes, reading_minutes
from nbclient import NotebookClient
from nbformat import NotebookNode
from tqdm import tqdm

from lowrank_utils.comparison.kernels import kernel_environment
from lowrank_utils.comparison.whole import write_whole

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

# Metadata that says how a cell is used. All the rest (timings, scroll positions) is the
# editor's.
KEPT_CELL_METADATA = {"tags", "mystnb", "jupyter"}

MINUTES = re.compile(r"About \d+ minutes to read and run, \d+ for the exercises")

NOTEBOOK_METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


def execute(
    notebook: NotebookNode,
    folder: Path,
    timeout: int = 600,
    **hooks: Callable[..., Any],
) -> None:
    """Run all cells of ``notebook`` in a fresh kernel, in place.

    Args:
        notebook: what to run.
        folder: the kernel's working directory.
        timeout: seconds per cell.
        hooks: what nbclient calls on the way, such as ``on_cell_executed``.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources=resources,
        # Of a kernel on this machine nobody needs to hear that it isn't encrypted.
        extra_arguments=["--log-level=ERROR"],
        **hooks,
    )
    client.execute(env=kernel_environment())


def normalise(notebook: NotebookNode) -> str:
    """Return the notebook's text with everything left out that isn't the author's or
    the code's doing.
    """
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.metadata.items() if k in KEPT_CELL_METADATA}
        )
        cell.source = "\n".join(
            line.rstrip() for line in cell.source.strip("\n").split("\n")
        )
        if cell.cell_type == "code":
            count += 1
            # A cell that never ran keeps its missing count, which the tests refuse.
            cell.execution_count = count if cell.execution_count is not None else None
            cell.outputs = [
                _normal_output(output, count) for output in _merge_streams(cell.outputs)
            ]
    fold_predicted_outputs(notebook)
    state_minutes(notebook)
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def fold_predicted_outputs(notebook: NotebookNode) -> None:
    """Hide what comes out between a "Predict" and the next words: in JupyterLab until a
    cell is run, and on the site until somebody wants to see it.
    """
    asked = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            asked = "**Predict.**" in cell.source
        elif asked and cell.outputs:
            tags = cell.metadata.get("tags", [])
            cell.metadata["tags"] = [*tags, *{"hide-output"}.difference(tags)]
            cell.metadata.setdefault("jupyter", {})["outputs_hidden"] = True


def state_minutes(notebook: NotebookNode) -> None:
    """Write into the first cell how long the notebook takes: what ``reading_minutes``
    counts, and the sum of what the exercises say.
    """
    notebook.cells[0].source = MINUTES.sub(
        f"About {reading_minutes(notebook)} minutes to read and run, "
        f"{exercise_minutes(notebook)} for the exercises",
        notebook.cells[0].source,
    )


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join what a cell printed in several pieces; where it was cut is a matter of
    timing.
    """
    merged: list[NotebookNode] = []
    for output in outputs:
        previous = merged[-1] if merged else None
        if (
            previous is not None
            and output.output_type == previous.output_type == "stream"
            and output.name == previous.name
        ):
            previous.text += output.text
        else:
            merged.append(output)
    return merged


def _normal_output(output: NotebookNode, count: int) -> NotebookNode:
    # The id of a widget is random, and worth nothing without its kernel; its text
    # stays.
    output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    if output.output_type == "execute_result":
        output.execution_count = count
    if "metadata" in output:
        output.metadata = NotebookNode()
    if output.output_type == "error":
        # The full traceback holds paths and line numbers of this machine's packages.
        output.traceback = [f"{output.ename}: {output.evalue}"]
    return output


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="default: all in notebooks/"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--keep-outputs",
        action="store_true",
        help="execute nothing; write the normal form",
    )
    mode.add_argument(
        "--check",
        action="store_true",
        help="execute nothing; fail if not in normal form",
    )
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    failed = False
    for path in tqdm(paths, unit="notebook", disable=arguments.check or None):
        before = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(before, as_version=4)
        if arguments.check:
            if normalise(notebook) != before:
                print(
                    f"{path}: not in normal form; run python tools/execute_notebooks.py {path}",
                    file=sys.stderr,
                )
                failed = True
            continue
        if not arguments.keep_outputs:
            execute(notebook, path.resolve().parent)
        write_whole(path, normalise(notebook))
    if not arguments.check:
        contents.main([])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
