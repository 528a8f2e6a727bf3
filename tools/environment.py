"""Set the series up on a bare Python and run it.

``make`` calls this script, and without make you do::

    python tools/environment.py [OPTIONS] COMMAND [ARGUMENTS]

It makes a virtual environment in ``.venv``, has uv install the project there in the
versions of requirements.lock, and runs the command in it. What is whole is used again
at once; what was cut off, moved or lost its Python is made anew. ``check`` makes
nothing, and only says what is lacking.

It runs before anything is installed, so it needs the standard library alone, and its
syntax stays at Python 3.6, so that an old Python can say that it is too old.
"""

# ruff: noqa: S603 (it runs Python and uv, by design, and never through a shell)

import argparse
import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# What the environment was made from; while it changes, nothing.
STAMP = VENV / "installed.json"
LOCK = ROOT / "requirements.lock"
# PyTorch's builds without CUDA, which the default build for Linux brings along.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# For each command the lists of pyproject.toml that it needs, and what Python runs.
COMMANDS = {
    "lab": (["lab"], ["tools/lab_server.py"]),
    # Says what is lacking, and installs nothing.
    "check": ([], ["-m", "lowrank_utils"]),
    "test": (["lab", "test"], ["-m", "pytest"]),
    "run": (["lab", "test"], []),
}
# All tests take turns on all cores, file by file, for the tests of a file share what
# they set up. The order stays, since the browser's tests must come last in their
# process. A selection (ARGUMENTS) runs as it is asked for.
PARALLEL = ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile"]
PARALLEL += ["--no-loadscope-reorder"]

# Of the user's settings for pip and uv those are kept that say where packages are and
# how one gets there. These others would lead them elsewhere, or other ones here.
ELSEWHERE = "target|prefix|python|python-version|python-platform|system|no-deps|dry-run"
ELSEWHERE += "|require-hashes|no-verify-hashes|exclude-newer|resolution|torch-backend"
KEPT = "DEFAULT_INDEX|INDEX|EXTRA_INDEX|FIND_LINKS|INSECURE_HOST|HTTP|CACHE|NO_CACHE"
KEPT += "|KEYRING|SYSTEM_CERTS|NATIVE_TLS|OFFLINE|LINK_MODE"
# pip's name for a setting, and the variable that tells uv.
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "trusted-host": "UV_INSECURE_HOST",
}
# And those that stand in uv's file under pip's name, each with how it is written there.
IN_FILE = {
    "extra-index-url": str.split,
    "find-links": str.split,
    "index-url": str,
    "no-index": lambda value: value.lower() in ("1", "on", "true", "yes"),
}


ADVICE = (
    "Is there a network connection, and space on the disk? Then run it again: what came "
    "stays. If a version wasn't found: Python 3.11 to 3.13 are known to work."
)
DESCRIPTION = (
    "Set the series up on a bare Python and run it: lab opens JupyterLab at notebook 1, "
    "test runs all tests or those of pytest's ARGUMENTS, check says what an environment "
    "that is there lacks, run runs Python with ARGUMENTS, clean removes the environment."
)


class Stop(Exception):
    """The work can't go on; the message says what to do."""


def too_old():
    """Return what to say on a Python that is too old, with what to type instead."""
    found = list(filter(shutil.which, ["python3.13", "python3.12", "python3.11"]))
    python = (found or ["python3.11"])[0]
    typed = " ".join([python, *sys.argv])
    if "MAKELEVEL" in os.environ:
        target = [word for word in sys.argv[1:] if word in COMMANDS] or ["TARGET"]
        typed = f"make {target[0]} PYTHON={python}"
    if not found:
        typed += ", after installing it from https://www.python.org/downloads/"
    version = "{}.{}".format(*sys.version_info)
    needed = f"Python 3.11 or newer is needed; this is {version} at {sys.executable}"
    return f"{needed}; type: {typed}"


if sys.version_info < MINIMUM:
    sys.exit(too_old())


