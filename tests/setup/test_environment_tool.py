"""tools/environment.py: which environment it makes, completes, keeps or refuses, and
what it says."""

import ast
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest


@pytest.fixture
def project(tool, tmp_path, monkeypatch):
    """A project folder in which the tool works, with the steps that take long replaced
    and noted."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.15.0\ntorchvision==0.29.2\n")
    steps = []
    state = {"python": "3.11", "torch": None, "fails": None}

    def make_venv(reason):
        steps.append(f"anew: {reason}" if reason else "new")
        tool.mark_unfinished()
        (tool.VENV / "pyvenv.cfg").touch()
        state["python"] = "3.11"

    def install(extras, torch):
        steps.append(f"install {','.join(sorted(extras))} {torch}")
        if state["fails"]:
            raise state["fails"]
        state["torch"] = "2.15.0+cpu" if torch == "cpu" else "2.15.0"

    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(tool, "make_venv", make_venv)
    monkeypatch.setattr(tool, "install", install)
    monkeypatch.setattr(tool, "venv_version", lambda: state["python"])
    monkeypatch.setattr(tool, "installed_version", lambda _name: state["torch"])
    monkeypatch.setattr(tool, "unreachable", lambda _address: None)
    monkeypatch.setattr(sys, "platform", "linux")

    def ensure(*extras, torch=None):
        """Run the tool's ``ensure`` and return the steps that it took."""
        steps.clear()
        tool.ensure(set(extras), torch)
        return list(steps)

    ensure.state, ensure.steps = state, steps
    return ensure


LAB = ["new", "install lab default"]


def test_an_environment_is_made_once_and_then_used_at_once(tool, project):
    assert project("lab") == LAB
    stamp = tool.read_stamp()
    assert stamp["extras"] == ["lab"]
    assert stamp["python"] == "3.11"
    assert stamp["torch"] == "default"
    assert not (tool.VENV / tool.UNFINISHED).exists()
    assert project("lab") == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_file_completes_the_environment(tool, project, name):
    project("lab")
    with (tool.ROOT / name).open("a") as file:
        file.write("# changed\n")
    assert project("lab") == ["install lab default"]
    assert project("lab") == []


def test_an_environment_for_the_tests_also_serves_the_lab(project):
    assert project("lab") == LAB
    assert project("lab", "test") == ["install lab,test default"]
    assert project("lab") == []
    assert project("lab", "test") == []


def test_a_cut_installation_leaves_no_stamp_and_is_made_anew(tool, project):
    project.state["fails"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        project("lab")
    assert tool.read_stamp() is None
    project.state["fails"] = None
    assert project("lab") == [
        "anew: its installation was cut off",
        "install lab default",
    ]
    assert project("lab") == []


def test_a_cut_completion_is_made_anew_too(tool, project):
    project("lab")
    project.state["fails"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        project("lab", "test")
    assert tool.read_stamp() is None
    project.state["fails"] = None
    assert project("lab")[0] == "anew: its installation was cut off"


def test_a_completion_that_pip_gives_up_leaves_the_environment_as_it_was(
    tool, project, monkeypatch
):
    project("lab", torch="cpu")
    before = tool.read_stamp()
    project.state["fails"] = tool.Stop("no network")
    with pytest.raises(tool.Stop, match="no network"):
        project("lab", "test")
    assert tool.read_stamp() == before
    assert project("lab") == []
    # On a full disk pip may have stopped in the middle of a package.
    monkeypatch.setattr(tool, "free_gigabytes", lambda: 0.1)
    with pytest.raises(tool.Stop):
        project("lab", "test")
    project.state["fails"] = None
    assert project("lab")[0] == "anew: its installation was cut off"


def test_a_first_installation_that_pip_gives_up_is_made_anew(tool, project):
    project.state["fails"] = tool.Stop("no network")
    with pytest.raises(tool.Stop):
        project("lab")
    project.state["fails"] = None
    assert project("lab") == [
        "anew: its installation was cut off",
        "install lab default",
    ]


def test_a_moved_environment_is_made_anew(tool, project, monkeypatch, tmp_path):
    project("lab")
    moved = tmp_path / "elsewhere"
    tool.VENV.rename(moved)
    monkeypatch.setattr(tool, "VENV", moved)
    assert project("lab") == [
        f"anew: it was made in {tmp_path / '.venv'}",
        "install lab default",
    ]


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "its Python doesn't start"),
        ("3.10", "its Python is 3.10"),
        ("3.12", "its Python was 3.11 and is 3.12 now"),
    ],
)
def test_an_environment_whose_python_changed_is_made_anew(project, python, reason):
    project("lab")
    project.state["python"] = python
    assert project("lab") == [f"anew: {reason}", "install lab default"]


