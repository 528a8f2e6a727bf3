"""JupyterLab as ``make lab`` opens it: on this machine only, behind a token, at
notebook 1, whatever stands in the user's configuration.
"""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jupyter_core.paths
import lab_server
import psutil
import pytest
from lab_process import started_lab

# What would open the server to others, show other files, or end it.
HOSTILE = """
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.allow_remote_access = True
c.IdentityProvider.token = ""
c.PasswordIdentityProvider.password_required = False
c.ServerApp.root_dir = "/"
c.ServerApp.preferred_dir = "/elsewhere"
c.ServerApp.certfile = "/nowhere"
c.KernelSpecManager.allowed_kernelspecs = {"none"}
c.LabApp.default_url = "/tree"
"""


def test_the_first_notebook_is_opened_and_the_users_words_come_last(root, monkeypatch):
    monkeypatch.setattr(lab_server.os, "geteuid", lambda: 1000, raising=False)
    arguments = lab_server.lab_arguments(["--no-browser"])
    assert arguments[-1] == "--no-browser"
    assert f"--ServerApp.root_dir={root}" in arguments
    first = min(root.glob("notebooks/01_*.ipynb")).name
    assert f"--LabApp.default_url=/lab/tree/notebooks/{first}" in arguments
    assert not [word for word in arguments if "token" in word or "root=" in word]
    monkeypatch.setattr(lab_server.os, "geteuid", lambda: 0, raising=False)
    assert "--ServerApp.allow_root=True" in lab_server.lab_arguments([])


def test_configuration_comes_from_the_environment_alone(monkeypatch, tmp_path):
    system = ["/etc/jupyter"]
    monkeypatch.setattr(jupyter_core.paths, "SYSTEM_CONFIG_PATH", system)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path / "more"))
    monkeypatch.delenv("JUPYTERLAB_SETTINGS_DIR", raising=False)
    monkeypatch.delenv("JUPYTERLAB_WORKSPACES_DIR", raising=False)
    lab_server.leave_settings_aside()
    assert all(
        path.startswith(sys.prefix) for path in jupyter_core.paths.jupyter_config_path()
    )
    # How JupyterLab looks stays the user's.
    chosen = str(tmp_path / "lab" / "user-settings")
    assert lab_server.os.environ["JUPYTERLAB_SETTINGS_DIR"] == chosen


def test_nothing_is_opened_when_the_check_finds_something(monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(lab_server.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="was not opened: do what the lines with FIX"):
        lab_server.main()


@pytest.fixture
def start_lab(root, tmp_path):
    """Start JupyterLab with a configuration file; whatever happens, it is ended."""
    with contextlib.ExitStack() as stack:
        yield lambda configuration: stack.enter_context(
            started_lab(root, tmp_path, configuration)
        )


def status_and_content(url, **headers):
    """Return what a request to the server gives."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("configuration", ["", HOSTILE], ids=["none", "hostile"])
def test_the_server_is_closed_to_others_and_open_with_the_token(
    start_lab, root, configuration
):
    lab = start_lab(configuration)
    server = lab.wait_for(lab.information)
    base, token = f"http://127.0.0.1:{server['port']}", server["token"]
    assert len(token) == 48
    lab.wait_for(lambda: "?token=" in lab.said())
    first = min(root.glob("notebooks/01_*.ipynb")).name
    address = f"{base}/lab/tree/notebooks/{first}?token={token}"
    assert address in lab.said(), "the address to open is shown"

    running = psutil.Process(lab.process.pid)
    # A command line can be read by everyone on the machine.
    assert token not in " ".join(running.cmdline())

    def listening():
        connections = running.net_connections("inet")
        return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}

    # The server says its address first and binds it when its event loop runs.
    assert lab.wait_for(listening) <= {"127.0.0.1", "::1"}

    contents, right = f"{base}/api/contents", f"token {token}"
    assert status_and_content(contents)[0] == 403
    assert status_and_content(contents, Authorization="token wrong")[0] == 403
    # A page in the user's own browser whose host name leads here.
    other = {"Authorization": right, "Host": "other.example"}
    assert status_and_content(contents, **other)[0] == 403

    status, content = status_and_content(contents, Authorization=right)
    assert status == 200
    names = {entry["name"] for entry in json.loads(content)["content"]}
    assert {"notebooks", "figures"} <= names
    assert server["root_dir"] == str(root)
    kernels = status_and_content(f"{base}/api/kernelspecs", Authorization=right)[1]
    assert "python3" in json.loads(kernels)["kernelspecs"]
    status, content = status_and_content(address)
    assert status == 200
    asked_for = rb'<script id="jupyter-config-data"[^>]*>(.*?)</script>'
    (page,) = re.findall(asked_for, content, re.DOTALL)
    assert lab_server.ANNOUNCEMENTS in json.loads(page)["disabledExtensions"]
    assert lab.elsewhere() == []

    lab.process.terminate()
    assert lab.process.wait(timeout=20) == 0
    assert not psutil.pid_exists(running.pid) or not running.is_running()


def test_the_tests_see_when_a_kernel_asks_another_machine(start_lab):
    lab = start_lab("")
    startup = lab.folder / "IPYTHON" / "profile_default" / "startup" / "guard.py"
    code = (
        f"{startup.read_text()}\nimport socket\nsocket.gethostbyname('kernel.example')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "nothing reach kernel.example" in run.stderr
    assert lab.elsewhere()[-1] == "kernel.example"


def test_the_server_ends_when_the_tests_are_killed(root, tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import lab_process\n"
        "with lab_process.started_lab(*map(Path, sys.argv[2:])) as lab:\n"
        "    print(lab.wait_for(lab.information)['pid'], flush=True); sys.stdin.read()"
    )
    tests = [sys.executable, "-c", code, str(root / "tests"), str(root), str(tmp_path)]
    with subprocess.Popen(
        tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        server = psutil.Process(int(process.stdout.readline()))
        assert "lab_server.main()" in " ".join(server.cmdline())
        process.kill()

    def has_ended():
        return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

    deadline = time.monotonic() + 60
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended()
