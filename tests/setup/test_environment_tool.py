"""tools/environment.py: which environment it makes, completes, keeps or refuses, where
it installs, and what it says.
"""

import ast
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture
def steps(tool, tmp_path, monkeypatch):
    """``ensure`` in a folder of its own, with what takes long replaced: it returns the
    steps that it took.
    """
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements.lock").write_text("torch==2.15.0\n")
    taken, state = [], {"python": "3.11", "fails": None, "usable": True}

    def make_venv(reason):
        taken.append(reason)
        tool.empty_venv()
        (tool.VENV / "pyvenv.cfg").touch()
        state["python"] = "3.11"

    def install(extras, torch):
        taken.append(f"install {','.join(extras)} {torch}")
        if state["fails"]:
            raise state["fails"]

    for name, value in {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "STAMP": tmp_path / ".venv" / "installed.json",
        "LOCK": tmp_path / "requirements.lock",
        "make_venv": make_venv,
        "install": install,
        "is_usable": lambda: state["usable"],
        "python_version": lambda: state["python"],
    }.items():
        monkeypatch.setattr(tool, name, value)
    monkeypatch.setattr(sys, "platform", "linux")

    def ensure(*extras, torch=None):
        taken.clear()
        tool.ensure(list(extras), torch)
        return list(taken)

    ensure.state = state
    return ensure


NEW = ["there is none", "install lab default"]
CUT = ["its installation was cut off", "install lab default"]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock"])
def test_an_environment_is_made_once_and_completed_after_a_change(tool, steps, name):
    assert steps("lab") == NEW
    assert steps("lab") == []
    with (tool.ROOT / name).open("a") as file:
        file.write("# changed\n")
    assert steps("lab") == ["install lab default"]
    assert steps("lab") == []


def test_an_environment_for_the_tests_also_serves_the_lab(steps):
    assert steps("lab") == NEW
    assert steps("lab", "test") == ["install lab,test default"]
    assert steps("lab") == steps("lab", "test") == []


@pytest.mark.parametrize("before", [False, True])
def test_a_cut_installation_is_made_anew(steps, before):
    if before:
        steps("lab")
    steps.state["fails"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        steps("lab", "test")
    steps.state["fails"] = None
    assert steps("lab") == CUT
    assert steps("lab") == []


def test_what_uv_gives_up_leaves_a_whole_environment_as_it_was(tool, steps):
    steps("lab", torch="cpu")
    before = tool.read_stamp()
    steps.state["fails"] = tool.Stop("no network")
    with pytest.raises(tool.Stop, match="no network"):
        steps("lab", "test")
    assert tool.read_stamp() == before
    assert steps("lab") == []
    # On a full disk it may stop in the middle of a package.
    steps.state["usable"] = False
    with pytest.raises(tool.Stop):
        steps("lab", "test")
    steps.state["fails"] = None
    assert steps("lab") == CUT


def test_a_first_installation_that_uv_gives_up_is_made_anew(tool, steps):
    steps.state.update(fails=tool.Stop("no network"), usable=False)
    with pytest.raises(tool.Stop):
        steps("lab")
    steps.state["fails"] = None
    assert steps("lab") == CUT


def test_a_moved_environment_is_made_anew(tool, steps, monkeypatch, tmp_path):
    steps("lab")
    moved = tmp_path / "elsewhere"
    tool.VENV.rename(moved)
    monkeypatch.setattr(tool, "VENV", moved)
    monkeypatch.setattr(tool, "STAMP", moved / tool.STAMP.name)
    assert steps("lab")[0] == f"it was made in {tmp_path / '.venv'}"


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "its Python doesn't start"),
        ("3.10", "its Python was 3.11 and is 3.10 now"),
        ("3.12", "its Python was 3.11 and is 3.12 now"),
    ],
)
def test_an_environment_whose_python_changed_is_made_anew(steps, python, reason):
    steps("lab")
    steps.state["python"] = python
    assert steps("lab") == [reason, "install lab default"]


