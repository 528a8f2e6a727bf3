"""Nothing that is read can run code, nothing goes through a shell, and the server is
for this machine alone."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["lowrank_utils", "tools", "benchmarks", "figures"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Functions and modules by which data become code, or words a command.
FORBIDDEN_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.load",
        "pickle.load",
        "pickle.loads",
    ),
    *(
        "joblib.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "numpy.load",
        "np.load",
        "pandas.read_pickle",
    ),
    *(
        "pd.read_pickle",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "torch.hub.load",
        "input",
    ),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "commands"}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


def forbidden(source):
    """Return what is forbidden in ``source``, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}")
            found += [
                f"{node.lineno}: {k.arg}="
                for k in node.keywords
                if k.arg in FORBIDDEN_ARGUMENTS
            ]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                f"{node.lineno}: {m}"
                for m in modules
                if m.split(".")[0] in FORBIDDEN_MODULES
            ]
            if isinstance(node, ast.ImportFrom):
                found += [
                    f"{node.lineno}: {n}"
                    for n in names
                    if f"{node.module}.{n}" in FORBIDDEN_CALLS
                ]
    return found


@pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_script_has_no_way_to_run_what_it_reads(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_way_to_run_what_it_reads(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            assert not re.search(r"^\s*[!%]", source, flags=re.MULTILINE), (
                "a shell command or a magic"
            )
            assert forbidden(source) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert forbidden(line)


def test_models_and_adapters_are_never_asked_for_remote_code():
    for path in [*SOURCES, *NOTEBOOKS]:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.name


def test_bandit_finds_nothing():
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "bandit",
            "-c",
            "pyproject.toml",
            "-q",
            "-r",
            *FOLDERS,
            "-f",
            "json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(run.stdout)
    assert report["errors"] == []
    assert [
        f"{r['filename']}:{r['line_number']} {r['test_id']}" for r in report["results"]
    ] == []
    assert run.returncode == 0
    assert len(report["metrics"]) == len(SOURCES) + 1, "all files and their sum"


def test_ruffs_rules_for_safety_are_on_wherever_code_is_run():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^select = \[.*"S"', settings, flags=re.MULTILINE)
    for folder in FOLDERS:
        assert not re.search(rf'^"{folder}/\*" = .*"S', settings, flags=re.MULTILINE)


# --- JupyterLab ---------------------------------------------------------------------------------

DOCUMENTS = [
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.yml"),
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").rglob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / ".ci").iterdir(),
        *(ROOT / ".github").rglob("*.yml"),
        *(ROOT / ".binder").glob("*"),
        *NOTEBOOKS,
    ]
    if path.is_file()
]

# What would open the server to other machines or leave the token away.
OPENINGS = [
    r"--(?:ServerApp\.|NotebookApp\.)?ip[= ]+(?!127\.0\.0\.1\b|localhost\b)",
    r"ip\s*=\s*['\"]?(?:0\.0\.0\.0|\*|::)",
    r"(?:[tT]oken|[pP]assword)\s*=\s*(?:''|\"\"|$|\\?['\"]{2})(?!\w)",
    r"allow_remote_access\s*=\s*(?:True|1)",
    r"password_required\s*=\s*False",
    r"allow_origin",
    r"disable_check_xsrf\s*=\s*True",
    r"JUPYTER_TOKEN=",
]


def openings(text):
    return [
        pattern for pattern in OPENINGS if re.search(pattern, text, flags=re.MULTILINE)
    ]


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_documented_command_opens_the_server(path):
    text = path.read_text(encoding="utf-8")
    assert openings(text) == []
    # The one way to start it is the tool, which keeps it closed.
    typed = re.findall(
        r"^\s*(?:\$ )?(?:python\S* -m )?jupyter[ -](?:lab|notebook|server)\b.*",
        text,
        re.MULTILINE,
    )
    assert typed == []


@pytest.mark.parametrize(
    "line",
    [
        "jupyter lab --ip=0.0.0.0",
        "jupyter lab --ServerApp.ip='*'",
        "make lab LAB_ARGS=--ServerApp.token=''",
        '--IdentityProvider.token=""',
        "c.ServerApp.ip = '0.0.0.0'",
        "--ServerApp.allow_remote_access=True",
        "JUPYTER_TOKEN= jupyter lab",
    ],
)
def test_the_search_for_open_servers_finds_them(line):
    assert openings(line)
