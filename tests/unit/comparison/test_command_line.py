"""The commands print on any encoding, read what is meant, and name what is wrong with a
file before anything is run."""

import json
import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lowrank_utils.comparison import experiment, plots
from lowrank_utils.comparison.command import main, parser, plan_of
from lowrank_utils.comparison.grid import (
    NOTEBOOK,
    SweepError,
    expand,
    notebook_defaults,
    parse_yaml,
    read_plan,
    run_id,
)
from lowrank_utils.comparison.methods import LowRank
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.tables import spread_over_ranks
from lowrank_utils.comparison.tuning import Point
from lowrank_utils.dora import LinearWithDoRA

pytestmark = pytest.mark.slow

DEFAULTS = notebook_defaults(NOTEBOOK)

# --- Encodings ----------------------------------------------------------------------------

ENCODINGS = ["cp1252", "ascii", "latin-1"]


def printed(encoding, *words, status=0):
    run = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in run.stderr
    assert run.returncode == status, run.stderr
    return run.stdout.decode(encoding), run.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_help_and_a_dry_run_print_on_any_encoding(encoding, notebook, tmp_path):
    command = ("-m", "lowrank_utils.comparison")
    said, _ = printed(encoding, *command, "--help")
    assert "YAML file: each parameter with the values" in " ".join(said.split())
    assert "\\" not in said, "the help has letters that not every terminal has"
    out = tmp_path / "Läufe ⟶ Ω"
    words = ("--dry-run", "--notebook", str(notebook), "--out", str(out))
    assert "1 runs: 0 done" in printed(encoding, *command, *words)[0]
    _, said = printed(encoding, *command, str(out / "→.yaml"), status=2)
    assert "can't be read (No such file or directory)" in said


def test_the_installed_command_and_the_check_of_the_set_up_print_in_ascii():
    # As the entry point does it.
    code = (
        "import sys; from lowrank_utils.comparison.command import main; "
        "sys.exit(main(['-p', 'shift', 'Ω→']))"
    )
    _, said = printed("ascii", "-c", code, status=2)
    assert "got '\\u03a9\\u2192'" in said
    code = (
        "import sys, lowrank_utils.__main__ as m\n"
        "m.CHECKS = {'Ω': lambda: 'Übungs → Ordner'}\n"
        "sys.exit(m.main())"
    )
    said, _ = printed("ascii", "-c", code)
    assert said.split() == ["ok", "\\u03a9:", "\\xdcbungs", "\\u2192", "Ordner"]


# --- One run has one identity -----------------------------------------------------------------


def runs_of(*values):
    words = [word for name, *rest in values for word in ("-p", name, *rest)]
    plan = plan_of(parser().parse_args(words))
    return expand(plan.grids, DEFAULTS)


ALIKE = [
    ("alpha", "8", "8.0", "8e0", "0.8e1", "+8.", "80.0E-1", "8_.0"),
    ("alpha", "0.001", "1e-3", "1E-3", "1.0e-3", ".1e-2"),
    ("rotation", "0", "-0.0", "0.0", "0e5"),
    ("ranks", "4", "[4]", "[ 4 ]", "0x4"),
    ("methods", "LoRA", "[LoRA]", "'LoRA'", '["LoRA"]'),
]


@pytest.mark.parametrize(("name", "first", "others"), [(n, f, o) for n, f, *o in ALIKE])
def test_however_a_value_is_written_it_is_one_run(name, first, others, tmp_path):
    (run,) = runs_of((name, first))
    for other in others:
        (same,) = runs_of((name, other))
        assert run_id(same, "a") == run_id(run, "a"), other
        path = tmp_path / "grid.yaml"
        path.write_text(f"{name}: {other}", encoding="utf-8")
        (same,) = expand(read_plan(path).grids, DEFAULTS)
        assert run_id(same, "a") == run_id(run, "a"), other
    assert runs_of((name, first, *others)) == [run]


def test_true_is_one_value_however_it_is_written_and_no_number():
    assert [parse_yaml(word) for word in ("true", "True", "TRUE")] == [True] * 3
    for word in ("true", "True"):
        with pytest.raises(SweepError, match=r"alpha must be .*; got True \(bool\)"):
            runs_of(("alpha", word))