def say(text: str) -> None:
    """Print a line at once, so that it stands before what a subprocess prints."""
    print(text, flush=True)


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    """Run a command in the project's folder."""
    return subprocess.run([*map(str, command)], cwd=ROOT, text=True, **options)


# The environment: is it there, is it whole, is it the one that is wanted?


@contextlib.contextmanager
def one_at_a_time():
    """Let one run of this script at a time change the environment."""
    with Path(__file__).open("rb") as file:
        # Windows has no fcntl, and removes no file that another run has open; some
        # network file systems have no locks.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def venv_exists() -> bool:
    """Tell whether there is an environment, whole or not; anything else stays."""
    exists = VENV.is_dir() and any(VENV.iterdir())
    if exists and not (STAMP.exists() or (VENV / "pyvenv.cfg").exists()):
        raise Stop(f"{VENV} is no virtual environment: move it away, then run it again")
    return exists


def empty_venv() -> None:
    """Remove all of the environment but the note that it was cut off."""
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("{}")
    for path in VENV.iterdir():
        if path != STAMP:
            remove(path)


def read_stamp() -> dict:
    """Return what is noted about the environment; empty if it was cut off.

    Of one that was made by hand nothing is known but where it is.
    """
    if not STAMP.exists() and (VENV / "pyvenv.cfg").exists():
        return {"folder": str(VENV), "python": python_version(), "extras": []}
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def python_version() -> str | None:
    """Return the version of the environment's Python, or None if it doesn't start."""
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return run(PYTHON, "-Ic", code, capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def why_anew(stamp: dict, torch: str | None) -> str | None:
    """Return why an environment has to be made anew, or None if it can stay."""
    version = python_version()
    if not stamp:
        return "its installation was cut off"
    if version is None:
        return "its Python doesn't start"
    if stamp["python"] != version or tuple(map(int, version.split("."))) < MINIMUM:
        return f"its Python was {stamp['python']} and is {version} now"
    if stamp["folder"] != str(VENV):
        return f"it was made in {stamp['folder']}"
    if torch and stamp.get("torch") != torch:
        return f"it wasn't made for torch's {torch} build"
    return None


def lacking() -> str | None:
    """Return what to do before the environment can be checked, in the form of the
    check's own lines, or None if it can be.
    """
    reason = why_anew(read_stamp(), None) if venv_exists() else "there is none"
    found = [PYTHON, "-Ic", "import lazy_loader, packaging"]
    # What this tool made was imported before it was called ready.
    if not (reason or STAMP.exists()) and run(*found, capture_output=True).returncode:
        reason = "it is empty, or not complete"
    python = "py" if os.name == "nt" else "python3"
    makes = f"make lab (or {python} tools/environment.py lab) makes {VENV}"
    return f"FIX Environment: {reason}; {makes}" if reason else None


def ensure(extras: list, torch: str | None) -> None:
    """Make or complete the environment where needed.

    Args:
        extras: the lists of ``[project.optional-dependencies]`` to install.
        torch: ``"cpu"`` or ``"default"``; None keeps what is there, and is the default
            build at first.

    Raises:
        Stop: it can't be made.
    """
    with one_at_a_time():
        exists, stamp = venv_exists(), read_stamp()
        if torch == "cpu" and sys.platform != "linux":
            torch = say("The default build is the CPU build here, and is taken.")
        reason = why_anew(stamp, torch) if exists else "there is none"
        digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
        digest.update(LOCK.read_bytes())
        wanted = {"digest": digest.hexdigest(), "folder": str(VENV)}
        ready = not reason and stamp.get("digest") == wanted["digest"]
        if ready and {*extras} <= {*stamp["extras"]}:
            return
        if reason:
            make_venv(reason)
        # An environment for the tests also serves JupyterLab.
        wanted["extras"] = sorted({*extras, *stamp.get("extras", ())})
        wanted["torch"] = torch or stamp.get("torch", "default")
        before = STAMP.read_text() if STAMP.exists() else None
        STAMP.write_text("{}")
        try:
            install(wanted["extras"], wanted["torch"])
        except Stop:
            # Without a network uv gives up before it changes anything.
            if before is None:
                STAMP.unlink()
            elif before != "{}" and is_usable():
                STAMP.write_text(before)
            raise
        wanted["python"] = python_version()
        STAMP.write_text(json.dumps(wanted, indent=2) + "\n")


def make_venv(reason: str) -> None:
    """Make an empty environment, in the place of an old one if there is one."""
    say(f"[1/2] Making the environment in {VENV.name}, since {reason}")
    empty_venv()
    # Run from inside an environment, perhaps the very one that goes, its base makes
    # the new one.
    base = getattr(sys, "_base_executable", None) or sys.executable
    if run(base, "-m", "venv", VENV, env=own_environment()).returncode:
        raise Stop(f"{base} -m venv could not make {VENV}; its lines above say why")


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# What is installed.


def install(extras: list, torch: str) -> None:
    """Install the project with ``extras`` and this build of torch."""
    large = sys.platform == "linux" and torch == "default"
    size = "3 GB, TORCH=cpu (--torch=cpu) a tenth of it" if large else "0.4 GB"
    say(f"[2/2] Installing what {LOCK.name} names; a first time brings {size}")
    variables = installers_environment()
    lock = LOCK.read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([^ ]+)", lock, re.MULTILINE))
    # The lines of uv itself, with their hashes, which pip then compares.
    bare = VENV / "uv.txt"
    bare.write_text(re.search(r"^uv==(.+\n)+?(?=\w|\Z)", lock, re.MULTILINE)[0])
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--requirement", bare]
    if run(*command, env=variables).returncode:
        raise Stop(f"pip could not bring uv; its lines above say why. {ADVICE}")
    uv = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON]
    if torch == "cpu":
        cpu = [*uv, "--default-index", CPU_INDEX, "--no-deps"]
        cpu += [f"{name}=={pins[name]}" for name in ("torch", "torchvision")]
        # Its hashes aren't in the lock, which is written from the default index. An
        # index that can't be reached costs 20 seconds.
        if run(*cpu, env={**variables, "UV_HTTP_RETRIES": "1"}).returncode:
            say("So torch's default build is taken, which is larger and serves as well")
    # What the lock holds has its hash compared, also where it only builds the project.
    pinned = ["--constraints", LOCK, "--build-constraints", LOCK]
    project = ["--editable", f".[{','.join(extras)}]"]
    if run(*uv, *pinned, *project, env=variables).returncode:
        raise Stop(f"uv could not install it; its lines above say why. {ADVICE}")
    if not is_usable():
        raise Stop(f"What was installed in {VENV} can't be used; see the lines above")


