"""A module imports what it needs, and nothing heavy besides: who wants a layer doesn't
wait for pandas."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import lowrank_utils
from lowrank_utils import adapters

PACKAGE = Path(lowrank_utils.__file__).parent
# By name, without that of the package: ``lora``, ``checks`` (its ``__init__.py``),
# ``checks.dora``.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Which packages importing a module may load; what is needed seldom is imported where it
# is used. The standard library and what the packages load themselves don't count. What
# isn't named here loads torch alone.
LAYERS = {"torch"}
SAFE = {"torch", "safetensors"}
DATA = {"torch", "numpy", "platformdirs"}
BAR = DATA | {"tqdm"}
TABLES = {"torch", "numpy", "pandas", "scipy"}
PLOTS = BAR | {"matplotlib"}
SWEEP = {"yaml", "filelock", "psutil"}
ALLOWED = {
    module: packages
    for packages, modules in (
        (
            set(),
            "__main__ adapters.folders adapters.patterns comparison comparison.kernels",
        ),
        (set(), "_blocks comparison.whole"),
        ({"lazy_loader"}, "__init__"),
        ({"platformdirs"}, "_mnist"),
        (SAFE, "adapters adapters.bank adapters.files adapters.saving"),
        (DATA, "data comparison.settings comparison.shifts"),
        (LAYERS | {"numpy", "pandas"}, "text"),
        (BAR, "training checks checks.lora_layer checks.production"),
        (BAR | {"scipy"}, "comparison.experiment"),
        (BAR | SWEEP, "comparison.__main__ comparison.command"),
        (TABLES, "comparison.tables"),
        (TABLES - {"pandas"}, "comparison.intervals"),
        (TABLES | DATA, "comparison.declared"),
        (PLOTS, "plots"),
        (PLOTS | TABLES, "comparison.plots comparison.report"),
        ({"ipywidgets", "matplotlib"}, "interactive"),
        ({"yaml"}, "comparison.grid"),
        ({"yaml", "filelock"}, "comparison.store"),
        ({"scipy"}, "comparison.tuning"),
        (SWEEP, "comparison.sweep"),
    )
    for module in modules.split()
}


def statements(body):
    """Yield what runs when a module is imported: all statements but those inside
    functions, and those for types."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, (ast.stmt, ast.ExceptHandler))
            )


def imports_of(path):
    """Yield the full name of each module that importing a file loads."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = node.module == "lowrank_utils"
            yield from (
                (f"lowrank_utils.{alias.name}" for alias in node.names)
                if inner
                else [node.module]
            )


def imported_by(path):
    """Return the modules of ours that importing a file loads, by the names that they
    have here."""
    return {
        module.removeprefix("lowrank_utils.")
        for module in imports_of(path)
        if module.startswith("lowrank_utils.")
    }


@functools.cache
def loaded(name):
    """Return the packages that importing a module of ours loads, through other modules
    of ours too."""
    packages = {module.partition(".")[0] for module in imports_of(MODULES[name])}
    packages -= {"lowrank_utils", *sys.stdlib_module_names}
    return packages.union(*(loaded(inner) for inner in imported_by(MODULES[name])))


def test_each_module_loads_what_it_needs_and_no_more():
    allowed = {name: ALLOWED.get(name, LAYERS) for name in MODULES}
    assert {name: loaded(name) for name in MODULES} == allowed
    assert ALLOWED.keys() <= MODULES.keys()


def test_the_package_alone_loads_no_torch_and_layers_nothing_heavy_beside_it():
    # Measured, and not read: what torch itself loads doesn't count.
    code = (
        "import sys, lowrank_utils\n"
        "print('torch' in sys.modules)\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "from lowrank_utils import adapt, adapters, dora, lora\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    alone, new = run.stdout.splitlines()
    assert alone == "False"
    assert "lowrank_utils" in new.split()
    heavy = {"pandas", "scipy", "sklearn", "matplotlib", "torchvision", "papermill"}
    assert (heavy | {"mlxtend", "peft"}).isdisjoint(new.split())


def names_of(path):
    """Return the classes, functions and constants that a file defines for others."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_every_public_name_of_the_learners_floor_and_of_the_adapters_can_be_imported_from_the_package():
    floor = [path for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")]
    # Sliders need the extra "lab", and all that is listed can be had without it.
    floor = [path for path in floor if path.stem != "interactive"]
    defined = {name: path.stem for path in floor for name in names_of(path)}
    listed = set(lowrank_utils.__all__)
    assert listed == {*defined, *adapters.__all__, "AdapterFileError", "DataError"}
    assert listed <= set(dir(lowrank_utils))
    for name, module in defined.items():
        assert getattr(lowrank_utils, name) is getattr(
            import_module(f"lowrank_utils.{module}"), name
        )
    with pytest.raises(AttributeError, match="LinearWithLORA"):
        _ = lowrank_utils.LinearWithLORA


def test_arrows_run_one_way():
    imports = {name: imported_by(path) - {name} for name, path in MODULES.items()}
    # Raises where modules import each other in a circle.
    list(TopologicalSorter(imports).static_order())
    houses = ("adapters", "comparison", "checks")
    for name, found in imports.items():
        house = name.split(".")[0]
        for other in {module.split(".")[0] for module in found} & set(houses):
            assert other == house, f"{name} reaches into {other}"
