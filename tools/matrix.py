"""Run all notebooks under nbval in one setting after another: do the stored outputs
come out again in each?

    python tools/matrix.py                     run every setting that this machine offers
    python tools/matrix.py --list              say which those are
    python tools/matrix.py SSE "no network"    run some
    python tools/matrix.py --table             run nothing; after a change to a notebook, say so in the table
    python tools/matrix.py "oldest PEFT"       after a change of what is read from PEFT or handed to it

In that last setting it isn't the notebooks that are run, but the tests that hold PEFT's
numbers and files against ours.
Each outcome is written to notebooks/results/matrix.json and to the table in
docs/reproducibility.md as soon as it is there. Settings that aren't run now keep their
last outcome.
"""

# ruff: noqa: S603 (it runs Python and the system's own tools, never through a shell of the caller's)

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from processors import IS_X86_64, PROCESSORS, processor
from tqdm import tqdm

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results" / "matrix.json"
TABLE = ROOT / "docs" / "reproducibility.md"
ENVIRONMENTS = ROOT / ".matrix"

# As torch names them, from narrow to wide.
WIDTHS = ("DEFAULT", "AVX2", "AVX512")


@dataclass(frozen=True)
class Setting:
    """One way in which the notebooks are run.

    Attributes:
        name: in the table.
        variables: environment variables; None takes one away.
        python: ``"pinned"``, the oldest versions that pyproject.toml allows
            (``"oldest"``), or a version such as ``3.12``.
        place: ``"here"``, a copy in a path with a ``"space"``, or a ``"read-only"``
            checkout.
        network: False leaves it the loopback device alone.
        vectors: one of ``WIDTHS``, which the processor must have, if the setting asks
            for one.
        tests: what is run instead of the notebooks.
        packages: whose versions stand in the row.
    """

    name: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    python: str = "pinned"
    place: str = "here"
    network: bool = True
    vectors: str | None = None
    tests: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("torch", "matplotlib")


SETTINGS = [
    *(
        Setting(
            f"{name}, {threads} thread{'s' * (threads > 1)}",
            processor(name, threads),
            vectors=PROCESSORS[name][0].upper(),
        )
        for name in PROCESSORS
        for threads in (1, 2)
    ),
    *(
        Setting(f"Python {version}", python=version)
        for version in ("3.11", "3.12", "3.13")
    ),
    Setting("oldest torch and matplotlib", python="oldest"),
    Setting(
        "oldest PEFT, transformers and torch",
        python="oldest",
        # Torch 2.5 can't compile in one graph what reads a context variable, its compiler
        # crashes in several threads, and fully_shard came with 2.6.
        tests=(
            "tests/unit/test_peft_parity.py",
            "tests/unit/test_text.py",
            "tests/unit/adapters",
            "-k",
            "not compiled and not in_dtensors and not in_pieces",
        ),
        packages=("peft", "transformers", "torch"),
    ),
    Setting(
        "German, UTC+14",
        {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Pacific/Kiritimati"},
    ),
    Setting(
        "Chinese, UTC−10",
        {"LC_ALL": "zh_CN.UTF-8", "LANG": "zh_CN.UTF-8", "TZ": "Pacific/Honolulu"},
    ),
    Setting("a path with a space and umlauts", place="space"),
    Setting("a checkout that can't be written", place="read-only"),
    Setting("without HOME", {"HOME": None, "XDG_CACHE_HOME": None}),
    Setting("no network but loopback", network=False),
]


class NotOffered(Exception):
    """This machine can't run a setting; the message says why."""


def lowest(name: str) -> str:
    """Return the lowest version of a dependency that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    lines = project["dependencies"] + project["optional-dependencies"]["peft"]
    found = [re.fullmatch(rf"{name}>=([\d.]+)", line) for line in lines]
    return next(match[1] for match in found if match)


def interpreter(version: str) -> str:
    """Return a Python of this version, from the path or from pyenv."""
    if version == ".".join(platform.python_version_tuple()[:2]):
        return sys.executable
    # What the path has may be pyenv's stand-in, which starts nothing where that version
    # isn't chosen.
    candidates = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
    ]
    for found in filter(None, candidates):
        if (
            subprocess.run(
                [found, "-c", ""], check=False, capture_output=True
            ).returncode
            == 0
        ):
            return str(found)
    raise NotOffered(f"there is no Python {version}")


def environment(name: str) -> str:
    """Return the Python of an environment with everything installed, which is made if
    need be.
    """
    # The oldest versions go with the oldest Python.
    base = (
        sys.executable
        if name == "pinned"
        else interpreter("3.11" if name == "oldest" else name)
    )
    if base == sys.executable and name != "oldest":
        return base
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    ready = folder / "ready"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if name == "oldest":
        # Newer releases of mlxtend and transformers ask for a newer matplotlib and a
        # newer torch, which pins sympy and triton.
        oldest = (
            "torch",
            "torchvision",
            "matplotlib",
            "mlxtend",
            "transformers",
            "peft",
        )
        free = (
            *oldest,
            "sympy",
            "triton",
            "accelerate",
            "huggingface-hub",
            "sentence-transformers",
            "tokenizers",
        )
        lines = [line for line in lines if line.split("==")[0] not in free]
        lines += [f"{package}=={lowest(package)}" for package in oldest]
    text = "\n".join(lines) + "\n"
    # One that was made for other versions is made anew.
    if ready.is_file() and ready.read_text(encoding="utf-8") == text:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(text, encoding="utf-8")
    subprocess.run(
        [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            str(constraints),
            "-e",
            f"{ROOT}[test]",
        ],
        check=True,
    )
    ready.write_text(text, encoding="utf-8")
    return str(python)


@contextmanager
def prepared(setting: Setting) -> Iterator[tuple[list[str], Path, dict[str, str]]]:
    """Yield what to put before a command, the folder to run it in, and the environment
    variables.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if setting.variables.get(name, "") is not None
    }
    variables |= {
        name: value for name, value in setting.variables.items() if value is not None
    }
    before: list[str] = []
    with ExitStack() as stack:
        folder = ROOT
        if setting.place != "here":
            top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = top / (
                "mein Übungs ordner" if setting.place == "space" else "checkout"
            )
            shutil.copytree(
                ROOT,
                folder,
                ignore=shutil.ignore_patterns(".venv", ".matrix", ".git", "build"),
            )
        # The package of the folder that is run, whatever is installed.
        variables["PYTHONPATH"] = str(folder)
        if setting.place == "read-only":
            mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && cd "$1" && shift && exec "$@"'
            before = [*isolated("--mount"), "sh", "-c", mount, "sh", str(folder)]
        if not setting.network:
            before = [
                *isolated("--net"),
                "sh",
                "-c",
                'ip link set lo up && exec "$@"',
                "sh",
            ]
        locale = setting.variables.get("LC_ALL")
        if locale:
            variables["LOCPATH"] = stack.enter_context(compiled_locale(locale))
        yield before, folder, variables


