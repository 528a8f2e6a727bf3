"""The runs of a sweep: grids of parameters, and how a run is known."""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from lowrank_utils.comparison.settings import Settings

# The folder that the package lies in.
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "comparison.ipynb"
# With what it imports of this package, it decides what an experiment computes.
EXPERIMENT = "lowrank_utils.comparison.experiment"

Grid = Mapping[str, Any]


class SweepError(RuntimeError):
    """The sweep can't begin or go on; the message says what to do."""


class Plan(NamedTuple):
    """What a grid's file holds.

    Attributes:
        grids: each a mapping of parameter → values.
        declared: what the runs are to decide, as the file has it; None if nothing is
            declared.
    """

    grids: list[Grid]
    declared: Any = None


TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as SafeLoader reads it, without its two traps: a key that is given twice is
    an error, where SafeLoader takes the last, and 1e-3 is a number, as in YAML 1.2.
    """

    # Before keys are merged (<<), which may well give one of them again.
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            # The merge sign has no value of its own.
            name = key.value
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                name = self.construct_object(key)
            if not isinstance(name, Hashable):
                continue
            line = key.start_mark.line + 1
            if name in lines:
                places = sorted({lines[name], line})
                raise yaml.YAMLError(
                    f"{name} is given twice, in line{'s' * (len(places) > 1)} "
                    f"{' and '.join(map(str, places))}; give all its values at once"
                )
            lines[name] = line
        return node


_Loader.add_implicit_resolver(
    f"{TAG}float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds; of Python it can make plain values alone.

    Raises:
        ValueError: it isn't YAML, or a key is given twice; the message is one line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    # What PyYAML's own constructors raise of a date, a number or a tag that isn't one.
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"a value can't be read ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path, kind: str, option: str = "") -> str:
    """Return the text of a file that the command line names.

    Args:
        path: the file's.
        kind: what it should be, with its article.
        option: the command line's option for it, with a space after it.

    Raises:
        SweepError: it is a folder, can't be read, or isn't text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SweepError(
            f"{option}{path} isn't {kind}: byte {error.start} isn't text in UTF-8"
        ) from None
    except OSError as error:
        # Windows says of a folder that access is denied.
        if path.is_dir():
            raise SweepError(f"{option}{path} is a folder; name {kind} in it") from None
        raise SweepError(
            f"{option}{path} can't be read ({error.strerror}); name {kind} that can"
        ) from None


def read_plan(path: Path) -> Plan:
    """Read a YAML file: a grid, a list of grids, or such a list as ``grids`` beside
    what is ``declared``.

    A grid is a mapping of parameter → the values to go through.

    Raises:
        SweepError: the file can't be read or holds something else.
    """
    text = read_text(path, "a YAML file")
    try:
        content = parse_yaml(text)
    except ValueError as error:
        said = "" if " is given twice, in line" in str(error) else " isn't YAML"
        raise SweepError(f"{path}{said}: {error}") from None
    if content is None:
        raise SweepError(
            f"{path} is empty: it must hold parameters and their values, or a list of such"
        )
    declared = None
    if isinstance(content, dict) and "grids" in content:
        if unknown := sorted(map(str, content.keys() - {"grids", "declared"})):
            raise SweepError(
                f"{path} must hold grids and what is declared beside them; got {', '.join(unknown)}"
            )
        content, declared = content["grids"], content.get("declared")
    grids = content if isinstance(content, list) else [content]
    if not grids:
        raise SweepError(f"{path} holds no grid")
    for grid in grids:
        if not isinstance(grid, dict) or not grid:
            raise SweepError(
                f"{path} must hold parameters and their values, or a list of such; got {grid!r}"
            )
    return Plan(grids, declared)


def read_notebook(path: Path) -> str:
    """Return the text of a notebook.

    Raises:
        SweepError: it can't be read, or isn't a notebook.
    """
    text = read_text(path, "a notebook", "--notebook ")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SweepError(
            f"--notebook {path} isn't a notebook: it isn't JSON ({error})"
        ) from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(
        isinstance(cell, dict) and {"cell_type", "source"} <= cell.keys()
        for cell in cells
    ):
        raise SweepError(
            f"--notebook {path} isn't a notebook: it is JSON without a notebook's cells"
        )
    return text


