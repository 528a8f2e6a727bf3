"""Kernels whose outputs are kept get an environment that doesn't show in them."""

import os

import nbformat
from nbclient import NotebookClient

from lowrank_utils.comparison.kernels import kernel_environment


def test_what_would_show_is_left_out(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "PYTEST_CURRENT_TEST" in os.environ
    variables = kernel_environment()
    assert not {"PYTEST_CURRENT_TEST", "MPLBACKEND"} & variables.keys()
    assert variables["TQDM_DISABLE"] == "1"
    assert variables["OMP_NUM_THREADS"] == "7"
    assert variables["PATH"] == os.environ["PATH"]


def test_threads_reach_every_library():
    variables = kernel_environment(threads=3)
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM"):
        assert variables[f"{name}_NUM_THREADS"] == "3"


def test_a_kernel_sees_no_settings_of_the_users(monkeypatch, tmp_path):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("mine = 1")
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 99")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    code = "import matplotlib; print('mine' in dir(), matplotlib.rcParams['lines.linewidth'])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    for env, expected in [
        (kernel_environment(), "False 1.5"),
        (dict(os.environ), "True 99.0"),
    ]:
        NotebookClient(notebook, kernel_name="python3").execute(env=env)
        assert notebook.cells[0].outputs[0].text.strip() == expected