def isolated(kind: str) -> list[str]:
    """Return the command that gives what follows a mount or network namespace of its
    own.
    """
    command = ["unshare", kind, "--"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*command, "true"], check=False, capture_output=True
        ).returncode
    ):
        raise NotOffered(f"unshare {kind} isn't allowed here (Linux, as root)")
    return command


@contextmanager
def compiled_locale(name: str) -> Iterator[str]:
    """Yield a folder with this locale, compiled from the system's sources."""
    language, encoding = name.split(".")
    with tempfile.TemporaryDirectory() as folder:
        command = ["localedef", "-i", language, "-f", encoding, f"{folder}/{name}"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            raise NotOffered(
                f"localedef can't compile {name} (Debian's package locales)"
            ) from None
        yield folder


def check_vectors(wanted: str | None, python: str) -> None:
    """Raise ``NotOffered`` if this processor lacks the vector unit that a setting asks
    for.

    Torch takes the unit that it is told to use, and fails at the first instruction that
    isn't there; by itself it takes the widest that is.
    """
    if wanted is None:
        return
    if not IS_X86_64:
        raise NotOffered("this isn't an x86-64 processor")
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    variables = {
        name: value
        for name, value in os.environ.items()
        if name != "ATEN_CPU_CAPABILITY"
    }
    done = subprocess.run(
        [python, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    widest = done.stdout.strip()
    if WIDTHS.index(wanted) > WIDTHS.index(widest):
        raise NotOffered(f"this processor has {widest} and not {wanted}")


def without_comments(source: str) -> str:
    """Return the lines of Python code that hold more than comments."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(line for line in lines if line)


def digest() -> str:
    """Return the SHA-256 of all code of the notebooks, comments left out, with the
    stored outputs.
    """
    content = hashlib.sha256()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                code = without_comments("".join(cell["source"]))
                shown = [code, cell["outputs"]]
                content.update(json.dumps(shown, sort_keys=True).encode())
    return content.hexdigest()


def run(setting: Setting) -> dict[str, str]:
    """Run all notebooks, or the setting's tests, in one setting, and return its row."""
    row = {
        "setting": setting.name,
        "date": date.today().isoformat(),
        "notebooks": digest(),
    }
    try:
        python = environment(setting.python)
        check_vectors(setting.vectors, python)
        with prepared(setting) as (before, folder, variables):
            # Old packages call what newer ones deprecate; here the outputs count.
            quiet = (
                ["-W", "ignore::DeprecationWarning"]
                if setting.python == "oldest"
                else []
            )
            done = subprocess.run(
                [*before, python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet,
                 "--own-processor", *(setting.tests or ("notebooks",))],
                cwd=folder, env=variables, capture_output=True, text=True, check=False,
            )  # fmt: skip
            versions = subprocess.run(
                [python, "-c", "import platform, sys; from importlib.metadata import version as v; "
                 "print(platform.python_version(), *(v(name).split('+')[0] for name in sys.argv[1:]))",
                 *setting.packages],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
    except NotOffered as reason:
        return row | {"outcome": f"not run: {reason}", "versions": ""}
    counts = re.findall(
        r"(\d+) (passed|failed|skipped|errors?)",
        done.stdout.splitlines()[-1] if done.stdout else "",
    )
    cells = {word: int(number) for number, word in counts}
    names = ("Python", *setting.packages)
    row["versions"] = ", ".join(
        f"{name} {version}"
        for name, version in zip(names, versions.stdout.split(), strict=True)
    )
    # A library that can't be imported skips its tests.
    passed = done.returncode == 0 and cells.get("passed")
    if setting.tests and passed and "skipped" not in cells:
        return row | {"outcome": f"all {cells['passed']} tests pass"}
    if setting.tests:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        left = sum(cells.values()) - cells.get("passed", 0)
        return row | {"outcome": f"{left or '?'} tests fail or are skipped"}
    if passed:
        return row | {"outcome": f"all {cells['passed']} cells the same"}
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return row | {"outcome": f"{cells.get('failed', '?')} cells differ"}


def stored() -> dict[str, dict[str, str]]:
    """Return the rows so far by setting, in the order of SETTINGS."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    return {row["setting"]: row for row in rows}


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page with the rows as a table."""
    lines = ["| setting | outcome | versions | date |", "|---|---|---|---|"]
    now = digest()
    for setting in SETTINGS:
        row = rows.get(setting.name)
        cells = (
            [row["outcome"], row["versions"], row["date"]]
            if row
            else ["not run yet", "", ""]
        )
        stale = row is not None and row.get("notebooks") != now and not setting.tests
        if row and row["outcome"].startswith("all ") and stale:
            cells[0] += ", of notebooks that have changed since"
        lines.append(f"| {setting.name} | {' | '.join(cells)} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


INTRODUCTION = """# Where the digits are the same

Every output that is stored in a notebook is computed again and compared, text to the letter and pictures to two hundredths of full scale (under another release of matplotlib, which sets the texts in them otherwise, coarsely and by what they draw), in each of the settings below. `python tools/matrix.py` runs them and writes this table. Where a machine doesn't offer a setting, the row of a machine that did stays.

SSE, AVX2 and AVX-512 are the vector units of x86-64 processors: torch, MKL and oneDNN are told to use nothing wider. They add in another order with each, which is why what is trained and then printed is trained in float64.

With the oldest PEFT that pyproject.toml allows, and the oldest transformers and torch, it is the tests that hold its numbers and its files against ours that are run, and all of them must pass: `python tools/matrix.py "oldest PEFT"`. PEFT before 0.21 doesn't do: 0.14 takes `^` in a pattern for a letter, until 0.17.1 tensors of a layer whose name begins with `weight` or `lora` aren't found again when they are loaded, and until 0.20 `layers_pattern` doesn't find a layer at the top of the model, nor are biases of such layers in the file. Here such a file is refused by name. Left out are tests of what torch 2.5 can't do: to compile a bank, and `fully_shard`.

"""


def save(rows: Mapping[str, Mapping[str, str]]) -> None:
    """Write the rows and the table, each in one step."""
    ordered = [rows[setting.name] for setting in SETTINGS if setting.name in rows]
    for path, text in (
        (RESULTS, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"),
        (TABLE, table(rows)),
    ):
        write_whole(path, text)


def main() -> int:
    """Run the command line, and return its exit status: 0 if nothing differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="SETTING",
        help="part of a setting's name; default: all",
    )
    parser.add_argument("--list", action="store_true", help="only list the settings")
    parser.add_argument(
        "--table",
        action="store_true",
        help="only write the table anew, for changed notebooks",
    )
    arguments = parser.parse_args()
    chosen = [
        s
        for s in SETTINGS
        if not arguments.settings or any(part in s.name for part in arguments.settings)
    ]
    if not chosen:
        parser.error(
            f"no such setting; there are: {'; '.join(s.name for s in SETTINGS)}"
        )
    if arguments.list:
        print("\n".join(setting.name for setting in chosen))
        return 0
    rows, differing = stored(), 0
    if arguments.table:
        save(rows)
        return 0
    with tqdm(chosen, unit="setting") as bar:
        for setting in bar:
            bar.set_postfix_str(setting.name)
            row = run(setting)
            differing += row["outcome"].endswith(("differ", "skipped"))
            bar.write(f"{setting.name}: {row['outcome']}")
            # What another machine could run stays, with the date and the notebooks of
            # that run.
            if not (row["outcome"].startswith("not run") and setting.name in rows):
                rows[setting.name] = row
            save(rows)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
