"""The table of settings is what was run, and a setting is prepared as its name says."""

import json
import subprocess
import sys

import matrix
import pytest
import torch
from matrix import (
    IS_X86_64,
    RESULTS,
    SETTINGS,
    TABLE,
    NotOffered,
    lowest,
    prepared,
    table,
)

PROJECT = matrix.ROOT

on_x86_64 = pytest.mark.skipif(not IS_X86_64, reason="this isn't an x86-64 processor")


def rows():
    return {
        row["setting"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))
    }


def test_the_page_shows_the_rows(monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", PROJECT)
    shown = table(rows())
    assert TABLE.read_text(encoding="utf-8") == shown, (
        "after a change to a notebook: python tools/matrix.py --table"
    )


def test_a_row_of_other_notebooks_is_named_so(monkeypatch, tmp_path):
    notebook = tmp_path / "notebooks" / "01.ipynb"
    notebook.parent.mkdir()
    monkeypatch.setattr(matrix, "ROOT", tmp_path)

    def write(text, source, output):
        cells = [
            {"cell_type": "markdown", "source": text},
            {"cell_type": "code", "source": source, "outputs": [output]},
        ]
        notebook.write_text(json.dumps({"cells": cells}))

    write("words", "1 + 1", "2")
    row = {
        "outcome": "all 1 cells the same",
        "versions": "",
        "date": "",
        "notebooks": matrix.digest(),
    }
    changed = "all 1 cells the same, of notebooks that have changed since"
    assert changed not in table({"SSE, 1 thread": row})
    write("other words", "1 + 1", "2")
    assert changed not in table({"SSE, 1 thread": row})
    for source, output in [("1 + 2", "2"), ("1 + 1", "3")]:
        write("words", source, output)
        assert changed in table({"SSE, 1 thread": row})


@pytest.mark.parametrize("told", ["default", "avx512"])
def test_a_vector_unit_that_the_processor_lacks_is_not_offered(monkeypatch, told):
    def run(command, env, **_):
        # As torch does: what it is told to use, or else what the processor has.
        return subprocess.CompletedProcess(
            command, 0, env.get("ATEN_CPU_CAPABILITY", "AVX2") + "\n"
        )

    monkeypatch.setenv("ATEN_CPU_CAPABILITY", told)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    monkeypatch.setattr(matrix, "IS_X86_64", True)
    for wanted in (None, "DEFAULT", "AVX2"):
        matrix.check_vectors(wanted, sys.executable)
    with pytest.raises(NotOffered, match="has AVX2 and not AVX512"):
        matrix.check_vectors("AVX512", sys.executable)
    monkeypatch.setattr(matrix, "IS_X86_64", False)
    matrix.check_vectors(None, sys.executable)
    with pytest.raises(NotOffered, match="isn't an x86-64 processor"):
        matrix.check_vectors("DEFAULT", sys.executable)


@on_x86_64
def test_torch_names_a_width_that_is_known():
    assert torch.backends.cpu.get_cpu_capability() in matrix.WIDTHS


@on_x86_64
def test_sums_are_taken_in_another_order_under_sse():
    code = (
        "import hashlib, torch; torch.set_num_threads(1); torch.manual_seed(0); "
        "product = torch.randn(64, 784, dtype=torch.float64) @ torch.randn(784, 128, dtype=torch.float64); "
        "print(hashlib.sha256(product.numpy().tobytes()).hexdigest())"
    )
    here = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert len(here) == 64
    under_sse = output_in("SSE, 1 thread", sys.executable, "-c", code)
    assert len(under_sse) == 64
    assert under_sse != here


def test_what_another_machine_could_run_stays(monkeypatch, tmp_path):
    old = {
        "setting": "AVX-512, 1 thread",
        "outcome": "all 9 cells the same",
        "versions": "",
        "date": "",
        "notebooks": "",
    }
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "TABLE", tmp_path / "table.md")
    matrix.save({old["setting"]: old})
    monkeypatch.setattr(sys, "argv", ["matrix.py", "AVX-512"])
    monkeypatch.setattr(
        matrix,
        "run",
        lambda setting: {**old, "setting": setting.name, "outcome": "not run: no"},
    )
    assert matrix.main() == 0
    assert matrix.stored()["AVX-512, 1 thread"] == old
    assert matrix.stored()["AVX-512, 2 threads"]["outcome"] == "not run: no"


