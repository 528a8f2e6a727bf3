"""Set the series up on a bare Python and run it.

``make`` calls this script, and without make you do::

    python tools/environment.py [OPTIONS] COMMAND [ARGUMENTS]

It makes a virtual environment in ``.venv``, installs the project there under
``constraints.txt`` and runs the command in it. A finished environment is used again at
once. One that was cut off, moved or lost its Python is made anew.

It runs before anything is installed, so it needs the standard library alone, and its
syntax stays at Python 3.6, so that an old Python can say that it is too old.
"""

# ruff: noqa: S603 (it runs Python and pip, by design, and never through a shell)

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# Written when all is installed: what from, and which parts.
STAMP = "installed.json"
# Written before anything changes, removed after the stamp is there.
UNFINISHED = "unfinished"

TORCH_BUILDS = ("cpu", "default")
# PyTorch's own index of builds without CUDA; pip's default torch for Linux brings CUDA
# along.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_SECONDS = 5

# It installs, in a fraction of pip's time, and looks for packages where pip is told to.
UV = "uv==0.13.9"
UV_NAMES = {
    "index-url": "UV_INDEX_URL",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "no-cache-dir": "UV_NO_CACHE",
}
# Whoever tells pip one of these wants it kept, and uv has no such setting or another
# one.
LEFT_TO_PIP = {"constraint", "no-binary", "no-index", "only-binary", "require-hashes"}

# What each command needs; ``test`` in pyproject.toml builds on ``lab``.
EXTRAS = {
    "lab": ("lab",),
    "check": ("lab",),
    "test": ("lab", "test"),
    "run": ("lab", "test"),
}

# All tests take turns on all cores, file by file, for the tests of a file share what
# they set up. The order stays, since the browser's tests must come last in their
# process. A selection (ARGUMENTS) runs as it is asked for.
IN_PARALLEL = [
    "--numprocesses=logical",
    "--maxprocesses=4",
    "--dist=loadfile",
    "--no-loadscope-reorder",
]


class Stop(Exception):
    """The work can't go on; the message says what to do."""