def test_settings_are_known_by_what_they_say_and_not_by_their_types():
    (run,) = expand([{}], DEFAULTS)
    other = {
        name: [np.int64(v) if isinstance(v, int) else v for v in value]
        if isinstance(value, list)
        else np.int64(value)
        if isinstance(value, int)
        else np.float64(value)
        if isinstance(value, float)
        else value
        for name, value in run.as_dict().items()
    } | {"device": torch.device("cpu")}
    same = Settings.of(other)
    assert same == run
    assert json.dumps(same.as_dict()) == json.dumps(run.as_dict())
    assert run_id(same, "a") == run_id(run, "a")


def test_a_run_that_is_stored_is_found_however_it_is_asked_for(sweep, kept):
    sweep("-p", "alpha", "8", "-p", "ranks", "1")
    (name,) = kept()[0]
    for alpha, rank in (("8.0", "[1]"), ("8e0", "1"), ("0.8e1", "[1]")):
        again = sweep("-p", "alpha", alpha, "-p", "ranks", rank, "--dry-run")
        assert f"{name}  done" in again.out
        assert "1 runs: 1 done" in again.out


def test_the_identity_of_a_run_is_what_it_was():
    # Otherwise all runs that are stored anywhere would be done again.
    (run,) = expand([{}], {**DEFAULTS, **IDENTIFIED})
    assert run_id(run, "a") == "42f90b8b799b3bc2"


IDENTIFIED = {
    "data_set": "mnist-5k",
    "shift": "rotation",
    "rotation": -45.0,
    "networks": [101, 102],
    "methods": ["LoRA", "DoRA with m's rate"],
    "ranks": [1, 4],
    "alpha": 8.0,
    "scaling": "alpha/rank",
    "init": "peft",
    "adaptation_examples": 1000,
    "batch_size": 64,
    "steps": [320, 1280],
    "tuning_points": 8,
    "tuning_seeds": [901, 902],
    "seeds": [1, 2],
    "pretraining_epochs": 10,
    "dtype": "float32",
    "device": "cpu",
}


# --- Wrong files -----------------------------------------------------------------------------

YAMLS = {
    "a folder": (None, "is a folder; name a YAML file in it"),
    "nothing": (b"", "is empty: it must hold parameters and their values"),
    "a comment": (b"# ranks: [1]\n---\n", "is empty"),
    "a word": (b"ranks", "must hold parameters and their values, or a list of such"),
    "a list": (b"- 1\n- 2\n", "must hold parameters and their values, or a list"),
    "bytes": (b"\x89PNG\r\n\x1a\n\x00", "isn't a YAML file: byte 0 isn't text"),
    "UTF-16": ("ranks: [1]".encode("utf-16"), "isn't a YAML file: byte 0 isn't text"),
    "no date": (b"alpha: 2026-13-45", "isn't YAML: a value can't be read"),
    "no number": (b"alpha: !!int x", "isn't YAML: a value can't be read"),
    "no truth": (b"alpha: !!bool x", "isn't YAML: a value can't be read"),
    "a depth": (b"[" * 5000, "isn't YAML: it is nested too deeply"),
    "two texts": (b"ranks: 1\n---\nranks: 2\n", "isn't YAML: expected a single"),
    "a key twice": (
        b"ranks: [1]\nalpha: 8\nranks: [2]\n",
        ".yaml: ranks is given twice, in lines 1 and 3; give all its values at once",
    ),
    "a key twice, quoted": (b"{ranks: 1, 'ranks': 2}", "ranks is given twice, in line"),
    "a key twice in a list": (b"- ranks: 1\n  ranks: 2\n", "ranks is given twice"),
    "a key twice in a declaration": (
        b"grids: [{ranks: 1}]\ndeclared:\n  steps: [320]\n  shifts: [blur]\n  steps: [1]\n",
        "steps is given twice, in lines 3 and 5",
    ),
    "a key twice in a test": (
        b"grids: [{ranks: 1}]\ndeclared: {tests: [{first: LoRA, first: gain}]}\n",
        "first is given twice, in line 2",
    ),
    "two declarations": (
        b"grids: [{ranks: 1}]\ndeclared: {}\ndeclared: {}\n",
        "declared is given twice, in lines 2 and 3",
    ),
}


def refused(words, capsys, tmp_path):
    """Return the one line that a command line is refused with; no run was begun."""
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowrank-compare: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return said