def test_the_build_of_torch_is_switched_only_when_asked(project):
    assert project("lab", torch="cpu") == ["new", "install lab cpu"]
    assert project("lab") == []
    assert project("lab", torch="cpu") == []
    assert project("lab", "test") == ["install lab,test cpu"]
    switched = ["anew: it holds torch's cpu build", "install lab,test default"]
    assert project("lab", torch="default") == switched
    assert project("lab") == []
    assert project("lab", torch="cpu") == [
        "anew: it holds torch's default build",
        "install lab,test cpu",
    ]


def test_without_the_index_of_cpu_builds_the_default_build_serves(
    tool, project, monkeypatch, capsys
):
    monkeypatch.setattr(tool, "unreachable", lambda address: f"no route to {address}")
    assert project("lab", torch="cpu") == LAB
    said = capsys.readouterr().out
    assert f"no route to {tool.CPU_INDEX}/torch/" in said
    assert "pip's own build of torch is used" in said
    assert project("lab", torch="cpu") == []


def test_the_index_of_cpu_builds_is_not_touched_without_the_option(
    tool, project, monkeypatch
):
    monkeypatch.setattr(tool, "unreachable", lambda _address: pytest.fail("asked"))
    assert project("lab") == LAB
    assert project("lab", torch="default") == []