def newer_python():
    """Return the name of a Python on this machine that is new enough, or None."""
    test = f"import sys; sys.exit(sys.version_info < {MINIMUM})"
    for name in (
        "python3.13",
        "python3.12",
        "python3.11",
        "python3.14",
        "python3",
        "python",
    ):
        if shutil.which(name):
            outcome = subprocess.run(
                [name, "-c", test], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if outcome.returncode == 0:
                return name
    return None


def too_old_message(version, executable):
    """Return what to say on a Python that is too old, with what to type on this
    machine.
    """
    name = newer_python()
    needed = ".".join(map(str, MINIMUM))
    python = name or f"python{needed}"
    if "MAKELEVEL" in os.environ:
        target = next(
            (
                word
                for word in sys.argv[1:]
                if word in ("lab", "test", "check", "clean")
            ),
            "TARGET",
        )
        typed = f"make {target} PYTHON={python}"
    else:
        typed = " ".join([python, *sys.argv])
    first = "" if name else "install one from https://www.python.org/downloads/, then "
    return (
        f"Python {needed} or newer is needed; this is {version[0]}.{version[1]} at {executable}; "
        f"{first}type: {typed}"
    )


if sys.version_info < MINIMUM:
    sys.exit(too_old_message(sys.version_info, sys.executable))


def say(text: str) -> None:
    """Print a line at once, so that it stands before what a subprocess prints."""
    print(text, flush=True)


def shown(path: Path) -> str:
    """Return ``path`` as it is typed from the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# The environment: is it there, is it whole, is it the one that is wanted?


def venv_python() -> Path:
    """Return where the environment's Python is, or will be."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ask_python(code: str) -> str | None:
    """Return what ``code`` prints in the environment's Python, or None if it fails or
    there is none.
    """
    command = [str(venv_python()), "-I", "-c", code]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def venv_version() -> str | None:
    """Return the environment's Python version such as ``"3.11"``, or None if it doesn't
    start.
    """
    return ask_python("import pip, sys; print('%d.%d' % sys.version_info[:2])")


def digest() -> str:
    """Return the SHA-256 of the files that decide what is installed."""
    content = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        try:
            content.update((ROOT / name).read_bytes() + b"\0")
        except OSError as error:
            raise Stop(
                f"{ROOT / name} can't be read ({error.strerror}): get the whole project anew"
            ) from None
    return content.hexdigest()


def read_stamp() -> dict | None:
    """Return what was noted after the last complete installation; None if there was
    none.
    """
    try:
        stamp = json.loads((VENV / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def note(extras: set) -> dict:
    """Return what the stamp says about a complete installation."""
    return {
        "folder": str(VENV),
        "python": venv_version(),
        "digest": digest(),
        "extras": sorted(extras),
        "torch": "cpu"
        if (installed_version("torch") or "").endswith("+cpu")
        else "default",
    }


def write_stamp(stamp: dict | None) -> None:
    """Note that the environment is whole again, and as ``stamp`` says if that is
    known.
    """
    if stamp is not None:
        (VENV / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    (VENV / UNFINISHED).unlink()


def why_anew(stamp: dict | None, version: str | None, torch: str | None) -> str | None:
    """Return why the environment in ``.venv`` has to be made anew, or None if it can
    stay.

    Args:
        stamp: what ``read_stamp`` returned.
        version: what ``venv_version`` returned.
        torch: the build that is asked for; None takes whichever is there.
    """
    if (VENV / UNFINISHED).exists():
        return "its installation was cut off"
    if version is None:
        return "its Python doesn't start"
    if tuple(map(int, version.split("."))) < MINIMUM:
        return f"its Python is {version}"
    if stamp is None:
        # Made by hand: pip can complete it, but can't tell one build of torch from the
        # other.
        return "which build of torch it holds isn't known" if torch else None
    if stamp.get("folder") != str(VENV):
        return f"it was made in {stamp.get('folder')}"
    if stamp.get("python") != version:
        return f"its Python was {stamp.get('python')} and is {version} now"
    if torch and stamp.get("torch") != torch:
        return f"it holds torch's {stamp.get('torch')} build"
    return None


def is_ready(stamp: dict | None, extras: set) -> bool:
    """Tell whether an environment that can stay holds all that is wanted."""
    return (
        stamp is not None
        and stamp.get("digest") == digest()
        and extras <= set(stamp.get("extras", ()))
    )


@contextlib.contextmanager
def one_at_a_time():
    """Let one run of this script at a time change the environment."""
    try:
        import fcntl
    except ImportError:
        # Windows doesn't remove files that another run has open, so nothing gets lost
        # there.
        yield
        return
    with Path(__file__).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another run is setting {shown(VENV)} up; waiting for it …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have no locks
        yield


def ensure(extras: set, torch: str | None) -> Path:
    """Return the environment's Python, after making or completing the environment where
    needed.

    Args:
        extras: the lists of ``[project.optional-dependencies]`` to install.
        torch: one of ``TORCH_BUILDS``; None keeps what is there, and takes the default
            build at first.

    Raises:
        Stop: it can't be made.
    """
    with one_at_a_time():
        exists = venv_exists()
        stamp = read_stamp()
        torch = choose_torch(torch, stamp)
        reason = why_anew(stamp, venv_version(), torch) if exists else None
        completing = exists and reason is None
        if completing and is_ready(stamp, extras):
            return venv_python()
        if completing:
            say(f"[1/3] Completing the environment {shown(VENV)}")
            mark_unfinished()
        else:
            make_venv(reason)
        # What is there stays: an environment for the tests also serves JupyterLab.
        had = stamp or {}
        extras = extras | set(had.get("extras", ()))
        try:
            install(extras, torch or had.get("torch", "default"))
        except Stop:
            # Without a network, for one: pip gave up before it changed anything, so
            # what was whole still is.
            if completing and free_gigabytes() >= 1:
                write_stamp(stamp)
            raise
        write_stamp(note(extras))
    return venv_python()


def venv_exists() -> bool:
    """Tell whether there is an environment, whole or not; anything else in its place is
    left alone.
    """
    exists = VENV.is_dir() and any(VENV.iterdir())
    if exists and not ((VENV / "pyvenv.cfg").exists() or (VENV / UNFINISHED).exists()):
        raise Stop(
            f"{VENV} is no virtual environment: move it away, then run this again"
        )
    return exists


def mark_unfinished() -> None:
    """Note that the environment is changing, so that a cut is noticed afterwards."""
    try:
        VENV.mkdir(parents=True, exist_ok=True)
        (VENV / UNFINISHED).touch()
        (VENV / STAMP).unlink(missing_ok=True)
    except OSError as error:
        raise Stop(
            f"{VENV} can't be written ({error.strerror}): make the folder writable, "
            "or copy the project to a folder of yours"
        ) from None


def empty_venv() -> None:
    """Remove all of the environment but the mark that it is unfinished."""
    mark_unfinished()
    for path in VENV.iterdir():
        if path.name != UNFINISHED:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise Stop(
            f"{error.filename} can't be removed ({error.strerror}): end what uses it, "
            "such as an open JupyterLab, then run this again"
        ) from None


def make_venv(reason: str | None) -> None:
    """Make an empty virtual environment, in the place of an old one if there is a
    ``reason``.
    """
    running = platform.python_version()
    if sys.maxsize < 2**32 or platform.python_implementation() != "CPython":
        kind = f"{platform.python_implementation()} with {sys.maxsize.bit_length() + 1} bits"
        raise Stop(
            f"torch needs CPython with 64 bits; this is {kind} at {sys.executable}: "
            "install that from https://www.python.org/downloads/"
        )
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise Stop(
            f"torch has no build any more for an Intel Python on macOS, which {sys.executable} is: "
            "on Apple silicon install an arm64 Python from https://www.python.org/downloads/; "
            "on an Intel Mac the series can't run"
        )
    missing = [
        name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None
    ]
    if missing:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise Stop(
            f"this Python has no {' and no '.join(missing)}. On Debian and Ubuntu: "
            f"sudo apt install {package}. Elsewhere: install Python from https://www.python.org/downloads/"
        )
    say(
        f"[1/3] Making the environment {shown(VENV)} with Python {running}"
        + (f"; the old one goes, because {reason}" if reason else "")
    )
    empty_venv()
    # Run from inside an environment, perhaps the very one that goes, its base makes the
    # new one.
    base = getattr(sys, "_base_executable", None) or sys.executable
    if (
        subprocess.run(
            [base, "-m", "venv", str(VENV)], env=clean_environment()
        ).returncode
        != 0
    ):
        raise Stop(
            f"{base} -m venv could not make {VENV}; its lines above say why. "
            f"Is there space on the disk ({free_gigabytes():.1f} GB are free)? May you write there?"
        )


# What is installed.


def install(extras: set, torch: str) -> None:
    """Install the project with ``extras`` into the environment, under the
    constraints.
    """
    if installed_version("torch") is None:
        large = sys.platform == "linux" and torch == "default"
        download, disk = (3, 6.5) if large else (0.4, 2)
        if free_gigabytes() < disk:
            hint = "; TORCH=cpu (--torch=cpu) needs 2 GB" if large else ""
            raise Stop(
                f"{disk} GB are needed in {ROOT}, and {free_gigabytes():.1f} GB are free: make room, "
                f"then run this again{hint}"
            )
        hint = ". TORCH=cpu (--torch=cpu) needs 0.4 GB and 2 GB, and is all that the series needs"
        say(
            f"[2/3] Installing the versions in constraints.txt: about {download} GB to download and {disk} GB on "
            "the disk; from a minute or two on a fast connection to half an hour on a slow one"
            + (hint if large else "")
        )
    else:
        say("[2/3] Bringing the environment to the versions in constraints.txt")
    pins = (
        [f"{name}=={pinned(name)}" for name in ("torch", "torchvision")]
        if torch == "cpu"
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = pip_settings()
        uv = None if LEFT_TO_PIP & settings.keys() else bring_uv(folder)

        def bring(*arguments: str) -> None:
            if uv is None or not uv_install(uv, settings, *arguments):
                pip_install(*arguments)

        if pins:
            bring("--index-url", CPU_INDEX, "--no-deps", *pins)
        bring("-c", "constraints.txt", "-e", f".[{','.join(sorted(extras))}]")


def bring_uv(folder: str) -> str | None:
    """Return the path of uv, brought into ``folder``, or None if it can't be had.

    The environment itself holds what constraints.txt names, and no second installer.
    """
    alone = ["--retries=0", "--only-binary=:all:", "--no-deps", f"--target={folder}"]
    command = [str(venv_python()), "-m", "pip", "install", "--no-input", *alone, UV]
    # Where there is no network, pip says so when it comes to the packages themselves.
    outcome = subprocess.run(
        command,
        cwd=ROOT,
        env=pip_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return (
        shutil.which("uv", path=str(Path(folder, "bin")))
        if outcome.returncode == 0
        else None
    )


def uv_install(uv: str, settings: dict, *arguments: str) -> bool:
    """Run ``uv pip install`` for the environment, with its output shown; tell whether
    all is installed.

    Args:
        uv: the path of the program.
        settings: what ``pip_settings`` returned.
        arguments: what to install, and from where.
    """
    command = [uv, "pip", "install", "--python", str(venv_python()), *arguments]
    variables = {**clean_environment(), **uv_settings(settings)}
    if subprocess.run(command, cwd=ROOT, env=variables).returncode == 0:
        return True
    say("[2/3] uv gave up; its lines above say why. Now pip tries")
    return False


def pip_settings() -> dict:
    """Return what pip is told by its files and by environment variables, without the
    section's name.
    """
    command = [str(venv_python()), "-m", "pip", "config", "list"]
    answer = subprocess.run(
        command, cwd=ROOT, env=pip_environment(), capture_output=True, text=True
    )
    lines = re.findall(
        r"^(global|install|:env:)\.([\w-]+)=(.+)$",
        answer.stdout or "",
        flags=re.MULTILINE,
    )
    # What is said for installing goes over what is said for all commands, and a
    # variable over both.
    order = ("global", "install", ":env:")
    lines.sort(key=lambda line: order.index(line[0]))
    # pip writes each value as a string of Python's.
    return {name: ast.literal_eval(value) for _, name, value in lines}


def uv_settings(settings: dict) -> dict:
    """Return the environment variables that have uv look where pip's ``settings`` say,
    in the way pip does.
    """
    variables = {
        UV_NAMES[name]: " ".join(value.split())
        for name, value in settings.items()
        if name in UV_NAMES
    }
    # pip takes the newest file of all indexes; uv would take that of the first index
    # with the package.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **variables}


def pip_install(*arguments: str) -> None:
    """Run ``pip install`` in the environment, with its output shown."""
    command = [
        str(venv_python()),
        "-m",
        "pip",
        "install",
        "--no-input",
        "--no-compile",
        *arguments,
    ]
    status = subprocess.run(command, cwd=ROOT, env=pip_environment()).returncode
    if status == 0:
        return
    if free_gigabytes() < 1:
        advice = f"the disk is full ({free_gigabytes():.1f} GB are free): make room, then run this again"
    elif CPU_INDEX in arguments:
        advice = "run this again, or with TORCH=default (--torch=default) for pip's own build of torch"
    else:
        advice = "is there a network connection? Once there is, run this again: what came stays in the cache"
        if sys.version_info[:2] > (3, 13):
            advice += (
                ". If a version wasn't found: Python 3.11 to 3.13 are known to work"
            )
    raise Stop(
        f"pip ended with status {status}; its lines above say why. What to do: {advice}"
    )


def pip_environment() -> dict:
    """Return the environment variables for pip."""
    # Only a setting outside of the environment could ask for --user, and pip refuses it
    # inside.
    return {
        **clean_environment(),
        "PIP_USER": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def pinned(name: str) -> str:
    """Return the version that constraints.txt holds for the distribution ``name``."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(name)}==(\S+)", text, re.MULTILINE)
    if found is None:
        raise Stop(
            f"constraints.txt has no line {name}==…: get the file anew, or run the command freeze"
        )
    return found[1]


def installed_version(name: str) -> str | None:
    """Return the version of the distribution ``name`` in the environment, or None."""
    return ask_python(f"import importlib.metadata as m; print(m.version({name!r}))")


def free_gigabytes() -> float:
    """Return how much space is left on the project's disk."""
    return shutil.disk_usage(ROOT).free / 1e9


def choose_torch(torch: str | None, stamp: dict | None) -> str | None:
    """Return the build that is asked for, or None where the CPU build can't be had or
    isn't another one.
    """
    if torch != "cpu" or (stamp or {}).get("torch") == "cpu":
        return torch
    if sys.platform != "linux":
        say(
            "pip's own torch is the CPU build on this system, so TORCH=cpu changes nothing."
        )
        return None
    reason = unreachable(CPU_INDEX + "/torch/")
    if reason is None:
        return "cpu"
    say(
        f"PyTorch's index of CPU builds can't be reached ({reason}), so pip's own build of torch is used; "
        "it is larger and serves as well."
    )
    return None


def unreachable(address: str) -> str | None:
    """Return why ``address`` doesn't answer within ``CPU_INDEX_SECONDS``; None if it
    does.
    """
    outcome = [f"no answer in {CPU_INDEX_SECONDS} seconds"]

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")  # noqa: S310 (a constant https address)
        try:
            with urllib.request.urlopen(request, timeout=CPU_INDEX_SECONDS):  # noqa: S310  # nosec B310
                outcome[:] = []
        except (OSError, ValueError) as error:
            outcome[:] = [str(getattr(error, "reason", error))]

    # The time-out above leaves out the look-up of the name, so the whole is bounded by
    # a thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CPU_INDEX_SECONDS + 1)
    return outcome[0] if outcome else None


# What runs in it.


def clean_environment() -> dict:
    """Return this process's environment variables without those that lead Python
    elsewhere.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONHOME", "PYTHONPATH")
    }


def environment_for(python: Path) -> dict:
    """Return the environment variables for what runs under ``python``."""
    variables = clean_environment()
    # So that a notebook's terminal and its !commands find what is installed here.
    variables["PATH"] = os.pathsep.join(
        [str(python.parent), variables.get("PATH", os.defpath)]
    )
    if python == venv_python():
        variables["VIRTUAL_ENV"] = str(VENV)
        # The installation compiles nothing; each module is compiled when it is first
        # imported, and once.
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
    # A notebook's kernel runs in notebooks/, so a relative folder would be another one
    # there.
    folder = variables.get("LOWRANK_DATA_DIR")
    if folder:
        variables["LOWRANK_DATA_DIR"] = str(Path(folder).expanduser().absolute())
    return variables


def become(python: Path, arguments: list, variables: dict) -> int:
    """Run ``python`` with ``arguments`` in the project's folder, in the place of this
    process.
    """
    command = [str(python), *arguments]
    if os.name != "nt":
        os.chdir(ROOT)
        sys.stdout.flush()
        # Ctrl-C and signals go straight to the command, and its exit status is this
        # process's.
        os.execve(command[0], command, variables)  # noqa: S606
    with subprocess.Popen(command, cwd=ROOT, env=variables) as process:
        while True:
            # Ctrl-C reaches both processes; the command decides what it means.
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def first_notebook() -> Path:
    """Return notebook 01, relative to the project's folder."""
    found = sorted((ROOT / "notebooks").glob("01_*.ipynb"))
    if not found:
        raise Stop(
            f"{ROOT / 'notebooks'} has no notebook 01_*.ipynb: get the whole project anew"
        )
    return found[0].relative_to(ROOT)


def lab_arguments(notebook: Path, arguments: list, superuser: bool) -> list:
    """Return what Python runs to open JupyterLab at ``notebook``.

    An argument goes over every configuration file, and Jupyter refuses one that is
    given twice: so neither a file nor ``arguments``, the user's, can open the server to
    other machines.
    """
    address = "/lab/tree/" + urllib.parse.quote(notebook.as_posix())
    return [
        str(ROOT / "tools" / "lab_server.py"),
        f"--LabApp.default_url={address}",
        *arguments,
        *(["--ServerApp.allow_root=True"] if superuser else []),
        # Ctrl-C ends the server without a question.
        "--ServerApp.answer_yes=True",
        f"--ServerApp.root_dir={ROOT}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.allow_remote_access=False",
    ]


def lab(python: Path, arguments: list) -> int:
    """Check the set-up and open JupyterLab at notebook 01, on this machine only and
    with a token.
    """
    notebook = first_notebook()
    variables = environment_for(python)
    say("[3/3] Checking the set-up")
    if (
        subprocess.run(
            [str(python), "-m", "lowrank_utils"], cwd=ROOT, env=variables
        ).returncode
        != 0
    ):
        raise Stop(
            "JupyterLab was not opened: do what the lines with FIX say, then run this again"
        )
    superuser = hasattr(os, "geteuid") and os.geteuid() == 0
    if superuser:
        say(
            "You are root, which JupyterLab refuses by default; it is allowed here (allow_root)."
        )
    say(
        f"Opening JupyterLab at {shown(ROOT / notebook)}; Ctrl-C in this window ends it."
    )
    # In the environment only its owner can read it; a command line can be read by
    # everyone.
    variables["JUPYTER_TOKEN"] = secrets.token_hex(24)
    return become(python, lab_arguments(notebook, arguments, superuser), variables)


# What keeps the project.


def constraints_text(report: dict) -> str:
    """Return constraints.txt for pip's installation ``report``."""
    header = (
        "# The exact versions that the series and its tests run with, as pip resolves pyproject.toml\n"
        f"# with all its lists under Python {platform.python_version()}.\n"
        "# The stored outputs were made with them. Renew both together:\n"
        "#     python tools/environment.py freeze && make notebooks\n"
        "# What torch's build with CUDA brings along (nvidia-…, cuda-…, triton) is pinned for that build alone.\n"
    )
    pins = {}
    for entry in report["install"]:
        name = re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()
        if name not in ("lora-dora", "pip"):
            # A local label such as +cpu names a build, not a version.
            pins[name] = entry["metadata"]["version"].split("+")[0]
    return header + "".join(
        f"{name}=={version}\n" for name, version in sorted(pins.items())
    )


def freeze() -> int:
    """Resolve pyproject.toml in a fresh environment, without constraints, and write
    constraints.txt.
    """
    import tomllib

    if sys.version_info[:2] != MINIMUM:
        oldest = ".".join(map(str, MINIMUM))
        raise Stop(
            f"use Python {oldest}, the oldest that the project supports: newer versions may not have it"
        )
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = ",".join(
            sorted(tomllib.load(file)["project"]["optional-dependencies"])
        )
    say(f"Resolving the newest versions for the lists {extras}; nothing is installed …")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        subprocess.run(
            [sys.executable, "-m", "venv", str(Path(folder, "venv"))], check=True
        )
        python = Path(folder, "venv", venv_python().relative_to(VENV))
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--report",
            str(report),
        ]
        if subprocess.run(
            [*command, "-e", f".[{extras}]"], cwd=ROOT, env=clean_environment()
        ).returncode:
            raise Stop("pip could not resolve pyproject.toml; its lines above say why")
        text = constraints_text(json.loads(report.read_text(encoding="utf-8")))
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8", newline="\n")
    say(f"Wrote constraints.txt with {text.count('==')} versions.")
    return 0


def clean() -> int:
    """Remove the environment and what tools left behind; the project's own files
    stay.
    """
    with one_at_a_time():
        if venv_exists():
            say(f"Removing {shown(VENV)}")
            empty_venv()
            remove(VENV)
    caches = (
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
        "test-artifacts",
        "build",
        "lora_dora.egg-info",
    )
    found = [ROOT / name for name in caches] + list(ROOT.glob(".coverage*"))
    found += [
        path
        for name in ("__pycache__", ".ipynb_checkpoints")
        for path in ROOT.rglob(name)
    ]
    for path in found:
        if path.is_dir():
            say(f"Removing {shown(path)}")
            remove(path)
    return 0


def parse(arguments: list) -> argparse.Namespace:
    """Return the options, the command and what is passed on to it."""
    parser = argparse.ArgumentParser(
        prog="environment.py",
        description="Set the series up on a bare Python and run it.",
        epilog="commands: lab (open JupyterLab at notebook 01; ARGUMENTS go to JupyterLab), test (run all "
        "tests; ARGUMENTS go to pytest), check (check the set-up), run (run Python with ARGUMENTS), "
        "freeze (write constraints.txt from the newest versions), clean (remove the environment)",
    )
    parser.add_argument(
        "--torch",
        metavar="BUILD",
        help="which build of torch: 'cpu' (small) or 'default'",
    )
    parser.add_argument(
        "--extras",
        metavar="NAMES",
        default="",
        help="further lists of optional dependencies to install, separated by commas",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="use the running Python as it is, such as a conda environment",
    )
    parser.add_argument(
        "command", choices=[*EXTRAS, "freeze", "clean"], metavar="COMMAND"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS")
    return parser.parse_args(arguments)


def main(arguments: list) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A folder's name may hold letters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    try:
        if options.torch not in (None, *TORCH_BUILDS):
            allowed = " and ".join(TORCH_BUILDS)
            raise Stop(
                f"there is no build of torch {options.torch!r} (TORCH, --torch); there are {allowed}"
            )
        if options.command == "freeze":
            return freeze()
        if options.command == "clean":
            return clean()
        extras = {*EXTRAS[options.command], *filter(None, options.extras.split(","))}
        python = Path(sys.executable) if options.here else ensure(extras, options.torch)
        if options.command == "lab":
            return lab(python, options.arguments)
        module = {
            "test": ["-m", "pytest"],
            "check": ["-m", "lowrank_utils"],
            "run": [],
        }[options.command]
        if options.command == "test" and not options.arguments:
            module += IN_PARALLEL
        return become(python, [*module, *options.arguments], environment_for(python))
    except Stop as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"\n{error}: is the disk full, or the folder not writable?", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Run it again: what was downloaded stays in the cache.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