def is_usable() -> bool:
    """Tell whether the environment has what it needs, and torch works in it."""
    code = "import lowrank_utils.__main__ as m; m.check_versions(); m.check_torch()"
    return run(PYTHON, "-Ic", code, env=own_environment()).returncode == 0


def installers_environment() -> dict:
    """Return the environment variables for pip and uv: they look where the user tells
    pip or uv to look, and install where and what this script says.
    """
    # Where installing is to be for the user alone, pip would list that user's file alone.
    everything = {**own_environment(), "PIP_USER": "0"}
    command = [PYTHON, "-m", "pip", "config", "list"]
    listed = run(*command, env=everything, stdout=subprocess.PIPE).stdout
    # What is said for installing goes over what is said for all commands, and a
    # variable over both. A value is written as a string of Python's.
    told = {
        name: " ".join(ast.literal_eval(value).split())
        for section in ("global", "install", ":env:")
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed, re.M)
        if name in {*VARIABLES, *IN_FILE}
    }
    variables = {
        name: value
        for name, value in own_environment().items()
        if not name.startswith(("PIP_", "UV_")) or re.match(f"UV_({KEPT})", name)
    }
    for name, value in told.items():
        variables["PIP_" + name.upper().replace("-", "_")] = value
        if name in VARIABLES:
            variables.setdefault(VARIABLES[name], value)
    # Any index may have a file, as for pip; that is safe, since hashes are compared.
    variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    folder = os.environ.get("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME")
    users = Path(folder or Path.home() / ".config", "uv", "uv.toml")
    users = Path(os.environ.get("UV_CONFIG_FILE", users))
    text = users.read_text(encoding="utf-8") if users.is_file() else ""
    text = re.sub(rf"(?m)^\s*({ELSEWHERE})\s*=.*$", "", text)
    for name in sorted(IN_FILE.keys() & told.keys()):
        # JSON's strings, lists and truths are TOML's. What uv is told goes first.
        if not re.search(rf"(?m)^\s*{name}\s*=", text):
            text = f"{name} = {json.dumps(IN_FILE[name](told[name]))}\n{text}"
    (VENV / "uv.toml").write_text(text, encoding="utf-8")
    return {
        **variables,
        "UV_CONFIG_FILE": str(VENV / "uv.toml"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


# What runs in it.


def own_environment() -> dict:
    """Return the environment variables without those that lead Python elsewhere."""
    left_out = ("PYTHONHOME", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def environment_for(python: Path) -> dict:
    """Return the environment variables for what runs under ``python``."""
    variables = own_environment()
    # A notebook's terminal and its !commands find what is installed here.
    path = [str(python.parent), variables.get("PATH", os.defpath)]
    variables["PATH"] = os.pathsep.join(path)
    if python == PYTHON:
        variables["VIRTUAL_ENV"] = str(VENV)
        # Nothing was compiled so far; each module is when it is first imported.
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
    # A kernel runs in notebooks/, where a relative folder would be another one.
    folder = variables.get("LOWRANK_DATA_DIR")
    if folder:
        variables["LOWRANK_DATA_DIR"] = str(Path(folder).expanduser().absolute())
    return variables


def become(python: Path, arguments: list) -> int:
    """Run ``python`` in the project's folder, in the place of this process."""
    command, variables = [str(python), *arguments], environment_for(python)
    os.chdir(ROOT)
    sys.stdout.flush()
    if os.name != "nt":
        # Ctrl-C and signals go straight to the command.
        os.execve(command[0], command, variables)  # noqa: S606
    with subprocess.Popen(command, env=variables) as process:
        while True:
            # Ctrl-C reaches both processes; the command decides what it means.
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def clean() -> int:
    """Remove the environment and what tools left behind."""
    with one_at_a_time():
        if venv_exists():
            empty_venv()
    left = [".venv", "build", ".pytest_cache", ".mypy_cache", ".ruff_cache"]
    found = [ROOT / name for name in [*left, ".hypothesis", "lora_dora.egg-info"]]
    found += [*ROOT.glob(".coverage*"), *ROOT.glob("**/__pycache__")]
    for path in filter(Path.exists, found):
        say(f"Removing {path.relative_to(ROOT)}")
        remove(path)
    return 0


def main(words: list) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A folder's name may hold letters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="environment.py", description=DESCRIPTION)
    here = "use the running Python as it is, such as a conda environment"
    parser.add_argument("--torch", choices=["cpu", "default"], help="build of torch")
    parser.add_argument("--here", action="store_true", help=here)
    parser.add_argument("command", choices=[*COMMANDS, "clean"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    try:
        if options.command == "clean":
            return clean()
        extras, module = COMMANDS[options.command]
        if options.command == "check" and not options.here:
            line = lacking()
            if line:
                say(line)
                return 1
        elif not options.here:
            ensure(extras, options.torch)
        if options.command == "test":
            options.arguments = options.arguments or PARALLEL
        python = Path(sys.executable) if options.here else PYTHON
        return become(python, [*module, *options.arguments])
    except (Stop, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what came stays.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
