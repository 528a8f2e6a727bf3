"""The environment of a kernel whose outputs are stored or compared."""

import os


def kernel_environment(threads: int | None = None) -> dict[str, str]:
    """Return this process's environment variables, made fit for a kernel whose outputs
    are kept.

    Progress bars would store how fast this machine is. Under pytest two variables
    change what a kernel captures: ``PYTEST_CURRENT_TEST`` makes ipykernel drop what C
    code prints, and ``MPLBACKEND`` may switch the pictures off.

    Args:
        threads: how many threads numerical libraries may use; by default, what they
            take by themselves.
    """
    left_out = {"PYTEST_CURRENT_TEST", "MPLBACKEND"}
    variables = {
        name: value for name, value in os.environ.items() if name not in left_out
    }
    variables["TQDM_DISABLE"] = "1"
    if threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM"):
            variables[f"{library}_NUM_THREADS"] = str(threads)
    return variables