def test_the_build_of_torch_is_switched_only_when_asked(steps):
    assert steps("lab", torch="cpu") == ["there is none", "install lab cpu"]
    assert steps("lab") == steps("lab", torch="cpu") == []
    assert steps("lab", "test") == ["install lab,test cpu"]
    unknown = "it wasn't made for torch's default build"
    assert steps("lab", torch="default") == [unknown, "install lab,test default"]
    assert steps("lab") == []


def test_other_systems_have_the_cpu_build_already(steps, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert steps("lab", torch="cpu") == NEW
    assert "The default build is the CPU build here" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_an_environment_made_by_hand_is_completed(tool, steps, fails):
    tool.VENV.mkdir()
    (tool.VENV / "pyvenv.cfg").touch()
    if fails:
        steps.state["fails"] = tool.Stop("no network")
        with pytest.raises(tool.Stop):
            steps("lab")
        steps.state["fails"] = None
    assert steps("lab") == ["install lab default"]
    assert steps("lab") == []


def test_a_folder_that_is_no_environment_is_left_alone(tool, steps):
    tool.VENV.mkdir()
    (tool.VENV / "thesis.txt").touch()
    for act in (lambda: steps("lab"), tool.clean):
        with pytest.raises(tool.Stop, match="is no virtual environment: move it away"):
            act()
    assert (tool.VENV / "thesis.txt").exists()


@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_a_damaged_note_counts_as_a_cut(tool, steps, text):
    steps("lab")
    tool.STAMP.write_text(text)
    assert steps("lab") == CUT


def test_a_cut_clean_leaves_no_environment_that_seems_whole(tool, steps, monkeypatch):
    steps("lab")
    (tool.VENV / "lib").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tool.shutil, "rmtree", lambda _path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool.clean()
    assert steps("lab") == CUT
    kept, gone = tool.ROOT / "tests" / "a.py", tool.ROOT / "tests" / "__pycache__"
    gone.mkdir(parents=True)
    kept.touch()
    assert tool.clean() == 0
    assert kept.exists()
    assert not gone.exists()
    assert not tool.VENV.exists()


# From here on Python, pip and uv are the real ones: a project as small as possible is
# installed from wheels in two folders, and nothing is asked of a network.

BACKEND = """
import base64, hashlib, zipfile
from pathlib import Path

def build_editable(folder, *_):
    name = "lora_dora-1-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        wheel.writestr("lora_dora.pth", str(Path.cwd()))
        for file, text in {
            "METADATA": "Metadata-Version: 2.1\\nName: lora-dora\\nVersion: 1\\n"
            "Provides-Extra: lab\\nProvides-Extra: test\\nRequires-Dist: torch\\n",
            "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
            "RECORD": "",
        }.items():
            wheel.writestr("lora_dora-1.dist-info/" + file, text)
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "lora-dora"
version = "1"
dependencies = ["torch"]
optional-dependencies = { lab = [], test = [] }
"""
CHECKS = """
def check_versions(): pass
def check_torch(): import torch
if __name__ == "__main__":
    import os, sys, torch
    print("checked", torch.__file__, os.getcwd(), sys.argv[1:])
    sys.exit(7)
"""

# Installs what is missing, then runs those checks.
SET_UP = ["run", "-m", "lowrank_utils"]


def wheel(folder, name, version, code):
    """Write a wheel with one module, and return its line for a lock."""
    folder.mkdir(parents=True, exist_ok=True)
    place = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "",
        f"{name}/__main__.py": code,
        f"{place}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{place}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},{len(text)}\n"
        for file, text in files.items()
    )
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{place}/RECORD": record}.items():
            archive.writestr(file, text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


@pytest.fixture
def small(root, tmp_path):
    """A small project beside settings of pip and uv that lead elsewhere: it runs the
    tool, and returns its exit status and what it said.
    """
    project = tmp_path / "project"
    (project / "tools").mkdir(parents=True)
    (project / "lowrank_utils").mkdir()
    (project / "lowrank_utils" / "__init__.py").touch()
    (project / "lowrank_utils" / "__main__.py").write_text(CHECKS)
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(PROJECT)
    text = (root / "tools" / "environment.py").read_text(encoding="utf-8")
    text = text.replace("https://download.pytorch.org", "http://127.0.0.1:9")
    (project / "tools" / "environment.py").write_text(text, encoding="utf-8")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    code = f"import os, sys; os.execv({uv!r}, ['uv', *sys.argv[1:]])"
    lock = wheel(tmp_path / "one", "torch", "2.0", "")
    lock += wheel(tmp_path / "one", "torchvision", "2.0", "")
    lock += wheel(tmp_path / "two", "uv", "1.0", code)
    (project / "requirements.lock").write_text(lock)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "pip.conf").write_text(
        f"[global]\nno-index = yes\ntarget = {elsewhere}\nprefix = {elsewhere}\n"
        f"root = {elsewhere}\nno-deps = yes\n"
        f"[install]\nfind-links =\n    {tmp_path / 'one'}\n    {tmp_path / 'two'}\n"
    )
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv" / "uv.toml").write_text(
        f'no-cache = true\n[pip]\ntarget = "{elsewhere}"\nno-deps = true\n'
    )
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "MAKE"))
    }
    variables |= {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_USER": "1",
        "UV_SYSTEM_PYTHON": "1",
        "XDG_CONFIG_HOME": str(tmp_path),
        "PYTHONPATH": str(elsewhere),
    }

    def run(*words):
        command = [sys.executable, project / "tools" / "environment.py", *words]
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=120
        )
        assert not elsewhere.exists(), "something was installed elsewhere"
        return done.returncode, done.stdout + done.stderr

    run.project = project
    return run