def test_nothing_differed_in_what_was_run():
    outcomes = {name: row["outcome"] for name, row in rows().items()}
    assert set(outcomes) <= {setting.name for setting in SETTINGS}
    for name, outcome in outcomes.items():
        assert outcome.startswith(("all ", "not run: ")), name


def named(name):
    (setting,) = [setting for setting in SETTINGS if setting.name == name]
    return setting


def output_in(name, *command):
    """Return what a command prints in a setting; skip where this machine doesn't offer
    it."""
    try:
        with prepared(named(name)) as (before, folder, variables):
            run = subprocess.run(
                [*before, *command],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                check=False,
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
        output_in(
            "without HOME",
            sys.executable,
            "-c",
            "import os; print('HOME' in os.environ)",
        )
        == "False"
    )


def test_without_a_network_there_is_loopback_alone():
    code = "import socket; print([name for _, name in socket.if_nameindex()])"
    assert "eth0" not in output_in(
        "no network but loopback", sys.executable, "-c", code
    )
    code = "import socket; socket.create_server(('127.0.0.1', 0)); print('bound')"
    assert output_in("no network but loopback", sys.executable, "-c", code) == "bound"


def test_the_copy_lies_in_a_path_with_a_space():
    place = output_in(
        "a path with a space and umlauts",
        sys.executable,
        "-c",
        "import os; print(os.getcwd())",
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
    assert f'"torch>={lowest("torch")}"' in (PROJECT / "pyproject.toml").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("printed", "status", "outcome"),
    [
        ("127 passed in 1s", 0, "all 127 tests pass"),
        ("4 failed, 123 passed in 1s", 1, "4 tests fail or are skipped"),
        # As where PEFT can't be imported.
        ("3 passed, 1 skipped in 1s", 0, "1 tests fail or are skipped"),
        ("", 3, "? tests fail or are skipped"),
    ],
)
def test_with_the_oldest_peft_all_tests_must_have_run(
    monkeypatch, printed, status, outcome
):
    commands = []

    def run(command, **_):
        commands.append(command)
        said = "3.11.7 0.18.0 4.52.1 2.5.0" if "-c" in command else printed
        return subprocess.CompletedProcess(command, status, said, "")

    monkeypatch.setattr(matrix, "environment", lambda _: sys.executable)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    row = matrix.run(named("oldest PEFT, transformers and torch"))
    assert row["outcome"] == outcome
    assert (
        row["versions"]
        == "Python 3.11.7, peft 0.18.0, transformers 4.52.1, torch 2.5.0"
    )
    assert commands[0][-5:-1] == [
        "tests/unit/test_peft_parity.py",
        "tests/unit/test_text.py",
        "tests/unit/adapters",
        "-k",
    ]


def test_the_oldest_peft_that_was_run_is_the_oldest_that_is_allowed(monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", PROJECT)
    versions = rows()["oldest PEFT, transformers and torch"]["versions"].split(", ")
    for package in ("peft", "transformers", "torch"):
        (version,) = [v.split()[1] for v in versions if v.startswith(f"{package} ")]
        asked = lowest(package)
        assert version.split(".")[: asked.count(".") + 1] == asked.split(".")


def test_a_comment_changes_no_code():
    source = 'x = "#1"  # two\n\n# three\ny = f"{x}#4"\n'
    assert matrix.without_comments(source) == 'x = "#1"\ny = f"{x}#4"'
