"""Build the site: a start page, the notebooks as they are stored, the results and the
package as web pages.

    python tools/build_site.py                 into build/site
    python tools/build_site.py --output FOLDER

No notebook is executed but for what its pictures with sliders need (tools/frames.py),
and the pages load nothing from another host. Warnings are errors.
"""

import argparse
import base64
import html
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import nbformat
from contents import lessons
from quiz import GIFT_FILE, gift, read_questions
from repository import badges
from sheets import sheets, solutions
from sphinx.cmd.build import build_main
from web_packages import (
    BUILD,
    DOCS,
    ROOT,
    MissingPackages,
    copy_mathjax,
    install_packages,
)

# In its place docs/conf.py shows the picture of the start page.
MOVING_PICTURE = "<!-- the picture that moves -->"
DRAWING = re.compile(r"!\[.*\]\(\.\./(figures/\w+\.svg)\)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(?=[)#])")

# What the pages link to besides pages, and what they show.
FILES = (
    "constraints.txt",
    "requirements.lock",
    "CITATION.cff",
    "LICENSE",
    "pyproject.toml",
    "lowrank_utils/__init__.pyi",
    "docs/package-lock.json",
    ".github/workflows/*.yml",
    "notebooks/comparison*.yaml",
    "notebooks/results/*",
    "figures/*.svg",
)

# What is made along with the site can be had from it: the places that docs/teaching.md
# names, and where each is.
MADE_ALONG = {
    "build/sheets": "../exercises/index.md",
    "build/sheets/solutions.md": "../exercises/solutions.md",
    f"build/sheets/{GIFT_FILE}": GIFT_FILE,
}

# The results, and the experiment that they come from.
RESULTS = ("docs/results", "notebooks/comparison")

