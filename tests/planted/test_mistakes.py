"""The planted mistakes fit the code as it is; ``mistakes.py`` itself runs them."""

import ast

import pytest
from mistakes import MISTAKES, ROOT

EACH = pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)


@EACH
def test_the_right_code_stands_there_once_and_the_wrong_one_is_code_too(mistake):
    source = (ROOT / "lowrank_utils" / mistake.file).read_text(encoding="utf-8")
    assert source.count(mistake.right) == 1
    assert ast.dump(
        ast.parse(source.replace(mistake.right, mistake.wrong))
    ) != ast.dump(ast.parse(source))


@EACH
def test_the_test_that_finds_it_exists(mistake):
    file, name = mistake.test.split("::")
    tree = ast.parse((ROOT / "tests" / "unit" / file).read_text(encoding="utf-8"))
    assert name in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef)
    }


def test_there_are_enough_and_none_is_there_twice():
    assert (
        len({(mistake.file, mistake.right, mistake.wrong) for mistake in MISTAKES})
        == len(MISTAKES)
        >= 20
    )
