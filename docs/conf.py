"""How Sphinx makes the site. tools/build_site.py puts the pages together and calls
Sphinx with this file.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
# The package and the tools of this very folder, whatever is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import nbformat  # noqa: E402
from build_site import MOVING_PICTURE, with_links_to_pages  # noqa: E402
from docutils import nodes  # noqa: E402
from drawings import inline  # noqa: E402
from frames import first_picture, put_in_frames  # noqa: E402
from repository import launch_options  # noqa: E402
from web_packages import BUILD  # noqa: E402

from lowrank_utils import __version__  # noqa: E402

project = "LoRA and DoRA from scratch"
version = release = __version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]

# The notebooks are shown as they are stored; the tests have run them.
nb_execution_mode = "off"
# No widgets, whose scripts come from another host.
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
# What the tags of cells fold away; of several, the last says it.
FOLDED = {
    "hide-input": "the code",
    "hide-output": "what comes out",
    "hide-cell": "the solution",
}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-chtml.js"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True
# Docstrings are read in the code too, where a single backtick means code.
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = project
html_context = {"default_mode": "auto"}
html_theme_options = {
    "footer_content_items": [],
    "home_page_in_toc": True,
    # The search stands at the side already.
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "show_toc_level": 2,
    "use_fullscreen_button": False,
    # Each page lists its own branch alone, which also halves the time to write them.
    "collapse_navigation": True,
    **launch_options(),
}
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["frames.js", "page.js"]
html_show_copyright = False
html_show_sphinx = False


def in_one_fold(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the cells of a notebook, of which those whose code is folded and that
    print nothing are joined with such a cell below them.
    """
    joined: list[nbformat.NotebookNode] = []
    for cell in cells:
        before = joined[-1] if joined else cell
        folded = [
            "hide-input" in one["metadata"].get("tags", []) for one in (before, cell)
        ]
        if before is not cell and all(folded) and not before["outputs"]:
            cell["source"] = f"{before['source']}\n\n\n{cell['source']}"
            joined.pop()
        joined.append(cell)
    return joined


def lead_notebooks_to_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Make the links of a notebook lead to pages, show frames for pictures with
    sliders, and say what is folded; the file that readers download stays as it is.
    On the start page, show the picture that moves.

    Args:
        app: the running Sphinx.
        name: of the page.
        source: the text that was read, as its only element.
    """
    path = Path(app.env.doc2path(name))
    if name == "index":
        lesson = nbformat.read(ROOT / "notebooks" / "05_dora.ipynb", as_version=4)
        shown = first_picture(lesson, BUILD / "frames")
        source[0] = source[0].replace(MOVING_PICTURE, shown)
    if path.suffix != ".ipynb":
        return
    notebook = nbformat.reads(source[0], as_version=4)
    put_in_frames(notebook, BUILD / "frames")
    notebook["cells"] = in_one_fold(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = cell["source"]
            cell["source"] = with_links_to_pages(
                text, path.relative_to(app.srcdir).as_posix()
            )
        tags = cell["metadata"].get("tags", [])
        for tag, words in FOLDED.items():
            if tag in tags:
                cell["metadata"].setdefault("mystnb", {}).update(
                    code_prompt_show=f"Show {words}", code_prompt_hide=f"Hide {words}"
                )
        if {"hide-input", "hide-output"} <= set(tags):
            # One fold, and not two with one name.
            tags.append("hide-cell")
    source[0] = nbformat.writes(notebook)


def draw_in_page(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Put the drawings into the pages themselves, so that their words can be selected
    and searched.

    Args:
        app: the running Sphinx.
        tree: the page, changed in place.
        name: of the page.
    """
    del app, name
    for image in list(tree.findall(nodes.image)):
        path = ROOT / "figures" / Path(image["uri"]).name
        if path.suffix == ".svg" and path.is_file():
            drawn = inline(path, image.get("alt", ""))
            image.replace_self(nodes.raw("", drawn, format="html"))


def escape_bars(
    app: Sphinx,
    what: str,
    name: str,
    described: object,
    options: object,
    lines: list[str],
) -> None:
    """Let the bars in a docstring's formulas, as in |m|, be bars; Sphinx would take
    them for a substitution.

    Args:
        app: the running Sphinx.
        what: the kind of the described thing.
        name: its full name.
        described: the thing itself.
        options: of the directive.
        lines: the docstring, changed in place.
    """
    del app, what, name, described, options
    literal = r"``.*?``|`.*?`"
    for place, line in enumerate(lines):
        plain = re.split(f"({literal})", line)
        plain[::2] = [part.replace("|", r"\|") for part in plain[::2]]
        lines[place] = "".join(plain)


def skip_bare_fields(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave out the fields of a named tuple that only say so; its docstring describes
    them.

    Args:
        app: the running Sphinx.
        what: the kind of what holds the member.
        name: of the member.
        member: the member itself.
        skip: what Sphinx would do.
        options: of the directive.

    Returns:
        True to skip it; None leaves it to Sphinx.
    """
    del app, what, name, skip, options
    return (
        True
        if (getattr(member, "__doc__", None) or "").startswith("Alias for field number")
        else None
    )


# Names in the pages of the themes that a screen reader reads wrongly or not at all, and
# what they become.
ACCESSIBLE_NAMES = {
    # The words that it shows are its name.
    r'(<button class="btn search-button-field[^>]*?) aria-label="Search"': r"\1",
    r'<summary aria-label="Toggle hidden content">': "<summary>",
    # It shows an arrow alone.
    r'<summary>(?=\s*<span class="toctree-toggle")': '<summary aria-label="Pages below">',
}


def name_controls(app: Sphinx, error: Exception | None) -> None:
    """Give the controls of all pages names that a screen reader can read.

    Args:
        app: Sphinx, after all pages are written.
        error: what ended the build, if it failed.
    """
    if error is not None:
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = named = path.read_text(encoding="utf-8")
        for wrong, right in ACCESSIBLE_NAMES.items():
            named = re.sub(wrong, right, named)
        if named != text:
            path.write_text(named, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register what the pages need besides the extensions."""
    app.connect("source-read", lead_notebooks_to_pages)
    app.connect("doctree-resolved", draw_in_page)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_bare_fields)
    app.connect("build-finished", name_controls)