@pytest.mark.parametrize("case", YAMLS)
def test_each_wrong_grid_file_is_named_with_what_is_wrong(case, tmp_path, capsys):
    content, said = YAMLS[case]
    path = tmp_path / "grid.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    printed = refused([path], capsys, tmp_path)
    assert str(path) in printed
    assert said in printed


def test_what_is_merged_into_a_grid_may_be_given_again(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("- &a {ranks: 1, alpha: 8}\n- {<<: *a, ranks: 2}\n")
    assert read_plan(path).grids == [
        {"ranks": 1, "alpha": 8},
        {"ranks": 2, "alpha": 8},
    ]
    with pytest.raises(ValueError, match="<< is given twice, in line 1"):
        parse_yaml("{<<: {a: 1}, <<: {b: 1}}")


CODE = {"cell_type": "code", "source": "", "metadata": {}, "outputs": []}
PARAMETERS = CODE | {"metadata": {"tags": ["parameters"]}, "execution_count": None}


def book(*cells, **metadata):
    kernel = {
        "kernelspec": {"name": "python3", "display_name": "", "language": "python"}
    }
    return json.dumps(
        {
            "cells": cells,
            "metadata": kernel | metadata,
            "nbformat": 4,
            "nbformat_minor": 4,
        }
    ).encode()


NOTEBOOKS = {
    "nothing there": (
        None,
        "can't be read (No such file or directory); name a notebook",
    ),
    "a folder": (..., "is a folder; name a notebook in it"),
    "nothing in it": (b"", "isn't a notebook: it isn't JSON"),
    "a picture": (b"\x89PNG\r\n", "isn't a notebook: byte 0 isn't text in UTF-8"),
    "a script": (b"import torch\n", "isn't a notebook: it isn't JSON"),
    "a list": (b"[]", "isn't a notebook: it is JSON without a notebook's cells"),
    "another JSON": (b'{"cells": [1]}', "isn't a notebook: it is JSON without"),
    "no kernel": (
        json.dumps({"cells": [PARAMETERS]}).encode(),
        "can't be read by papermill (",
    ),
    "no parameters": (book(CODE), "has no parameters: give the cell"),
    "a computed parameter": (
        book(PARAMETERS | {"source": "ranks = [1]\nseeds = list(range(3))"}),
        "the parameter seeds must be a plain value, such as 1, 'text' or a list; "
        "got list(range(3))",
    ),
    "too few parameters": (
        book(PARAMETERS | {"source": "ranks = [1]\nalpha = 8"}),
        "lacks the parameters data_set, shift",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOTEBOOKS)
def test_each_wrong_notebook_is_named_with_what_is_wrong(case, tmp_path, capsys):
    content, said = NOTEBOOKS[case]
    path = tmp_path / "other.ipynb"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    printed = refused(["--notebook", path], capsys, tmp_path)
    assert f"--notebook {path}" in printed
    assert said in printed


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="root reads everything"
)
@pytest.mark.parametrize("words", [[], ["--notebook"]])
def test_a_file_that_may_not_be_read_is_named(words, tmp_path, capsys):
    path = tmp_path / "secret"
    path.touch(mode=0o000)
    said = refused([*words, path], capsys, tmp_path)
    assert f"{path} can't be read (Permission denied)" in said


@pytest.mark.parametrize("option", ["--out", "--publish"])
@pytest.mark.parametrize("below", ["", "further/down"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_that_is_a_file_is_refused_before_anything_runs(
    option, below, dry, notebook, tmp_path, capsys
):
    file = tmp_path / "file.txt"
    file.write_text("mine")
    words = ["--notebook", notebook, option, file / below, *["--dry-run"] * dry]
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"lowrank-compare: {option} must be a folder, and {file} is a file; "
        f"choose another {option}\n"
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/top", "."])
def test_a_name_that_is_a_path_is_refused(name, capsys, tmp_path):
    assert "--name must be a file's name" in refused(["--name", name], capsys, tmp_path)


@pytest.mark.parametrize("part", ["runs", "failed", ".lock"])
def test_a_store_with_something_else_in_it_is_named(part, notebook, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    if part == ".lock":
        (out / part).mkdir()
    else:
        (out / part).touch()
    assert main(["--notebook", str(notebook), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"out/\S+ isn't what a sweep puts there|can't be written", said)
    assert "disk" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"runs": 1}', b"\xff\xfe"])
def test_a_result_that_is_none_is_named(content, sweep, kept, tmp_path):
    sweep("-p", "ranks", "1")
    (name,) = kept()[0]
    path = tmp_path / "out" / "runs" / name / "result.json"
    path.write_bytes(content)
    again = sweep("-p", "ranks", "1", status=2)
    assert f"{path} can't be read" in again.err
    assert "remove its folder, and the run is done again" in again.err


# --- An unknown name is never taken for another ----------------------------------------------


@pytest.fixture(scope="module")
def task():
    digits = torch.randn(40, 784, dtype=torch.float64)
    labels = torch.arange(40) % 10
    network = experiment.MultilayerPerceptron(784, 4, 4, 10).double()
    some = experiment.Digits(digits, labels)
    return experiment.Task(1, network, some, some)


def adapted(task, **changes):
    (settings,) = expand([{"adaptation_examples": 20, "steps": [[1]]}], DEFAULTS)
    given = {"method": "LoRA", "rank": 2, "steps": 1, "point": Point(0.01), "seed": 1}
    return experiment.adapt(task, settings, **(given | changes))[1]


def test_an_adaptation_that_would_be_another_is_refused(task):
    assert adapted(task).rank == 2
    for changes, said in (
        ({"method": "QLoRA"}, "method must be one of .*'LoRA'.*; got 'QLoRA'"),
        ({"rank": None}, "'LoRA' needs a rank, a whole number; got None"),
        ({"rank": 0}, "rank must be a whole number, 1 or more; got 0"),
        ({"point": None}, "'LoRA' needs a point with a learning rate; got None"),
        ({"method": "full", "rank": None, "point": None}, "'full' needs a point"),
    ):
        with pytest.raises(ValueError, match=said):
            adapted(task, **changes)
    (settings,) = expand([{}], DEFAULTS)
    with pytest.raises(ValueError, match=r"steps must be a multiple of 8, .*; got 17"):
        experiment.adapt(task, settings, "LoRA", 2, 17, Point(0.01), 1)


def test_unknown_methods_scalings_and_targets_are_refused_with_all_names():
    with pytest.raises(ValueError, match=r"method must be one of .*'LoRA', .*'QLoRA'"):
        experiment.space_of("QLoRA")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    known = LowRank(2, 8.0, "alpha/rank", "peft")
    for changes, said in (
        ({"scaling": "alpha/r"}, "scaling must be one of 'alpha', 'alpha/rank'"),
        ({"init": "zeros"}, "init must be one of 'article', 'peft'"),
    ):
        with pytest.raises(ValueError, match=said):
            known._replace(**changes).put_in(model, LinearWithDoRA)
        assert all(isinstance(layer, nn.Linear) for layer in model)
    with pytest.raises(ValueError, match="a target must be one of '0', '1'; got '2'"):
        known._replace(targets=("0", "2")).layers(model)


def test_a_table_with_an_unknown_method_or_verdict_is_not_drawn_without_it():
    row = {
        "data_set": "mnist-5k",
        "shift": "blur",
        "rotation": 0.0,
        "adaptation_examples": 100,
        "alpha": 8.0,
        "scaling": "alpha",
        "init": "peft",
        "steps": 64,
        "method": "QLoRA",
        "rank": 1,
        "network": 1,
        "seed": 1,
        "trainable": 1,
        "score": 0.5,
        "training_loss": 0.5,
        "validation": 0.5,
        "test": 0.5,
        "dead": False,
    }
    table = pd.DataFrame([row]).astype({"rank": "Int64"})
    said = "a method must be one of .*; got 'QLoRA'"
    for draw in (
        lambda: plots.plot_networks(table),
        lambda: plots.plot_scores({"QLoRA": 0.5}),
        lambda: spread_over_ranks(table, ["QLoRA"]),
    ):
        with pytest.raises(ValueError, match=said):
            draw()
    answers = {"steps": [64], "test": ["LoRA − gain, rank 1"], "mean": [0.0]}
    answers |= {"low": [-1.0], "high": [1.0], "verdict": ["worst"]}
    with pytest.raises(ValueError, match=r"a verdict must be one of .*; got 'worst'"):
        plots.plot_declared(pd.DataFrame(answers))
    plt.close("all")


@pytest.mark.parametrize("device", ["cpu:5", 0, "tpu", ""])
def test_a_device_that_is_not_there_is_not_taken_for_another(device):
    with pytest.raises(ValueError, match="device must be one that torch has here"):
        Settings.of({**IDENTIFIED, "device": device})
