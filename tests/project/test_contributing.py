"""What CONTRIBUTING.md, the hooks and the workflow run exists, and is what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank_utils import __version__

ROOT = Path(__file__).resolve().parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOW_FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = ["CONTRIBUTING.md", "CHANGELOG.md", "docs/faults.md", "docs/licences.md"]


def workflow(path):
    # In YAML 1.1 the key "on" is a truth value.
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in content.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


def test_every_command_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", CONTRIBUTING))
    assert named <= targets
    assert {"lab", "test", "notebooks", "bench", "compare", "lock", "audit"} <= named
    files = re.findall(r"[\w.]+/[\w./-]+\.(?:py|ipynb)", CONTRIBUTING)
    assert len(files) > 5
    for file in files:
        assert (ROOT / file).is_file(), file


def test_the_way_to_change_a_notebook_has_all_its_steps_in_order():
    way = CONTRIBUTING.split("## Change a notebook")[1].split("\n## ")[0]
    words = [
        "**Edit**",
        "**Execute and normalise**",
        "**Look at the difference**",
        "**Test**",
        "**Commit**",
    ]
    places = [way.index(word) for word in words]
    assert places == sorted(places)


def test_the_hooks_run_what_the_tests_run():
    hooks = yaml.safe_load(
        (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    )
    ruff, local = hooks["repos"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = f"\nruff=={ruff['rev'].removeprefix('v')}\n"
    assert pinned in constraints, "the same ruff as in the tests"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    (notebooks,) = local["hooks"]
    words = shlex.split(notebooks["entry"])
    assert words[-1] == "--check"
    assert [(ROOT / word).is_file() for word in words if word.endswith(".py")] == [
        True,
        True,
    ]
    assert re.search(notebooks["files"], "notebooks/05_dora.ipynb")
    assert not re.search(notebooks["files"], "notebooks/comparison.yaml")


def test_the_tests_run_on_three_systems_and_three_pythons():
    content = workflow(ROOT / ".github" / "workflows" / "tests.yml")
    matrix = content["jobs"]["constrained"]["strategy"]["matrix"]
    assert [system.split("-")[0] for system in matrix["system"]] == [
        "ubuntu",
        "macos",
        "windows",
    ]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    commands = [
        step["run"] for step in content["jobs"]["constrained"]["steps"] if "run" in step
    ]
    assert commands == ["python tools/environment.py --torch=cpu test"]
    assert content["on"]["schedule"]
    newest = [step.get("run", "") for step in content["jobs"]["newest"]["steps"]]
    assert not any("constraints" in command for command in newest)
    assert any("pip install" in command for command in newest)
    assert content["jobs"]["fuzz"]["env"] == {"HYPOTHESIS_PROFILE": "nightly"}


def test_the_workflows_are_valid_and_safe():
    names = [str(path.relative_to(ROOT)) for path in WORKFLOW_FILES]
    schema = "--builtin-schema=vendor.github-workflows"
    for command in (
        [sys.executable, "-m", "check_jsonschema", schema],
        # Actions pinned to a commit, no more rights than needed, nothing from outside
        # in a shell.
        [Path(sys.executable).parent / "zizmor", "--offline", "--no-progress"],
    ):
        done = subprocess.run(
            [*command, *names], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_tells_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert __version__ in text
    kinds = re.findall(r"^### (.*)$", text, flags=re.MULTILINE)
    assert kinds
    assert set(kinds) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