def test_the_users_settings_lead_to_the_packages_and_not_elsewhere(small):
    status, said = small(*SET_UP, "--all", "a b")
    assert status == 7, said
    place = small.project / ".venv"
    assert f"checked {place}" in said
    assert f"{small.project} ['--all', 'a b']" in said
    # The second time nothing is installed, and another torch isn't taken unasked.
    assert small("check")[1].startswith("checked ")
    # A broken installation isn't called ready, nor is one whose files were exchanged.
    lock = small.project / "requirements.lock"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0")[:-1] + "\n")
    (place / "installed.json").write_text("{}")
    status, said = small(*SET_UP)
    assert status == 1
    assert "cut off" in said
    assert "pip could not bring uv" in said


def test_a_check_installs_nothing_and_says_in_a_line_what_to_do(small):
    place = small.project / ".venv"
    does = f"make lab (or python3 tools/environment.py lab) makes {place}\n"
    assert small("check") == (1, f"FIX Environment: there is none; {does}")
    assert not place.exists()
    place.mkdir()
    (place / "installed.json").write_text("{}")
    cut = "its installation was cut off"
    assert small("check") == (1, f"FIX Environment: {cut}; {does}")
    assert [path.name for path in place.iterdir()] == ["installed.json"]


def test_without_the_index_of_cpu_builds_the_default_build_serves(small):
    settings = small.project.parent / "pip.conf"
    empty = (small.project / "tools").as_uri()
    text = settings.read_text().replace("no-index = yes", f"index-url = {empty}")
    settings.write_text(text)
    status, said = small("--torch=cpu", *SET_UP)
    assert status == 7, said
    assert "torch's default build is taken, which is larger" in said
    # It isn't asked for again each time.
    assert small("--torch=cpu", *SET_UP)[1].startswith("checked ")


def test_what_can_not_be_imported_is_not_called_ready(small):
    (small.project / "lowrank_utils" / "__main__.py").write_text("import nothing")
    status, said = small(*SET_UP)
    assert status == 1
    assert "No module named 'nothing'" in said
    assert "can't be used; see the lines above" in said
    assert (small.project / ".venv" / "installed.json").read_text() == "{}"


