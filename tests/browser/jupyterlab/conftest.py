"""JupyterLab as ``make lab`` starts it, on a copy of the project."""

import shutil
from pathlib import Path

import pytest
from lab_pages import LabSite
from lab_process import started_lab

ROOT = Path(__file__).resolve().parents[3]
# What the server and the notebooks read.
PARTS = (
    "figures",
    "lowrank_utils",
    "notebooks",
    "tools",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser_type_launch_args):  # noqa: ARG001 (where there is no browser, it skips first)
    """JupyterLab on a copy of the project, for all tests here."""
    copy = tmp_path_factory.mktemp("project")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part,
                copy / part,
                ignore=shutil.ignore_patterns(".*", "__pycache__"),
            )
        else:
            shutil.copy(ROOT / part, copy)
    folder = tmp_path_factory.mktemp("jupyter")
    with started_lab(copy, folder, check=True) as process:
        server = process.wait_for(process.information, seconds=180)
        yield LabSite(f"http://127.0.0.1:{server['port']}", server["token"], copy)
        assert process.elsewhere() == [], (
            "JupyterLab or a notebook asked another machine"
        )


@pytest.fixture
def page(page, lab):
    """As the plugin's; the kernels that a test started are ended after it."""
    yield page
    lab.end_kernels(page)