# Pages that are written as such, in the order of the navigation.
DOCUMENTS = {
    "Using it": ("docs/setup.md", "docs/package.md", "docs/own_model.md"),
    "Teaching": ("docs/teaching.md",),
    "The project": (
        "docs/sources.md",
        "docs/reproducibility.md",
        "docs/mutants.md",
        "docs/survivors.md",
        "docs/faults.md",
        "docs/licences.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ),
}


def modules() -> list[str]:
    """Return the public modules by their names in the package, ``lora`` or
    ``comparison.tables``, in reading order.

    That is the learner's floor, then the folders; within each, a module stands below
    those that it imports. The checks of the exercises share a page.
    """
    order = []
    for house in ("", "adapters.", "comparison."):
        folder = ROOT / "lowrank_utils" / house.removesuffix(".")
        imported = re.compile(
            rf"^from lowrank_utils\.{house}(\w+) import", re.MULTILINE
        )
        above = {
            path.stem: imported.findall(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("*.py"))
            if not path.stem.startswith("_")
        }
        order += [
            f"{house}{name}"
            for name in TopologicalSorter(above).static_order()
            if name in above
        ]
    return [*order, "checks", "checks.broken"]


def page_of(target: str) -> str:
    """Return which page stands for a file of the project, as a path from its folder.

    Args:
        target: a path from the project's folder.
    """
    if target == "README.md":
        return "index.md"
    module = re.fullmatch(r"lowrank_utils/([\w/]+?)(?:\.py)?/?", target)
    if module is None:
        return target
    name = module[1].replace("/", ".")
    # A folder's own file stands for the folder, and the checks share a page.
    name = name if name in modules() else name.split(".")[0]
    return f"api/{name}.md"


def with_links_to_pages(text: str, place: str) -> str:
    """Return Markdown whose links to files of the project lead to their pages.

    Args:
        text: the Markdown.
        place: where it stands, as a path from the project's folder.
    """
    folder = PurePosixPath(place).parent

    def rewritten(match: re.Match[str]) -> str:
        parts: list[str] = []
        for part in (folder / match[1]).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        page = page_of("/".join(parts))
        return "../" * len(folder.parts) + page

    return LINK.sub(rewritten, text)


def toctree(caption: str, pages: list[str], hidden: bool = True) -> str:
    """Return the directive that puts ``pages`` into the navigation under
    ``caption``.
    """
    options = [f":caption: {caption}", *([":hidden:"] if hidden else [":maxdepth: 1"])]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def report_entry(path: Path) -> str:
    """Return a report's line in the navigation, with what tells it from the other
    reports.

    Args:
        path: the report, whose second paragraph says what was run.
    """
    found = re.search(
        r"^# Results on (\S+)\n\n[\d,]+ adaptations above (\d+) pretrained networks",
        path.read_text(encoding="utf-8"),
    )
    named = (
        f"Report on {found[1]}, {found[2]} networks" if found else f"Report {path.stem}"
    )
    return f"{named} <{path.relative_to(ROOT).with_suffix('').as_posix()}>"


def thumbnail(path: Path) -> tuple[str, bytes]:
    """Return the first picture that a notebook shows without being asked to, or else
    its first one: the ending of its file's name, and the file.

    Args:
        path: the notebook.
    """
    asked_for = []
    for cell in nbformat.read(path, as_version=4).cells:
        drawing = DRAWING.search(cell.source)
        if cell.cell_type == "markdown" and drawing:
            return ".svg", (ROOT / drawing[1]).read_bytes()
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                plot = ".png", base64.b64decode(output.data["image/png"])
                if "hide-output" not in cell.metadata.get("tags", []):
                    return plot
                asked_for.append(plot)
    if not asked_for:
        raise ValueError(f"{path.name} has no picture for its card on the start page")
    return asked_for[0]


def cards() -> str:
    """Return a card for each notebook: its picture, its title, its question."""
    made = [
        f'<a class="lesson" href="notebooks/{one.path.stem}.html">'
        f'<img src="_static/cards/{one.path.stem}{thumbnail(one.path)[0]}" alt="" loading="lazy">'
        f"<strong>{html.escape(one.title)}</strong>"
        f"<span>{html.escape(one.question)}</span>"
        f"<small>{one.reading} minutes, and {one.exercises} for the exercises</small></a>"
        for one in lessons()
    ]
    return "\n".join(['<div class="cards">', *made, "</div>"])


def start_page() -> str:
    """Return the start page: docs/start.md with its parts from README.md and from the
    notebooks.
    """
    readme = with_links_to_pages(
        (ROOT / "README.md").read_text(encoding="utf-8"), "README.md"
    )
    findings = re.search(r"^## What came out\n.*?(?=^## )", readme, re.M | re.S)
    sentence = re.search(r"^# .+\n\n(.+?[.!?])(?= |\n)", readme)
    if findings is None or sentence is None:
        raise ValueError("README.md has no first sentence, or not what came out")
    parts = {
        "SENTENCE": sentence[1],
        "FIRST": f"notebooks/{lessons()[0].path.stem}.html",
        "MOVING": MOVING_PICTURE,
        "BADGES": badges(),
        "CARDS": cards(),
        "FINDINGS": findings[0],
    }
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = re.sub(rf"\b{name}\b", lambda _, part=part: part, text)
    return text


def pages() -> dict[str, str]:
    """Return the pages that are made from other files: the start page and the
    package.
    """
    stems = [one.path.stem for one in lessons()]
    notebooks = [f"notebooks/{stem}" for stem in stems]
    reports = [
        report_entry(path) for path in sorted((ROOT / "notebooks/results").glob("*.md"))
    ]
    documents = [
        toctree(caption, [name.removesuffix(".md") for name in names])
        for caption, names in DOCUMENTS.items()
    ]
    made = {
        "index.md": start_page()
        + toctree("The series", [*notebooks, "exercises/index"])
        + toctree("Results", [*RESULTS, *reports])
        + toctree("The package", ["api/index"])
        + "".join(documents),
        "exercises/index.md": "# Exercise sheets\n\n"
        "The exercises of each notebook and what they need, without solutions: to print, "
        "or to run (the download button of each page has the notebook). "
        "[All solutions](solutions.md) are on one page.\n"
        + toctree("", [*stems, "solutions"], hidden=False).replace(":caption: \n", ""),
        "api/index.md": "# Reference\n\n"
        "What the modules of `lowrank_utils` hold, from their docstrings, in the order in which they can be read.\n"
        + toctree("The package", modules(), hidden=False).replace(
            ":caption: The package\n", ""
        ),
    }
    for name in modules():
        # The checks' page shows what their files hold; a module's page, what stands in
        # it.
        listed = (
            "   :imported-members:\n"
            if name == "checks"
            else "   :ignore-module-all:\n"
        )
        directive = f".. automodule:: lowrank_utils.{name}\n   :members:\n{listed}"
        made[f"api/{name}.md"] = f"# {name}\n\n```{{eval-rst}}\n{directive}```\n"
    return made


def copied_files() -> list[Path]:
    """Return the files that go into the site as they are, apart from links to pages in
    Markdown.
    """
    documents = [name for names in DOCUMENTS.values() for name in names]
    return sorted(
        path
        for pattern in ("notebooks/*.ipynb", "docs/results.md", *documents, *FILES)
        for path in ROOT.glob(pattern)
    )


def write_if_new(path: Path, content: bytes) -> None:
    """Write a file unless it is so already, so that Sphinx reads again only what has
    changed.
    """
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def assemble(folder: Path) -> None:
    """Put all that Sphinx reads into ``folder``, and remove what an earlier run left
    there.

    Args:
        folder: where the sources go.
    """
    written = set()
    for name, text in pages().items():
        write_if_new(folder / name, text.encode())
        written.add(folder / name)
    for path in copied_files():
        name = path.relative_to(ROOT).as_posix()
        content = path.read_bytes()
        if path.suffix == ".md":
            text = with_links_to_pages(content.decode(), name)
            for place, page in MADE_ALONG.items():
                text = text.replace(f"`{place}`", f"[`{place}`]({page})")
            content = text.encode()
        write_if_new(folder / name, content)
        written.add(folder / name)
    made = {f"exercises/{name}": text for name, text in sheets("../notebooks").items()}
    made |= {
        "exercises/solutions.md": solutions(),
        f"docs/{GIFT_FILE}": gift(read_questions()),
    }
    for name, text in made.items():
        write_if_new(folder / name, text.encode())
        written.add(folder / name)
    for path in folder.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()


def build(output: Path) -> int:
    """Build the site, and return Sphinx's exit status.

    Args:
        output: the folder that is served afterwards. What Sphinx reads and what it
            remembers lie beside it.

    Raises:
        MissingPackages: MathJax can't be had.
    """
    packages = install_packages()
    source, memory = (
        output.with_name(output.name + end) for end in ("-source", "-memory")
    )
    assemble(source)
    options = ["-W", "--keep-going", "-q", "-c", str(DOCS), "-d", str(memory)]
    status = build_main([*options, "-b", "html", str(source), str(output)])
    copy_mathjax(packages, output / "_static" / "mathjax")
    for one in lessons():
        ending, picture = thumbnail(one.path)
        write_if_new(output / "_static/cards" / f"{one.path.stem}{ending}", picture)
    return status


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=BUILD / "site", help="default: build/site"
    )
    output = parser.parse_args().output
    try:
        status = build(output)
    except MissingPackages as error:
        print(error, file=sys.stderr)
        return 1
    if status == 0:
        print(f"The site is in {output}; open {output / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
