"""The table of settings is what was run, and a setting is prepared as its name says."""

import json
import subprocess
import sys

import matrix
import pytest
from matrix import RESULTS, SETTINGS, TABLE, NotOffered, lowest, prepared, table

PROJECT = matrix.ROOT


def rows():
    return {row["setting"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}


def test_the_page_shows_the_rows():
    assert TABLE.read_text(encoding="utf-8") == table(rows())


def test_nothing_differed_in_what_was_run():
    outcomes = {name: row["outcome"] for name, row in rows().items()}
    assert set(outcomes) <= {setting.name for setting in SETTINGS}
    for name, outcome in outcomes.items():
        assert outcome.startswith(("all ", "not run: ")), name


def named(name):
    (setting,) = [setting for setting in SETTINGS if setting.name == name]
    return setting


def output_in(name, *command):
    """Return what a command prints in a setting; skip where this machine doesn't offer it."""
    try:
        with prepared(named(name)) as (before, folder, variables):
            run = subprocess.run(
                [*before, *command], cwd=folder, env=variables, capture_output=True, text=True, check=False
            )
            return run.stdout.strip() + run.stderr.strip()
    except NotOffered as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A small project to copy, so that a test takes no longer than it must."""
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(matrix, "ROOT", tmp_path / "project")


def test_without_home_there_is_none():
    assert (
        output_in("without HOME", sys.executable, "-c", "import os; print('HOME' in os.environ)") == "False"
    )


def test_without_a_network_there_is_loopback_alone():
    code = "import socket; print([name for _, name in socket.if_nameindex()])"
    assert "eth0" not in output_in("no network but loopback", sys.executable, "-c", code)
    code = "import socket; socket.create_server(('127.0.0.1', 0)); print('bound')"
    assert output_in("no network but loopback", sys.executable, "-c", code) == "bound"


def test_the_copy_lies_in_a_path_with_a_space():
    place = output_in(
        "a path with a space and umlauts", sys.executable, "-c", "import os; print(os.getcwd())"
    )
    assert " " in place
    assert not place.isascii()


def test_the_read_only_checkout_cannot_be_written():
    code = "open('new', 'w')"
    assert "Read-only file system" in output_in(
        "a checkout that can't be written", sys.executable, "-c", code
    )


def test_the_locale_is_there():
    code = "import locale; locale.setlocale(locale.LC_ALL, ''); print(locale.localeconv()['decimal_point'])"
    assert output_in("German, UTC+14", sys.executable, "-c", code) == ","


def test_the_lowest_versions_are_those_of_pyproject(monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", PROJECT)
    assert f'"torch>={lowest("torch")}"' in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