def test_other_systems_have_the_cpu_build_already(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert project("lab", torch="cpu") == LAB
    assert "TORCH=cpu changes nothing" in capsys.readouterr().out


def test_an_environment_made_by_hand_is_completed(tool, project):
    tool.VENV.mkdir()
    (tool.VENV / "pyvenv.cfg").touch()
    assert project("lab") == ["install lab default"]
    assert project("lab") == []


def test_a_folder_that_is_no_environment_is_left_alone(tool, project):
    tool.VENV.mkdir()
    (tool.VENV / "thesis.txt").touch()
    with pytest.raises(tool.Stop, match="is no virtual environment: move it away"):
        project("lab")
    assert (tool.VENV / "thesis.txt").exists()


def test_a_damaged_stamp_counts_as_none(tool, project):
    project("lab")
    (tool.VENV / tool.STAMP).write_text("[]")
    assert tool.read_stamp() is None
    (tool.VENV / tool.STAMP).write_text("{")
    assert tool.read_stamp() is None
    assert project("lab") == ["install lab default"]


# What is run, and what is said when it fails.


@pytest.fixture
def pip_calls(tool, tmp_path, monkeypatch):
    """The project in a folder of its own, and the commands that are run there, with one
    exit status for all."""
    (tmp_path / "constraints.txt").write_text("torch==2.15.0\ntorchvision==0.29.2\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(tool, "installed_version", lambda _name: None)
    monkeypatch.setattr(tool, "free_gigabytes", lambda: 100.0)

    class Calls(list):
        status = 0

    calls = Calls()

    def run(command, **_options):
        calls.append(command)
        return subprocess.CompletedProcess(command, calls.status)

    monkeypatch.setattr(tool.subprocess, "run", run)
    return calls


@pytest.fixture
def uv_calls(tool, pip_calls, monkeypatch):
    """The commands that are run where pip brings uv, which ends with an exit status of
    its own: (arguments, variables)."""

    class Calls(list):
        status, settings = 0, ""

    calls = Calls()

    def run(command, **options):
        command = list(map(str, command))
        if command[1:5] == ["-m", "pip", "config", "list"]:
            return subprocess.CompletedProcess(command, 0, stdout=calls.settings)
        calls.append((command, options["env"]))
        if target := [
            argument for argument in command if argument.startswith("--target=")
        ]:
            program = Path(
                target[0].removeprefix("--target="),
                "bin",
                "uv.exe" if os.name == "nt" else "uv",
            )
            program.parent.mkdir()
            program.touch(mode=0o755)
        is_uv = Path(command[0]).stem == "uv"
        return subprocess.CompletedProcess(
            command, calls.status if is_uv else pip_calls.status
        )

    monkeypatch.setattr(tool.subprocess, "run", run)
    return calls


def test_the_default_installation_is_one_line_of_uv(
    tool, uv_calls, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "platform", "linux")
    tool.install({"lab", "test"}, "default")
    (bringing, _), (command, variables) = uv_calls
    assert bringing[0] == str(tool.venv_python())
    assert bringing[-1] == tool.UV
    wanted = (
        f"pip install --python {tool.venv_python()} -c constraints.txt -e .[lab,test]"
    )
    assert " ".join(command[1:]) == wanted
    assert variables["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert not Path(command[0]).exists(), "uv stays no longer than it works"
    said = capsys.readouterr().out
    assert "3 GB to download" in said
    assert "TORCH=cpu" in said


def test_the_cpu_build_comes_from_its_index_without_dependencies(tool, uv_calls):
    tool.install({"lab"}, "cpu")
    _, first, second = (" ".join(command[5:]) for command, _ in uv_calls)
    assert (
        first
        == f"--index-url {tool.CPU_INDEX} --no-deps torch==2.15.0 torchvision==0.29.2"
    )
    assert second == "-c constraints.txt -e .[lab]"


def test_uv_looks_where_pip_is_told_to(tool, uv_calls):
    uv_calls.settings = (
        ":env:.index-url='https://variable.example/simple'\n"
        "global.cert='/etc/certificates.crt'\n"
        "global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'\n"
        "global.index-url='https://file.example/simple'\n"
        "install.find-links='/wheels'\n"
        "install.no-cache-dir='true'\n"
        "list.format='columns'\n"
    )
    tool.install({"lab"}, "default")
    _, variables = uv_calls[-1]
    assert {name: variables[name] for name in tool.UV_NAMES.values()} == {
        "UV_INDEX_URL": "https://variable.example/simple",
        "UV_EXTRA_INDEX_URL": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/etc/certificates.crt",
        "UV_NO_CACHE": "true",
    }


def pip_line(extras):
    return f"-m pip install --no-input --no-compile -c constraints.txt -e .[{extras}]"


@pytest.mark.parametrize("name", ["constraint", "no-index", "require-hashes"])
def test_what_uv_would_not_keep_is_left_to_pip(tool, uv_calls, name):
    uv_calls.settings = f"global.{name}='true'\n"
    tool.install({"lab"}, "default")
    ((command, _),) = uv_calls
    assert " ".join(command[1:]) == pip_line("lab")


def test_pip_installs_where_uv_gives_up(tool, uv_calls, capsys):
    uv_calls.status = 2
    tool.install({"lab"}, "default")
    command, _ = uv_calls[-1]
    assert " ".join(command[1:]) == pip_line("lab")
    assert "uv gave up" in capsys.readouterr().out


def test_pip_installs_where_uv_can_not_be_had(tool, pip_calls):
    tool.install({"lab"}, "default")
    *_, bringing, command = pip_calls
    assert bringing[-1] == tool.UV
    assert " ".join(command[1:]) == pip_line("lab")


def test_the_settings_of_the_real_pip_are_read(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "venv_python", lambda: Path(sys.executable))
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://file.example/simple\n"
        "extra-index-url =\n    https://one.example/simple\n    https://two.example/simple\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    settings = tool.pip_settings()
    assert settings["index-url"] == "https://file.example/simple"
    assert tool.uv_settings(settings)["UV_EXTRA_INDEX_URL"] == (
        "https://one.example/simple https://two.example/simple"
    )
    assert settings["find-links"] == "/wheels"


@pytest.mark.parametrize(
    ("torch", "free", "advice"),
    [
        ("default", 100.0, "network connection"),
        ("default", 0.2, "the disk is full"),
        ("cpu", 100.0, "TORCH=default"),
    ],
)
def test_what_to_do_when_pip_fails(tool, pip_calls, monkeypatch, torch, free, advice):
    pip_calls.status = 2
    monkeypatch.setattr(tool, "installed_version", lambda _name: "2.15.0")
    monkeypatch.setattr(tool, "free_gigabytes", lambda: free)
    with pytest.raises(tool.Stop, match=f"status 2; .* What to do: .*{advice}"):
        tool.install({"lab"}, torch)


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    tool, pip_calls, monkeypatch
):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tool, "free_gigabytes", lambda: 3.0)
    with pytest.raises(
        tool.Stop, match=r"6\.5 GB are needed .*3\.0 GB are free: make room.*TORCH=cpu"
    ):
        tool.install({"lab"}, "default")
    assert not pip_calls
    tool.install({"lab"}, "cpu")


def test_a_missing_pin_of_torch_is_named(tool, pip_calls):
    (tool.ROOT / "constraints.txt").write_text("")
    with pytest.raises(tool.Stop, match="no line torch=="):
        tool.install({"lab"}, "cpu")
    assert not pip_calls


def test_a_python_without_venv_is_told_what_to_install(tool, pip_calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    package = "python{}.{}-venv".format(*sys.version_info)
    with pytest.raises(tool.Stop, match=f"no ensurepip.*apt install {package}"):
        tool.make_venv(None)
    assert not pip_calls


def test_a_python_that_torch_has_no_build_for_is_refused(tool, pip_calls, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "maxsize", 2**31 - 1)
        with pytest.raises(
            tool.Stop, match="needs CPython with 64 bits; this is CPython with 32 bits"
        ):
            tool.make_venv(None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(tool.platform, "machine", lambda: "x86_64")
        with pytest.raises(tool.Stop, match=r"Intel Python on macOS.*arm64"):
            tool.make_venv(None)
    assert not pip_calls
    assert not tool.VENV.exists()


def test_making_an_environment_empties_the_old_one_and_keeps_the_mark_to_the_end(
    tool, pip_calls
):
    (tool.VENV / "lib" / "old").mkdir(parents=True)
    (tool.VENV / "pyvenv.cfg").touch()
    tool.make_venv("it is old")
    assert [path.name for path in tool.VENV.iterdir()] == [tool.UNFINISHED]
    ((_python, *command),) = pip_calls
    assert command == ["-m", "venv", str(tool.VENV)]


def test_a_failed_venv_is_reported(tool, pip_calls):
    pip_calls.status = 1
    with pytest.raises(tool.Stop, match=r"could not make .*its lines above say why"):
        tool.make_venv(None)


@pytest.mark.usefixtures("pip_calls")
def test_a_folder_without_write_access_is_named(tool, monkeypatch):
    file = tool.ROOT / "file"
    file.touch()
    monkeypatch.setattr(tool, "VENV", file / ".venv")
    with pytest.raises(
        tool.Stop,
        match=r"can't be written \(Not a directory\): make the folder writable",
    ):
        tool.make_venv(None)


def test_a_real_environment_is_recognised(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "VENV", tmp_path / ".venv")
    assert tool.venv_version() is None
    assert tool.installed_version("pip") is None
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tool.VENV)], check=True
    )
    assert tool.venv_python().exists()
    assert tool.venv_version() is None, "without pip it can't be completed"
    site = next(tool.VENV.glob("[lL]ib/**/site-packages"))
    (site / "pip.py").touch()
    assert tool.venv_version() == "{}.{}".format(*sys.version_info)