def notebook_defaults(notebook: Path) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults.

    Raises:
        SweepError: papermill isn't installed, or it isn't a notebook with parameters.
    """
    read_notebook(notebook)
    try:
        import papermill
    except ImportError:
        raise SweepError(
            "papermill isn't installed; in the project's folder type: pip install -e \".[lab]\""
        ) from None
    try:
        # With its folder, since papermill reads names such as - from elsewhere.
        found = papermill.inspect_notebook(str(notebook.absolute()))
    except Exception as error:  # of JSON that only looks like a notebook
        raise SweepError(
            f"--notebook {notebook} can't be read by papermill "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    if not found:
        raise SweepError(
            f"--notebook {notebook} has no parameters: give the cell that sets them the "
            "tag parameters, as in comparison.ipynb"
        )
    defaults = {}
    for name, parameter in found.items():
        try:
            defaults[name] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            raise SweepError(
                f"--notebook {notebook}: the parameter {name} must be a plain value, "
                f"such as 1, 'text' or a list; got {parameter['default']}"
            ) from None
    return defaults


def expand(grids: Sequence[Grid], defaults: Mapping[str, Any]) -> list["Settings"]:
    """Return the settings of every run: each combination of the values in each grid,
    none of them twice.

    Args:
        grids: parameter → the values to go through. A single value stands for a list of
            it; for a parameter that is itself a list (``ranks``), a value that is none
            stands for a list of one.
        defaults: of the notebook, for what a grid leaves out.

    Raises:
        SweepError: a parameter is unknown or a value is not allowed.
    """
    # Here, since the workers of a sweep import this module and needn't wait for torch.
    from lowrank_utils.comparison.settings import Settings

    known = {name: value for name, value in defaults.items() if name != "result_path"}
    runs: list[Settings] = []
    for grid in grids:
        if unknown := [name for name in grid if name not in known]:
            raise SweepError(
                f"unknown: {', '.join(map(str, unknown))}; the parameters are {', '.join(known)}"
            )
        values = {
            name: _values(value, isinstance(known[name], list))
            for name, value in grid.items()
        }
        if empty := [name for name, value in values.items() if not value]:
            raise SweepError(f"no values for {', '.join(empty)}")
        for chosen in itertools.product(*values.values()):
            combination = dict(zip(values, chosen, strict=True))
            try:
                run = Settings.of({**known, **combination})
            except (TypeError, ValueError) as error:
                raise SweepError(f"{combination}: {error}") from None
            if run not in runs:
                runs.append(run)
    return runs


def _values(value: Any, of_lists: bool) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [[v] if of_lists and not isinstance(v, list) else v for v in values]


def code_version(notebook: str) -> str:
    """Return a short hash of the code that decides a result: the notebook's, the
    package's, and torch's version.

    Comments and docstrings don't count, nor does what a notebook does after it has
    written its result.

    Args:
        notebook: its text.
    """
    cells = [
        cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"
    ]
    sources = ["".join(cell["source"]) for cell in cells]
    written = max(
        (place for place, source in enumerate(sources) if "result_path" in source),
        default=len(sources),
    )
    files = [code for _, code in sorted(code_of(EXPERIMENT).items())]
    # A build's label such as +cpu doesn't change the digits.
    parts = [
        *map(_bare_code, [*sources[: written + 1], *files]),
        metadata.version("torch").split("+")[0],
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def code_of(module: str) -> dict[str, str]:
    """Return name → source of a module and of all modules of this package that it
    imports, at any depth.
    """
    found: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name in found:
            continue
        found[name] = (ROOT / f"{name.replace('.', '/')}.py").read_text(
            encoding="utf-8"
        )
        left += [
            str(node.module)
            for node in ast.walk(ast.parse(found[name]))
            if isinstance(node, ast.ImportFrom)
            and str(node.module).startswith("lowrank_utils.")
        ]
    return found


def _bare_code(source: str) -> str:
    """Return ``source`` without comments and docstrings, in one normal form."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a notebook's %magic
        return source
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def run_id(settings: "Settings", version: str) -> str:
    """Return the name of a run, which its parameters and the code's version decide."""
    text = json.dumps({"settings": settings.as_dict(), "code": version}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