def test_a_file_with_another_hash_is_refused(small):
    lock = small.project / "requirements.lock"
    first = lock.read_text().split("sha256:")[1][:64]
    lock.write_text(lock.read_text().replace(first, first[::-1]))
    status, said = small(*SET_UP)
    assert status == 1
    assert "Hash mismatch for `torch==2.0" in said
    assert "uv could not install it; its lines above say why" in said


# What runs, and what is said on the way.


def test_a_relative_data_folder_becomes_absolute(tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given, expected in {"data": str(tmp_path / "data"), "": ""}.items():
        monkeypatch.setenv("LOWRANK_DATA_DIR", given)
        variables = tool.environment_for(tool.PYTHON)
        assert variables["LOWRANK_DATA_DIR"] == expected


def test_what_leads_python_elsewhere_is_left_out(tool, monkeypatch):
    for name in ("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "/elsewhere")
    variables = tool.environment_for(tool.PYTHON)
    assert "/elsewhere" not in variables.values()
    assert variables["PATH"].split(os.pathsep)[0] == str(tool.PYTHON.parent)
    # Another Python's folders aren't ours to write to.
    other = tool.environment_for(Path("/elsewhere/bin/python"))
    assert "PYTHONDONTWRITEBYTECODE" in other


def run_tool(root, *words, python=sys.executable, make=False):
    variables = {n: v for n, v in os.environ.items() if n != "MAKELEVEL"}
    variables |= {"MAKELEVEL": "1"} if make else {}
    command = [python, str(root / "tools" / "environment.py"), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_an_unknown_build_or_command_is_refused_with_the_allowed_ones(root):
    for words, allowed in [
        (["--torch=gpu", "lab"], "'cpu', 'default'"),
        (["install"], "'lab', 'check', 'test', 'run', 'clean'"),
    ]:
        outcome = run_tool(root, *words)
        assert outcome.returncode == 2
        assert allowed in outcome.stderr.replace("cpu, default", "'cpu', 'default'")


def test_an_incomplete_project_is_named(small):
    (small.project / "requirements.lock").unlink()
    status, said = small(*SET_UP)
    assert status == 1
    assert "requirements.lock" in said
    assert not (small.project / ".venv").exists()


def older_python():
    """Find a Python on this machine that is too old for the project."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    names = [f"python3.{minor}" for minor in range(6, 11)]
    test = "import sys; print((3, 6) <= sys.version_info < (3, 11))"
    for python in [
        *filter(None, map(shutil.which, names)),
        *sorted(versions.glob("3.*/bin/python3")),
    ]:
        answer = subprocess.run([python, "-c", test], capture_output=True, text=True)
        if answer.stdout.strip() == "True":
            return str(python)
    return None


@pytest.mark.parametrize("make", [False, True])
def test_an_older_python_says_what_to_type(root, make):
    if (python := older_python()) is None:
        pytest.skip("this machine has no Python from 3.6 to 3.10")
    outcome = run_tool(root, "lab", python=python, make=make)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("Python 3.11 or newer is needed; this is 3.")
    typed = "make lab PYTHON=python3.1" if make else "tools/environment.py lab"
    assert typed in line.split(" type: ")[1]


@pytest.mark.parametrize("found", [True, False])
def test_the_message_for_an_older_python_names_one_that_serves(
    tool, monkeypatch, found
):
    name = "python3.12" if found else None
    monkeypatch.setattr(
        tool.shutil, "which", lambda asked: asked if asked == name else None
    )
    monkeypatch.setattr(sys, "argv", ["tools/environment.py", "--torch=cpu", "lab"])
    monkeypatch.delenv("MAKELEVEL", raising=False)
    typed = f"{name or 'python3.11'} tools/environment.py --torch=cpu lab"
    after = (
        "" if found else ", after installing it from https://www.python.org/downloads/"
    )
    assert tool.too_old().endswith(f"type: {typed}{after}")


def test_the_syntax_stays_readable_for_an_older_python(root):
    text = (root / "tools" / "environment.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 6))
