"""A class or function that a notebook builds up and the package also has is the same
code."""

import ast
from pathlib import Path

import nbformat
import pytest
import torch

import lowrank_utils
from lowrank_utils import checks, lora

PACKAGE = Path(lowrank_utils.__file__).parent
NOTEBOOKS = sorted(
    (Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb")
)

# Shorter in the notebook, and held to the package's by what it computes.
TWINS = {"LoRALayer"}
# What the series promises to build in front of the reader.
BUILT = {
    "02_lora_layer": {"LinearWithLoRA", "freeze_linear_layers"},
    "03_merged_and_unmerged": {"LinearWithLoRAMerged"},
    "05_dora": {"row_scale", "LinearWithDoRAMerged", "LinearWithDoRA"},
    "09_transformer": {"mean_of_tokens"},
    "10_four_bits": {
        *("nf4_levels", "pack", "unpack", "quantize", "dequantize"),
        *("DequantizedProduct", "QuantizedLinear"),
    },
}


class _BareCode(ast.NodeTransformer):
    """Drop what a notebook's reader doesn't need: docstrings and type annotations."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns = None
        node.body = _without_docstring(node.body)
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.body = _without_docstring(node.body)
        return node

    def visit_arg(self, node):
        node.annotation = None
        return node


def _without_docstring(body):
    first = body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_docstring else body


def definitions(source):
    """Return each top-level class and function of ``source`` by name, as bare code."""
    return {
        node.name: ast.unparse(_BareCode().visit(node))
        for node in ast.parse(source).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }


def comments_of(source, name):
    """Return the comments inside a definition, which carry the reasons."""
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return [line.strip() for line in lines if line.strip().startswith("#")]


@pytest.fixture(scope="module")
def package():
    sources = [
        path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py"))
    ]
    return {
        name: (code, source)
        for source in sources
        for name, code in definitions(source).items()
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_both_define_is_the_same(path, package):
    found = set()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or "exercise" in cell.metadata.get("tags", []):
            continue
        for name, code in definitions(cell.source).items():
            if name in package and name not in TWINS:
                assert code == package[name][0], (
                    f"{name} in {path.name} differs from the package's"
                )
                assert comments_of(cell.source, name) == comments_of(
                    package[name][1], name
                )
                found.add(name)
    assert found == BUILT.get(path.stem, set())


def test_the_lora_layer_of_notebook_2_computes_what_the_packages_does():
    (path,) = [path for path in NOTEBOOKS if path.stem == "02_lora_layer"]
    cells = [c.source for c in nbformat.read(path, as_version=4).cells]
    (source,) = [source for source in cells if source.startswith("class LoRALayer(")]
    space = {"torch": torch, "nn": torch.nn}
    exec(source, space)
    # With the line that the reader writes.
    readers_class = checks.checked_lora_layer(space["LoRALayer"])
    layers = []
    for layer_class in (readers_class, lora.LoRALayer):
        torch.manual_seed(0)
        layers.append(layer_class(7, 5, rank=2, alpha=1.5))
    mine, packages = (layer.state_dict() for layer in layers)
    assert mine.keys() == packages.keys()
    for name, value in packages.items():
        torch.testing.assert_close(mine[name], value)
    layers[0].load_state_dict(packages)
    for layer in layers:
        torch.nn.init.ones_(layer.B)
    x = torch.randn(3, 4, 7)
    outputs = [layer(x) for layer in layers]
    assert torch.equal(*outputs)
    gradients = [
        torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        for output, layer in zip(outputs, layers, strict=True)
    ]
    assert all(map(torch.equal, *gradients))
