"""The environment of a kernel whose outputs are stored or compared."""

import functools
import importlib.util
import os
import tempfile
from pathlib import Path


@functools.cache
def _empty_folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that is there as long as this process."""
    return tempfile.TemporaryDirectory()


@functools.cache
def _plain_matplotlibrc() -> str:
    """Return the settings that matplotlib comes with."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin, "..", "mpl-data", "matplotlibrc").resolve())


def kernel_environment(threads: int | None = None) -> dict[str, str]:
    """Return this process's environment variables, made fit for a kernel whose outputs
    are kept.

    Progress bars would store how fast this machine is, and the user's settings of
    IPython and matplotlib whose machine it is. Under pytest two variables change what
    a kernel captures: ``PYTEST_CURRENT_TEST`` makes ipykernel drop what C code prints,
    and ``MPLBACKEND`` may switch the pictures off.

    Args:
        threads: how many threads numerical libraries may use; by default, what they
            take by themselves.
    """
    left_out = {"PYTEST_CURRENT_TEST", "MPLBACKEND"}
    variables = {
        name: value for name, value in os.environ.items() if name not in left_out
    }
    variables["TQDM_DISABLE"] = "1"
    variables["IPYTHONDIR"] = _empty_folder().name
    variables["MATPLOTLIBRC"] = _plain_matplotlibrc()
    if threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM"):
            variables[f"{library}_NUM_THREADS"] = str(threads)
    return variables
