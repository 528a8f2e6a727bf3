"""Kernels whose outputs are kept get an environment that doesn't show in them."""

import os

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