def test_an_address_that_answers_and_one_that_does_not(tool, monkeypatch):
    monkeypatch.setattr(tool, "CPU_INDEX_SECONDS", 1)
    with http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
    ) as server:
        monkeypatch.setattr(server.RequestHandlerClass, "log_message", lambda *_: None)
        address = f"http://127.0.0.1:{server.server_port}/"
        # The socket takes connections already, but nobody answers yet.
        assert tool.unreachable(address) is not None
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert tool.unreachable(address) is None
        assert tool.unreachable(address + "nothing/") == "File not found"
        server.shutdown()
        thread.join()
    assert "refused" in tool.unreachable(address)


# The environment variables of what is started.


def test_a_relative_data_folder_becomes_absolute(tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_DATA_DIR", "data")
    assert tool.environment_for(Path(sys.executable))["LOWRANK_DATA_DIR"] == str(
        tmp_path / "data"
    )
    monkeypatch.setenv("LOWRANK_DATA_DIR", "")
    assert tool.environment_for(Path(sys.executable))["LOWRANK_DATA_DIR"] == ""


def test_what_leads_python_elsewhere_is_left_out(tool, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    variables = tool.environment_for(tool.venv_python())
    assert not {"PYTHONHOME", "PYTHONPATH"} & set(variables)
    assert variables["PATH"].split(os.pathsep)[0] == str(tool.venv_python().parent)
    assert variables["VIRTUAL_ENV"] == str(tool.VENV)


def test_what_is_imported_is_compiled_once(tool, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in tool.environment_for(tool.venv_python())
    # Another Python's folders aren't ours to write to.
    assert "PYTHONDONTWRITEBYTECODE" in tool.environment_for(
        Path("/elsewhere/bin/python")
    )


# The command line.


def run_tool(root, *arguments, python=sys.executable, **options):
    command = [python, str(root / "tools" / "environment.py"), *arguments]
    # Under make the tool names the target to type.
    variables = {
        name: value for name, value in os.environ.items() if name != "MAKELEVEL"
    }
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=60, **options
    )


def test_a_command_runs_in_the_projects_folder_and_passes_its_status_on(root, tmp_path):
    code = "import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)"
    outcome = run_tool(
        root, "--here", "run", "-c", code, "--torch", "a b", cwd=tmp_path
    )
    assert outcome.returncode == 7
    assert outcome.stdout.strip() == f"{root} ['--torch', 'a b']"


def test_an_unknown_build_of_torch_is_refused_with_the_allowed_ones(root):
    outcome = run_tool(root, "--torch=gpu", "lab")
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.split("\n", 1)[1].splitlines()
    assert (
        line
        == "there is no build of torch 'gpu' (TORCH, --torch); there are cpu and default"
    )


def test_an_unknown_command_is_refused(root):
    outcome = run_tool(root, "install")
    assert outcome.returncode == 2
    assert "'lab'" in outcome.stderr


def older_pythons():
    """Find Pythons on this machine that are too old for the project."""
    names = ("python3.6", "python3.7", "python3.8", "python3.9", "python3.10")
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [
        *filter(None, map(shutil.which, names)),
        *map(str, sorted(versions.glob("3.*/bin/python3"))),
    ]
    test = "import sys; print((3, 6) <= sys.version_info < (3, 11))"
    for python in found:
        answer = subprocess.run([python, "-c", test], capture_output=True, text=True)
        if answer.stdout.strip() == "True":
            yield python


def test_an_older_python_says_what_to_do(root):
    pythons = list(older_pythons())
    if not pythons:
        pytest.skip("this machine has no Python from 3.6 to 3.10")
    for python in {pythons[0], pythons[-1]}:
        outcome = run_tool(root, "lab", python=python)
        assert outcome.returncode == 1
        assert outcome.stdout == ""
        (line,) = outcome.stderr.splitlines()
        assert line.startswith("Python 3.11 or newer is needed; this is 3.")
        assert f" at {python}; " in line
        assert line.endswith(" lab")


def test_the_syntax_stays_readable_for_an_older_python(root):
    ast.parse(
        (root / "tools" / "environment.py").read_text(encoding="utf-8"),
        feature_version=(3, 6),
    )


@pytest.mark.parametrize("found", ["python3.12", None])
@pytest.mark.parametrize("make", [True, False])
def test_the_message_for_an_older_python_names_what_to_type(
    tool, monkeypatch, found, make
):
    monkeypatch.setattr(tool, "newer_python", lambda: found)
    monkeypatch.setattr(sys, "argv", ["tools/environment.py", "--torch=cpu", "lab"])
    if make:
        monkeypatch.setenv("MAKELEVEL", "1")
    else:
        monkeypatch.delenv("MAKELEVEL", raising=False)
    message = tool.too_old_message((3, 8, 1), "/usr/bin/python3")
    python = found or "python3.11"
    typed = (
        f"make lab PYTHON={python}"
        if make
        else f"{python} tools/environment.py --torch=cpu lab"
    )
    first = "" if found else "install one from https://www.python.org/downloads/, then "
    start = "Python 3.11 or newer is needed; this is 3.8 at /usr/bin/python3; "
    assert message == f"{start}{first}type: {typed}"


# What keeps the project.


def test_constraints_are_written_from_pips_report(tool):
    report = {
        "install": [
            {"metadata": {"name": name, "version": version}}
            for name, version in [
                ("torch", "2.15.0+cpu"),
                ("nvidia-cublas", "13.4"),
                ("cuda-bindings", "13.5.0"),
                ("triton", "3.9.0"),
                ("lora-dora", "0.1.0"),
                ("ipython", "9.18.1"),
                ("ipython_pygments_lexers", "1.1.1"),
                ("Jinja2", "3.1.6"),
            ]
        ]
    }
    text = tool.constraints_text(report)
    assert text == tool.constraints_text(json.loads(json.dumps(report)))
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert body == [
        "cuda-bindings==13.5.0",
        "ipython==9.18.1",
        "ipython-pygments-lexers==1.1.1",
        "jinja2==3.1.6",
        "nvidia-cublas==13.4",
        "torch==2.15.0",
        "triton==3.9.0",
    ]


@pytest.mark.usefixtures("pip_calls")
def test_a_cut_clean_leaves_no_environment_that_seems_whole(tool, monkeypatch):
    (tool.VENV / "lib").mkdir(parents=True)
    (tool.VENV / "pyvenv.cfg").touch()
    (tool.VENV / tool.STAMP).write_text("{}")

    def cut(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        tool.clean()
    assert tool.read_stamp() is None
    assert tool.why_anew(None, "3.11", None) == "its installation was cut off"


@pytest.mark.usefixtures("pip_calls")
def test_clean_leaves_a_folder_alone_that_is_no_environment(tool):
    tool.VENV.mkdir()
    (tool.VENV / "thesis.txt").touch()
    with pytest.raises(tool.Stop, match="is no virtual environment"):
        tool.clean()
    assert (tool.VENV / "thesis.txt").exists()


@pytest.mark.usefixtures("pip_calls")
def test_an_incomplete_project_is_named(tool):
    with pytest.raises(
        tool.Stop, match=r"pyproject\.toml can't be read .*get the whole project anew"
    ):
        tool.digest()


def test_clean_removes_what_tools_left_and_nothing_else(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "VENV", tmp_path / ".venv")
    kept = [tmp_path / "notebooks" / "01.ipynb", tmp_path / "tests" / "test.py"]
    gone = [
        tmp_path / ".venv" / "pyvenv.cfg",
        tmp_path / ".venv" / "lib" / "__pycache__" / "a.pyc",
        tmp_path / "tests" / "__pycache__" / "test.pyc",
        tmp_path / "notebooks" / ".ipynb_checkpoints" / "01.ipynb",
        tmp_path / ".pytest_cache" / "x",
    ]
    for file in [*kept, *gone]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert tool.clean() == 0
    assert all(file.exists() for file in kept)
    assert not any(file.parent.exists() for file in gone)
    assert tool.clean() == 0
