"""JupyterLab as the tool opens it: on this machine only, behind a token, at notebook 01."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest


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
    assert not [argument for argument in arguments if "token" in argument.lower() or "allow_root" in argument]
    assert "--ServerApp.allow_root=True" in tool.lab_arguments(notebook, [], superuser=True)


def test_a_notebooks_name_is_quoted_in_the_address(tool):
    arguments = tool.lab_arguments(Path("notebooks", "01_a b%é.ipynb"), [], superuser=False)
    assert "--LabApp.default_url=/lab/tree/notebooks/01_a%20b%25%C3%A9.ipynb" in arguments


def test_the_token_goes_through_the_environment_and_is_another_each_time(tool, monkeypatch):
    started = []
    monkeypatch.setattr(tool.subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(tool, "become", lambda *arguments: started.append(arguments) or 0)
    for _ in range(2):
        assert tool.lab(Path(sys.executable), []) == 0
    tokens = [variables["JUPYTER_TOKEN"] for _python, _arguments, variables in started]
    assert len(set(tokens)) == 2
    for token, (_python, arguments, _variables) in zip(tokens, started, strict=True):
        assert len(token) == 48
        assert token not in " ".join(arguments)


def test_nothing_is_opened_when_the_check_finds_something(tool, monkeypatch):
    monkeypatch.setattr(tool.subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 1))
    monkeypatch.setattr(tool, "become", lambda *_: pytest.fail("opened"))
    with pytest.raises(tool.Stop, match="was not opened: do what the lines with MEND say"):
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


@pytest.fixture
def start_lab(root, tmp_path, monkeypatch):
    """Start JupyterLab through the tool, with a configuration file; whatever happens, it is ended."""
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        (tmp_path / kind).mkdir()
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / kind))
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    with contextlib.ExitStack() as stack:

        def start(configuration):
            for name in ("jupyter_server_config.py", "jupyter_config.py", "jupyter_lab_config.py"):
                (tmp_path / "CONFIG" / name).write_text(configuration)
            # The check of the set-up has tests of its own and takes seconds.
            code = (
                "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import environment\n"
                "environment.subprocess.run = lambda command, **_: environment.subprocess.CompletedProcess(command, 0)\n"
                "sys.exit(environment.main(['--here', 'lab', '--no-browser']))"
            )
            output = stack.enter_context((tmp_path / "output").open("wb"))
            command = [sys.executable, "-c", code, str(root / "tools")]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
            stack.callback(process.kill)
            return process

        yield start


def wait_for(condition, process, seconds=30):
    """Return what ``condition`` returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        assert process.poll() is None, "JupyterLab ended"
        time.sleep(0.05)
    return pytest.fail("no answer in time")


def status_and_content(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("configuration", ["", HOSTILE], ids=["no configuration", "hostile configuration"])
def test_the_server_is_closed_to_others_and_open_with_the_token(
    start_lab, root, tmp_path, tool, configuration
):
    process = start_lab(configuration)

    def information():
        for file in (tmp_path / "RUNTIME").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):
                return json.loads(file.read_text())
        return None

    server = wait_for(information, process)
    base = f"http://127.0.0.1:{server['port']}"
    token = server["token"]
    assert len(token) == 48

    wait_for(lambda: b"?token=" in (tmp_path / "output").read_bytes(), process)
    said = (tmp_path / "output").read_text()
    address = f"{base}/lab/tree/{tool.first_notebook().as_posix()}?token={token}"
    assert address in said, "the address to open is shown"

    running = psutil.Process(process.pid)
    assert token not in " ".join(running.cmdline())

    def listening():
        return {c.laddr.ip for c in running.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    # The server says its address first and binds it when its event loop runs.
    assert wait_for(listening, process) == {"127.0.0.1"}

    contents = f"{base}/api/contents"
    assert status_and_content(contents)[0] == 403
    assert status_and_content(contents, Authorization="token wrong")[0] == 403
    # A page in the user's own browser whose host name leads here.
    assert status_and_content(contents, Authorization=f"token {token}", Host="other.example")[0] == 403

    status, content = status_and_content(contents, Authorization=f"token {token}")
    assert status == 200
    assert {"notebooks", "figures"} <= {entry["name"] for entry in json.loads(content)["content"]}
    assert server["root_dir"] == str(root)
    assert status_and_content(address)[0] == 200

    process.terminate()
    assert process.wait(timeout=20) == 0
    assert not psutil.pid_exists(running.pid) or not running.is_running()


def test_a_configuration_that_lets_everybody_in_is_refused(start_lab, tmp_path):
    process = start_lab(OPEN_DOOR)
    assert process.wait(timeout=30) != 0
    said = (tmp_path / "output").read_text()
    assert "opens the server to others, so it was not started" in said
    assert "running at" not in said
