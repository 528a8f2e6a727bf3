"""JupyterLab as a process of the tests: with folders of its own, closed to the network,
and ended with them.

The functions at the end run in the server and in its kernels.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


class LabProcess:
    """A JupyterLab server that was started.

    Args:
        process: its process.
        folder: what it was started with: its configuration, data, kernels' start-up and
            output.
    """

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process = process
        self.folder = folder

    def said(self) -> str:
        """Return what it printed so far."""
        return (self.folder / "output").read_text(encoding="utf-8")

    def elsewhere(self) -> list[str]:
        """Return the hosts that the server and its kernels tried to reach beyond this
        machine."""
        file = self.folder / "elsewhere"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def information(self) -> dict | None:
        """Return what the server wrote about itself, such as port and token; None if it
        hasn't yet."""
        for file in (self.folder / "RUNTIME").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):
                return json.loads(file.read_text(encoding="utf-8"))
        return None

    def wait_for(self, condition, seconds: float = 60):
        """Return what ``condition`` returns as soon as that is true; fail when the
        server ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if result := condition():
                return result
            assert self.process.poll() is None, f"JupyterLab ended: {self.said()}"
            time.sleep(0.05)
        return pytest.fail(f"no answer in {seconds} seconds: {self.said()}")


# What starts JupyterLab: tests/, the project's folder, the file of attempts, and whether
# the set-up is checked before, which has tests of its own and takes seconds.
START = """
import sys, types

tests, root, record, check = sys.argv[1:]
sys.path[:0] = [tests, root + "/tools"]
import lab_process, lab_server

lab_process.stay_on_this_machine(record)
lab_process.end_with_the_tests()
if check == "False":
    passed = types.SimpleNamespace(returncode=0)
    lab_server.subprocess = types.SimpleNamespace(run=lambda *_, **__: passed)
sys.argv[1:] = ["--no-browser"]
lab_server.main()
"""


@contextlib.contextmanager
def started_lab(root: Path, folder: Path, configuration: str = "", check: bool = False):
    """Start JupyterLab on a project, give its ``LabProcess``, and end it in any case.

    The server notices by itself when the tests are killed: its standard input closes
    then.

    Args:
        root: the project's folder.
        folder: an empty folder for the configuration, data and output of the server.
        configuration: what stands in the user's configuration files.
        check: whether the set-up is checked before.
    """
    tests, record = Path(__file__).parent, folder / "elsewhere"
    guard = (
        f"import sys; sys.path.insert(0, {str(tests)!r}); import lab_process\n"
        f"lab_process.stay_on_this_machine({str(record)!r})\ndel lab_process\n"
    )
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        (folder / kind).mkdir()
    for name in ("jupyter_server_config.py", "jupyter_lab_config.py"):
        (folder / "CONFIG" / name).write_text(configuration, encoding="utf-8")
    startup = folder / "IPYTHON" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "guard.py").write_text(guard, encoding="utf-8")
    variables = {
        name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN"
    }
    variables |= {
        f"JUPYTER_{kind}_DIR": str(folder / kind)
        for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    variables["IPYTHONDIR"] = str(folder / "IPYTHON")
    command = [sys.executable, "-c", START, tests, root, record, str(check)]
    with (
        (folder / "output").open("wb") as output,
        subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=variables,
        ) as process,
    ):
        try:
            yield LabProcess(process, folder)
        finally:
            # Asked to end, the server ends its kernels too.
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@functools.cache
def end_with_the_tests() -> None:
    """End this process when its standard input closes."""

    def wait() -> None:
        os.read(sys.__stdin__.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def stay_on_this_machine(record: str) -> None:
    """Refuse this process every other host, and write down which one it tried to reach.

    Args:
        record: the file that gets a line for each attempt.
    """
    here = {
        None,
        "",
        "localhost",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "::",
        socket.gethostname(),
    }

    def refuse(event: str, arguments: tuple) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(
            arguments[1], tuple
        ):
            host = arguments[1][0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in here:
            with Path(record).open("a", encoding="utf-8") as file:
                file.write(f"{host}\n")
            raise OSError(f"the tests let nothing reach {host}")

    sys.addaudithook(refuse)
