"""JupyterLab as the tool opens it: on this machine only, behind a token, at notebook
01."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from lab_process import started_lab


def test_what_keeps_the_server_closed_stands_on_the_command_line(tool, root):
    notebook = tool.first_notebook()
    assert notebook.name.startswith("01_")
    arguments = tool.lab_arguments(notebook, ["--no-browser"], superuser=False)
    assert arguments[0] == str(root / "tools" / "lab_server.py")
    assert arguments.count("--no-browser") == 1
    assert {
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.allow_remote_access=False",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/notebooks/{notebook.name}",
    } <= set(arguments)
    assert not [
        argument
        for argument in arguments
        if "token" in argument.lower() or "allow_root" in argument
    ]
    assert "--ServerApp.allow_root=True" in tool.lab_arguments(
        notebook, [], superuser=True
    )


def test_a_notebooks_name_is_quoted_in_the_address(tool):
    arguments = tool.lab_arguments(
        Path("notebooks", "01_a b%é.ipynb"), [], superuser=False
    )
    assert (
        "--LabApp.default_url=/lab/tree/notebooks/01_a%20b%25%C3%A9.ipynb" in arguments
    )


def test_the_token_goes_through_the_environment_and_is_another_each_time(
    tool, monkeypatch
):
    started = []
    monkeypatch.setattr(
        tool.subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 0)
    )
    monkeypatch.setattr(
        tool, "become", lambda *arguments: started.append(arguments) or 0
    )
    for _ in range(2):
        assert tool.lab(Path(sys.executable), []) == 0
    tokens = [variables["JUPYTER_TOKEN"] for _python, _arguments, variables in started]
    assert len(set(tokens)) == 2
    for token, (_python, arguments, _variables) in zip(tokens, started, strict=True):
        assert len(token) == 48
        assert token not in " ".join(arguments)


def test_nothing_is_opened_when_the_check_finds_something(tool, monkeypatch):
    monkeypatch.setattr(
        tool.subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 1)
    )
    monkeypatch.setattr(tool, "become", lambda *_: pytest.fail("opened"))
    with pytest.raises(
        tool.Stop, match="was not opened: do what the lines with FIX say"
    ):
        tool.lab(Path(sys.executable), [])


def test_a_project_without_notebook_01_is_incomplete(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(tool.Stop, match="has no notebook 01_"):
        tool.first_notebook()


HOSTILE = """
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.allow_remote_access = True
c.ServerApp.token = ""
c.ServerApp.password = ""
c.IdentityProvider.token = ""
c.PasswordIdentityProvider.token = ""
c.PasswordIdentityProvider.password_required = False
c.ServerApp.root_dir = "/"
c.LabApp.default_url = "/tree"
"""

# An identity provider that lets everybody in can only be refused.
OPEN_DOOR = """
from jupyter_server.auth.identity import PasswordIdentityProvider

class OpenDoor(PasswordIdentityProvider):
    auth_enabled = False

c.ServerApp.identity_provider_class = OpenDoor
"""


# The check of the set-up has tests of its own and takes seconds.
WITHOUT_CHECK = """
import sys

sys.path.insert(0, sys.argv[1])
import environment

environment.subprocess.run = lambda command, **_: environment.subprocess.CompletedProcess(command, 0)
sys.exit(environment.main(["--here", "lab", "--no-browser"]))
"""


@pytest.fixture
def command(root):
    """What starts JupyterLab through the tool."""
    return [sys.executable, "-c", WITHOUT_CHECK, str(root / "tools")]


@pytest.fixture
def start_lab(command, tmp_path):
    """Start JupyterLab with a configuration file; whatever happens, it is ended."""
    with contextlib.ExitStack() as stack:
        yield lambda configuration: stack.enter_context(
            started_lab(command, tmp_path, configuration)
        )


def status_and_content(url, **headers):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=10
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize(
    "configuration", ["", HOSTILE], ids=["no configuration", "hostile configuration"]
)
def test_the_server_is_closed_to_others_and_open_with_the_token(
    start_lab, root, tool, configuration
):
    lab = start_lab(configuration)
    server = lab.wait_for(lab.information)
    base = f"http://127.0.0.1:{server['port']}"
    token = server["token"]
    assert len(token) == 48

    lab.wait_for(lambda: "?token=" in lab.said())
    address = f"{base}/lab/tree/{tool.first_notebook().as_posix()}?token={token}"
    assert address in lab.said(), "the address to open is shown"

    running = psutil.Process(lab.process.pid)
    assert token not in " ".join(running.cmdline())

    def listening():
        return {
            c.laddr.ip
            for c in running.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }

    # The server says its address first and binds it when its event loop runs.
    assert lab.wait_for(listening) == {"127.0.0.1"}

    contents = f"{base}/api/contents"
    assert status_and_content(contents)[0] == 403
    assert status_and_content(contents, Authorization="token wrong")[0] == 403
    # A page in the user's own browser whose host name leads here.
    assert (
        status_and_content(
            contents, Authorization=f"token {token}", Host="other.example"
        )[0]
        == 403
    )

    status, content = status_and_content(contents, Authorization=f"token {token}")
    assert status == 200
    assert {"notebooks", "figures"} <= {
        entry["name"] for entry in json.loads(content)["content"]
    }
    assert server["root_dir"] == str(root)
    status, content = status_and_content(address)
    assert status == 200
    (asked_for,) = re.findall(
        rb'<script id="jupyter-config-data"[^>]*>(.*?)</script>', content, re.DOTALL
    )
    assert (
        "@jupyterlab/apputils-extension:announcements"
        in json.loads(asked_for)["disabledExtensions"]
    )
    assert lab.elsewhere() == []

    lab.process.terminate()
    assert lab.process.wait(timeout=20) == 0
    assert not psutil.pid_exists(running.pid) or not running.is_running()


def test_a_configuration_that_lets_everybody_in_is_refused(start_lab):
    lab = start_lab(OPEN_DOOR)
    assert lab.process.wait(timeout=60) != 0
    assert "opens the server to others, so it was not started" in lab.said()
    assert "running at" not in lab.said()


def test_the_tests_see_when_the_server_or_a_kernel_asks_another_machine(start_lab):
    lab = start_lab(
        "import socket\ntry: socket.create_connection(('other.example', 80))\nexcept OSError: pass"
    )
    lab.wait_for(lab.information)
    assert set(lab.elsewhere()) == {"other.example"}
    startup = lab.folder / "IPYTHON" / "profile_default" / "startup" / "guard.py"
    code = (
        f"{startup.read_text()}\nimport socket\nsocket.gethostbyname('kernel.example')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "nothing reach kernel.example" in run.stderr
    assert lab.elsewhere()[-1] == "kernel.example"


def test_the_server_ends_when_the_tests_are_killed(root, command, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import lab_process\n"
        "with lab_process.started_lab(sys.argv[3:], Path(sys.argv[2])) as lab:\n"
        "    print(lab.wait_for(lab.information)['pid'], flush=True); sys.stdin.read()"
    )
    tests = [sys.executable, "-c", code, str(root / "tests"), str(tmp_path), *command]
    with subprocess.Popen(
        tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        server = psutil.Process(int(process.stdout.readline()))
        assert "lab_server.py" in " ".join(server.cmdline())
        process.kill()

    def has_ended():
        return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

    deadline = time.monotonic() + 60
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended()
