"""pyproject.toml, constraints.txt, environment.yml and what is installed say the
same."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from distributions import installed, needed
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


@pytest.fixture(scope="module")
def conda(root):
    return yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))


def test_every_dependency_has_a_constraint_that_satisfies_it(project, pins):
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wrong = []
    for requirement in (Requirement(line) for lines in lists for line in lines):
        name = canonicalize_name(requirement.name)
        if name != project["name"] and not requirement.specifier.contains(
            pins.get(name, "0")
        ):
            wrong.append(f"{requirement} against {name}=={pins.get(name)}")
    assert not wrong


def test_every_constraint_is_what_is_installed(pins):
    differing = {
        name: (version, installed(name))
        for name, version in pins.items()
        # A build's label such as +cpu isn't part of the version. What only another
        # system or list needs isn't installed.
        if installed(name) is not None and Version(installed(name)).public != version
    }
    assert not differing, "constraint and installed version differ"


def test_every_constraint_runs_on_the_first_release_of_the_oldest_python(pins, project):
    # A package may ask for 3.11.5, say, which resolving under a later 3.11 doesn't
    # show.
    oldest = Version(project["requires-python"].removeprefix(">=") + ".0")
    asks_for_more = {
        name: wanted
        for name in pins
        if installed(name)
        and (wanted := metadata.metadata(name)["Requires-Python"])
        and oldest not in SpecifierSet(wanted)
    }
    assert asks_for_more == {}


def test_what_is_constrained_is_what_the_projects_lists_need(project, pins):
    for_tests = needed(project, ["lab", "test"])
    assert len(for_tests) > 100
    assert not {name for name in for_tests if not installed(name)}, "missing"
    assert for_tests <= set(pins), "not constrained: make lock"
    # Lists that the tests don't need may be installed or not.
    superfluous = {name for name in pins if installed(name)} - needed(
        project, project["optional-dependencies"]
    )
    assert not superfluous, "nothing needs them any more: make lock"


def test_conda_environment_carries_the_projects_name_and_installs_only_the_project(
    conda, project
):
    assert conda["name"] == project["name"]
    assert conda["channels"] == ["conda-forge"]
    *from_conda, pip = conda["dependencies"]
    assert [line.split("=")[0] for line in from_conda] == ["python", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[lab]"]}
    assert set(project["optional-dependencies"]) >= {"lab", "test"}


def test_binder_installs_what_make_lab_installs(conda, project, pins, tool, root):
    # Binder builds from the first of these that it finds.
    for earlier in ("binder", ".binder", "Dockerfile", "requirements.txt"):
        assert not (root / earlier).exists()
    (line,) = [line for line in conda["dependencies"][-1]["pip"] if "-e" in line]
    assert line == f"-e .[{','.join(tool.COMMANDS['lab'][0])}]"
    locked = dict(
        re.findall(r"^([\w.-]+)==([^\s;]+)", tool.LOCK.read_text("utf-8"), re.MULTILINE)
    )
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    wanted = needed(project, ["lab"])
    assert len(wanted) > 50
    assert {name: locked[name] for name in wanted} == {
        name: pins[name] for name in wanted
    }


def test_the_python_versions_agree(conda, project, tool):
    oldest = ".".join(map(str, tool.MINIMUM))
    assert project["requires-python"] == f">={oldest}"
    (python,) = [
        line for line in conda["dependencies"] if str(line).startswith("python=")
    ]
    # The stored outputs come from the oldest Python, whose versions exist for the newer
    # ones too.
    assert python == f"python={oldest}"
    assert SpecifierSet(project["requires-python"]).contains(
        ".".join(map(str, sys.version_info[:3]))
    )


def test_ci_runs_the_tests_that_the_readme_names(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


@pytest.mark.skipif(shutil.which("make") is None, reason="make isn't installed")
def test_make_targets(root):
    def make(*arguments):
        # Without the variables of a make that runs these tests.
        bare = {"PATH": os.environ["PATH"]}
        command = ["make", "--no-print-directory", *arguments]
        return subprocess.run(
            command, cwd=root, env=bare, capture_output=True, text=True, check=True
        ).stdout

    def dry(*arguments):
        return make("--dry-run", "PYTHON=py", *arguments).strip()

    tool = "py tools/environment.py"
    assert dry("lab") == f"{tool}  lab"
    assert (
        dry("lab", "TORCH=cpu", "LAB_ARGS=--no-browser")
        == f'{tool} "--torch=cpu" lab --no-browser'
    )
    assert dry("test", "PYTEST_ARGS=-k 'a b'") == f"{tool}  test -k 'a b'"
    assert dry("check") == f"{tool}  check"
    assert dry("clean") == f"{tool}  clean"
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = make()
    for target in phony.split():
        assert re.search(rf"^make {target} +[A-Z].*\.$", shown, re.MULTILINE), target
    for script in re.findall(r" run (\S+\.py)", makefile):
        assert (root / script).is_file(), script
