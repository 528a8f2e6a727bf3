"""A grid of runs of one notebook, in parallel on this machine or on others."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from lowrank_utils.comparison.grid import SweepError, code_version
from lowrank_utils.comparison.kernels import kernel_environment
from lowrank_utils.comparison.store import Outcome, Store

# A worker starts the processes that compute, and needn't wait for torch itself.
if TYPE_CHECKING:
    from lowrank_utils.comparison.settings import Settings

# What jupyter_client says of a kernel that was of no use from the start.
NEVER_STARTED = (
    "Kernel didn't respond in",
    "Kernel died before replying to kernel_info",
)


def execute(
    notebook: str, settings: Mapping[str, Any], version: str, threads: int
) -> Outcome:
    """Run the notebook with the settings in a process of its own, and return what it
    left.

    It runs in a folder of its own and needs no file of the caller's, so that a worker
    may be another machine.

    Args:
        notebook: its text.
        settings: its parameters, without ``result_path``.
        version: what ``code_version`` gave where the sweep was started.
        threads: how many threads numerical libraries may use.
    """
    if (here := code_version(notebook)) != version:
        return Outcome(
            notebook,
            None,
            f"this worker has version {here} of the code instead of {version}: install the same",
        )
    with tempfile.TemporaryDirectory(prefix="lowrank-") as name:
        folder = Path(name)
        files = {
            part: folder / part
            for part in ("in.ipynb", "parameters.yaml", "out.ipynb", "result.json")
        }
        files["in.ipynb"].write_text(notebook, encoding="utf-8")
        files["parameters.yaml"].write_text(
            yaml.safe_dump({**settings, "result_path": str(files["result.json"])}),
            encoding="utf-8",
        )
        command = [
            sys.executable,
            "-m",
            "papermill",
            "in.ipynb",
            "out.ipynb",
            "-f",
            "parameters.yaml",
        ]
        # Kernels that start at the same moment may pick the same port, and then one of
        # them never answers, or dies.
        for _ in range(3):
            # No shell, and the caller's own notebook.
            run = subprocess.run(  # noqa: S603
                [*command, "-k", "python3", "--no-progress-bar"],
                cwd=folder,
                env=kernel_environment(threads),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            if not any(said in run.stderr for said in NEVER_STARTED):
                break
        left = {
            part: f.read_text(encoding="utf-8") if f.is_file() else None
            for part, f in files.items()
        }
        failed = run.returncode != 0 or left["result.json"] is None
        error = (run.stderr.strip() or "the notebook wrote no result") if failed else ""
        return Outcome(
            left["out.ipynb"] or notebook,
            None if failed else left["result.json"],
            error,
        )


def _end_with_the_sweep(sweep: int) -> None:
    """Let this worker, and all that it started, end when the sweep was killed; by
    itself it would wait forever.
    """
    parent = psutil.Process(sweep)

    def watch() -> None:
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Executor]:
    """Yield an executor with ``count`` processes on this machine, by joblib's loky."""
    from joblib.externals.loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(
        max_workers=count, initializer=_end_with_the_sweep, initargs=(os.getpid(),)
    )
    try:
        yield executor
    except BaseException:
        # What ended the sweep is what its user must hear of, and not what the workers'
        # end may bring up besides.
        with contextlib.suppress(Exception):
            executor.shutdown(wait=True, kill_workers=True)
        raise
    executor.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def dask_workers(address: str) -> Iterator[tuple[Executor, int]]:
    """Yield an executor on the workers of a dask scheduler, and how many runs they take
    at a time.

    Raises:
        SweepError: dask isn't installed, nobody answers, or there are no workers.
    """
    try:
        from distributed import Client
    except ImportError:
        raise SweepError(
            "dask isn't installed; in the project's folder type: pip install -e \".[dask]\""
        ) from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise SweepError(
            f"no scheduler answers at {address} ({error}); start one with: dask scheduler"
        ) from None
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise SweepError(
                f"the scheduler at {address} has no workers; start some with: dask worker {address}"
            )
        # Not pure: the same call may give another notebook, with other times in its
        # metadata.
        with client.get_executor(pure=False) as executor:
            yield executor, threads


def run_all(
    executor: Executor,
    store: Store,
    runs: Mapping[str, "Settings"],
    notebook: str,
    threads: int,
    report: Callable[[str, Outcome], None],
) -> None:
    """Execute the runs, and keep each as soon as it is there.

    Args:
        executor: where they run.
        store: where they are kept; the caller has locked it.
        runs: name → settings.
        notebook: its text.
        threads: for each run.
        report: called with a run's name and its outcome after it was kept.
    """
    version = code_version(notebook)
    waiting: dict[Future[Outcome], str] = {
        executor.submit(execute, notebook, settings.as_dict(), version, threads): run
        for run, settings in runs.items()
    }
    left = set(waiting)
    try:
        while left:
            # For a second at a time: a Ctrl-C that comes just before a wait begins is
            # noticed when it ends.
            done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
            # First what can be kept, then a worker's end, which is raised.
            for future in sorted(done, key=lambda each: each.exception() is not None):
                run = waiting[future]
                outcome = future.result()
                store.keep(run, runs[run], outcome)
                report(run, outcome)
    finally:
        for future in waiting:
            future.cancel()
