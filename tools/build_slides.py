"""Build slides from the notebooks, for a screen of 1280 × 720 and larger.

    python tools/build_slides.py                 into build/slides, with index.html to start from
    python tools/build_slides.py --output FOLDER

Each cell is shown as its slide type says (see ``slide_types.py``). So that the last row
can read it, type and pictures are large, code that draws a plot is left out, and what
doesn't fit goes to a further slide. The answers and the solutions stand in the notes
for the speaker (key S). No page loads anything from another host.
"""

import argparse
import base64
import html
import math
import re
import shutil
import struct
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from markdown_it import MarkdownIt
from nbconvert.exporters import SlidesExporter
from nbformat import NotebookNode
from slide_types import slide_type
from traitlets.config import Config
from web_packages import (
    BUILD,
    DOCS,
    ROOT,
    MissingPackages,
    copy_mathjax,
    install_packages,
)

# What a slide holds, in pixels, and the sizes that slides.css gives to what stands on
# it.
HEIGHT, WIDTH = 672, 1200
LINE, GAP = 45, 14
CHARACTERS = 76
HEADINGS = {1: 88, 2: 70, 3: 62}
FORMULA = 100
# The least that type may have on a slide, and what the smallest in a picture has at the
# picture's own size: 10 points at 100 dots per inch in a plot, 12 points at 96 in a
# drawing.
LETTERS = 18
PLOT_LETTERS, DRAWING_LETTERS = 10 * 100 / 72, 12 * 96 / 72
CODE_SIZES = (26, 22, 20, 18)
# The width of a letter of a monospaced font, and the height of a line, in font sizes.
CODE_LETTER, CODE_LINE, CODE_PADDING = 0.603, 1.3, 34
# Lines are broken at spaces and nothing else in them is changed.
WRAPPING = {
    "expand_tabs": False,
    "replace_whitespace": False,
    "break_on_hyphens": False,
    "break_long_words": False,
}
# Code stands below the words before it, if these are no more than a heading and seven
# lines.
INTRODUCTION = 420

# The parts of reveal.js that the slides load. Its other themes ask another host for
# their fonts.
REVEAL = (
    "dist/reveal.css",
    "dist/reveal.js",
    "dist/theme/white.css",
    "dist/theme/fonts/source-sans-pro",
    "plugin/notes",
)

MARKDOWN = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """A part of a slide that isn't split: some Markdown, some code or an output.

    Attributes:
        cell: what nbconvert shows.
        height: how many pixels it takes at most.
        start: ``"slide"`` or ``"subslide"`` if it opens one, ``"fragment"`` if it comes
            with a key, else ``""``.
    """

    cell: NotebookNode
    height: float
    start: str = ""


def lines_of(text: str, characters: int) -> int:
    """Return how many lines ``text`` takes when it is wrapped after so many
    characters.
    """
    return sum(max(1, -(-len(line) // characters)) for line in text.splitlines())


def shown_text(source: str) -> str:
    """Return Markdown without what takes no room: the addresses of links, stars and
    backticks.
    """
    return re.sub(r"\]\([^)]*\)|[*`\[]", "", source)


def markdown_cell(source: str) -> NotebookNode:
    """Return a new cell of Markdown."""
    return nbformat.v4.new_markdown_cell(source)


def text_block(source: str, start: str = "", height: float | None = None) -> Block:
    """Return a block of Markdown that is as high as its lines, if nothing else is
    said.
    """
    if height is None:
        height = lines_of(shown_text(source), CHARACTERS) * LINE + GAP
    return Block(markdown_cell(source), height, start)


def table_blocks(lines: list[str]) -> Iterator[Block]:
    """Yield a table in parts that each fit on a slide, with its heading on each."""
    head, rows = lines[:2], lines[2:]
    columns = max(2, head[0].count("|") - 1)

    def height(row: str) -> float:
        cells = [len(shown_text(cell.strip())) for cell in row.strip("| ").split("|")]
        # A table is as wide as its words ask for, so a long cell takes what short ones
        # leave.
        taken = sum(min(length, 94 // columns) for length in cells)
        room = 94 // columns + max(0, 94 - taken) // columns
        return 35 * max(1, *(-(-length // room) for length in cells)) + 8

    part: list[str] = []
    used = height(head[0])
    for row in rows:
        if part and used + height(row) > HEIGHT - HEADINGS[2]:
            yield text_block("\n".join([*head, *part]), height=used + GAP)
            part, used = [], height(head[0])
        part.append(row)
        used += height(row)
    yield text_block("\n".join([*head, *part]), height=used + GAP)


def markdown_blocks(source: str) -> Iterator[Block]:
    """Yield what a Markdown cell shows on slides; a heading within it opens one."""
    lines = source.splitlines()
    for token in MARKDOWN.parse(source):
        if token.level or token.map is None:
            continue
        part = lines[slice(*token.map)]
        text = "\n".join(part).strip()
        if text.startswith(("**Further reading**", "[Contents]", "Previous: [")):
            # The links at the end are for the reader.
            return
        if token.type == "heading_open":
            level = int(token.tag[1])
            start = "slide" if level < 3 else "subslide"
            title = lines_of(shown_text(text), 52)
            yield text_block(text, start, HEADINGS[level] + (title - 1) * 56)
        elif token.type == "table_open":
            yield from table_blocks(part)
        elif token.type in ("bullet_list_open", "ordered_list_open"):
            yield from list_blocks(part)
        elif token.type == "html_block" or re.match(r"About \d+ minutes", text):
            continue
        elif text.startswith("!["):
            yield drawing_block(text)
        elif text.startswith("$$"):
            yield text_block(text, height=FORMULA)
        else:
            yield text_block(" ".join(part))


def list_blocks(lines: list[str]) -> Iterator[Block]:
    """Yield the points of a list one by one."""
    points: list[str] = []
    for line in lines:
        if re.match(r"([-*]|\d+\.) ", line) or not points:
            points.append(line)
        else:
            points[-1] += " " + line.strip()
    for point in points:
        mark, text = point.split(" ", 1)
        point = f"{mark} {text.strip()}"
        yield text_block(
            point, height=lines_of(shown_text(point), CHARACTERS - 3) * LINE + 6
        )


def code_size(text: str, largest: int = CODE_SIZES[0]) -> int:
    """Return the largest font size at which the lines of ``text`` aren't broken and fit
    on a slide.
    """
    for size in CODE_SIZES[CODE_SIZES.index(largest) : -1]:
        fits = (
            max(map(len, text.splitlines()), default=0) * size * CODE_LETTER
            <= WIDTH - CODE_PADDING
        )
        if fits and code_height(text, size) <= HEIGHT:
            return size
    return CODE_SIZES[-1]


def characters_of(size: int) -> int:
    """Return how many letters of code of a font size a slide's width holds."""
    return int((WIDTH - CODE_PADDING) / (size * CODE_LETTER))


def code_height(text: str, size: int) -> float:
    """Return how high ``text`` is in a font size."""
    return lines_of(text, characters_of(size)) * size * CODE_LINE + CODE_PADDING


def wrapped(text: str) -> str:
    """Return code or printed text whose lines fit in the smallest font size.

    What is longer goes on below, further to the right, and a comment behind code goes
    above it.
    """
    room, lines = characters_of(CODE_SIZES[-1]), []
    for line in text.split("\n"):
        indent = re.match(r" *", line)[0]
        code, mark, comment = line.partition("  # ")
        if len(line) > room and code.strip() and mark:
            lines.append(f"{indent}# {comment}")
            line = code
        further = (
            f"{indent}# " if line.startswith(f"{indent}# ") else f"{indent}        "
        )
        lines += textwrap.wrap(line, room, subsequent_indent=further, **WRAPPING) or [
            line
        ]
    return "\n".join(lines)


def output_text(output: NotebookNode) -> str:
    """Return what an output shows, if it is text."""
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def parts_of(text: str) -> list[str]:
    """Return what was printed in parts that each fit on a slide, cut at its empty lines
    where that is possible.
    """
    if code_height(text, CODE_SIZES[-1]) <= HEIGHT:
        return [text]
    lines = text.split("\n")
    rows = int((HEIGHT - CODE_PADDING) / (CODE_SIZES[-1] * CODE_LINE))
    cut = max(
        (place for place in range(1, rows) if not lines[place].strip()), default=rows
    )
    return ["\n".join(lines[:cut]), *parts_of("\n".join(lines[cut:]).strip("\n"))]


def picture_block(output: NotebookNode, alt: NotebookNode) -> Block:
    """Return a plot, as large as its smallest type needs."""
    # A PNG's width and height stand at its beginning.
    width, height = struct.unpack(
        ">II", base64.b64decode(output.data["image/png"])[16:24]
    )
    cell = nbformat.v4.new_code_cell("", outputs=[output], metadata={"mystnb": alt})
    cell.metadata["transient"] = {"remove_source": True}
    return sized_block(cell, width, height, LETTERS / PLOT_LETTERS)


def drawing_block(source: str) -> Block:
    """Return a drawing that Markdown includes, as large as its smallest type needs."""
    alt, name = re.findall(
        r"!\[([^]]*)\]\(\.\./figures/(\S+)\)", " ".join(source.split())
    )[0]
    svg = (ROOT / "figures" / name).read_text(encoding="utf-8")
    # An SVG's size is in points, of which 72 are 96 pixels.
    width, height = (
        float(points) * 96 / 72
        for points in re.findall(r' (?:width|height)="([\d.]+)pt"', svg)[:2]
    )
    picture = f'<img src="figures/{name}" alt="{html.escape(alt)}">'
    return sized_block(markdown_cell(picture), width, height, LETTERS / DRAWING_LETTERS)


def sized_block(cell: NotebookNode, width: float, height: float, scale: float) -> Block:
    """Return a block for a picture that is to be shown at least ``scale`` times its own
    width and height.
    """
    cell.metadata["picture"] = {
        "height": scale * height,
        "most": WIDTH / width * height,
    }
    return Block(cell, scale * height + GAP)


def code_blocks(cell: NotebookNode, largest: int) -> Iterator[Block]:
    """Yield a code cell's source, unless it draws, and its outputs, in type of
    ``largest`` pixels at most.
    """
    exercise = "exercise" in cell.metadata.get("tags", [])
    outputs = [] if exercise else cell.outputs
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    if not pictures:
        source = wrapped(cell.source)
        size = code_size(source, largest)
        code = nbformat.v4.new_code_cell(source, metadata={"tags": [f"code-{size}"]})
        yield Block(code, code_height(source, size))
    for output in outputs:
        if output in pictures:
            yield picture_block(output, cell.metadata.get("mystnb", NotebookNode()))
            continue
        for text in parts_of(wrapped(output_text(output).rstrip("\n"))):
            size = code_size(text, largest)
            printed = nbformat.v4.new_output("stream", name="stdout", text=text)
            shown = nbformat.v4.new_code_cell(
                "", outputs=[printed], metadata={"tags": [f"code-{size}"]}
            )
            shown.metadata["transient"] = {"remove_source": True}
            yield Block(shown, code_height(text, size))


def note_cell(source: str) -> NotebookNode:
    """Return a cell that only the speaker sees."""
    return nbformat.v4.new_markdown_cell(
        source, metadata={"slideshow": {"slide_type": "notes"}}
    )


def without_pictures(source: str) -> str:
    """Return Markdown for the speaker's notes: no pictures, and each link's words
    alone.
    """
    return re.sub(
        r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", source)
    )


def without_last_lead_in(cell: NotebookNode) -> NotebookNode:
    """Return a cell without the sentence that announces a slider, which slides don't
    have.
    """
    shorter = NotebookNode(cell)
    shorter.source = re.sub(
        r"(?:^|(?<=[.?!)])\s)[^.?!]*:\Z", "", cell.source, flags=re.M
    ).rstrip()
    return shorter


def with_lead_ins(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield blocks of Markdown of which none ends with words that announce the next,
    which may be on another slide.
    """
    waiting: Block | None = None
    for block in blocks:
        apart = block.start or "picture" in block.cell.metadata
        if (
            waiting is not None
            and not apart
            and waiting.height + block.height <= HEIGHT
        ):
            source = f"{waiting.cell.source}\n\n{block.cell.source}"
            block = Block(
                markdown_cell(source), waiting.height + block.height, waiting.start
            )
        elif waiting is not None:
            yield waiting
        leads = block.cell.source.endswith(":") or re.search(
            r"^(#+ .*|\*\*[^*]+\*\*)\Z", block.cell.source, re.M
        )
        waiting = block if leads else None
        if waiting is None:
            yield block
    if waiting is not None:
        yield waiting


def blocks_of(
    cell: NotebookNode, kind: str, largest: int = CODE_SIZES[0]
) -> list[Block]:
    """Return the blocks of a cell, the first of which begins as its slide type ``kind``
    says.

    Args:
        cell: what is to be shown.
        kind: its slide type.
        largest: font size of code, in pixels.
    """
    blocks = list(
        code_blocks(cell, largest)
        if cell.cell_type == "code"
        else with_lead_ins(markdown_blocks(cell.source))
    )
    if blocks and kind != "-":
        # A heading inside of a fragment opens a slide all the same.
        heading = blocks[0].start and kind == "fragment"
        blocks[0] = blocks[0]._replace(start=blocks[0].start if heading else kind)
    return blocks


def slides_of(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook for nbconvert, in which each slide and subslide fits on the
    screen.
    """
    cells: list[NotebookNode] = []
    used, first, previous = 0.0, 0, None
    for cell, following in zip(
        notebook.cells, [*notebook.cells[1:], None], strict=True
    ):
        kind = cell.metadata.get("slideshow", {}).get("slide_type") or slide_type(
            cell, previous
        )
        previous = cell
        if kind == "skip":
            continue
        if kind == "notes":
            text = (
                cell.source
                if cell.cell_type == "markdown"
                else f"```python\n{cell.source}\n```"
            )
            cells.append(note_cell(text))
            continue
        if following is not None and "interactive" in following.metadata.get(
            "tags", []
        ):
            cell = without_last_lead_in(cell)
        revealing = False
        blocks, goes_on = introduced(cells[first:], used, cell, kind)
        for block in blocks:
            opens = block.start == "slide" or (
                block.start == "subslide" and not (goes_on and block is blocks[0])
            )
            if opens or used + block.height > HEIGHT:
                start = block.start if opens else "subslide"
                grow_picture(cells[first:], HEIGHT - used)
                used, first, revealing = 0.0, len(cells), False
            else:
                start = "fragment" if block.start == "fragment" else "-"
            used += block.height
            revealing = start == "fragment" or (revealing and start == "-")
            join = (
                start == "-"
                and cells
                and cells[-1].cell_type == block.cell.cell_type == "markdown"
            )
            pictures = any(
                "picture" in part.metadata for part in (block.cell, *cells[-1:])
            )
            if (
                join
                and not pictures
                and cells[-1].metadata.slideshow.slide_type != "notes"
            ):
                cells[-1].source += (
                    separator(cells[-1].source, block.cell.source) + block.cell.source
                )
            else:
                block.cell.metadata["slideshow"] = {"slide_type": start}
                cells.append(block.cell)
        if (
            cell.cell_type == "markdown"
            and (whole := without_pictures(cell.source)) not in cells[-1].source
        ):
            cells.append(note_cell(whole))
    grow_picture(cells[first:], HEIGHT - used)
    return nbformat.v4.new_notebook(cells=with_links(cells), metadata=notebook.metadata)


def introduced(
    slide: list[NotebookNode], used: float, cell: NotebookNode, kind: str
) -> tuple[list[Block], bool]:
    """Return a cell's blocks, and whether they stand on the slide before, which says
    little by itself.

    Args:
        slide: what is on the slide so far.
        used: how many pixels it takes.
        cell: what comes next.
        kind: its slide type.
    """
    blocks = blocks_of(cell, kind)
    shown = [part for part in slide if part.metadata.slideshow.slide_type != "notes"]
    words = "\n".join(part.source for part in shown)
    if not words or any(
        part.cell_type == "code" or "picture" in part.metadata for part in shown
    ):
        return blocks, False
    heading_alone = words.startswith("#") and "\n" not in words
    # What was asked to be predicted isn't shown yet.
    if cell.cell_type == "code" and used <= INTRODUCTION and "**Predict" not in words:
        for largest in CODE_SIZES[:-1]:
            smaller = blocks_of(cell, kind, largest)
            if used + sum(block.height for block in smaller) <= HEIGHT:
                return smaller, True
    return blocks, heading_alone


def grow_picture(slide: list[NotebookNode], room: float) -> None:
    """Give the pictures of a slide the room that is left: the larger, the farther they
    are read from.
    """
    drawn = [cell for cell in slide if "picture" in cell.metadata]
    for cell in drawn:
        picture = cell.metadata.picture
        picture.height = math.floor(
            min(picture.height + max(0, room) / len(drawn), picture.most)
        )
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(
                "<img ", f'<img style="height: {picture.height}px" '
            )


def separator(above: str, below: str) -> str:
    """Return what stands between two blocks of Markdown: the points of a list stay one
    list.
    """
    last = above.rsplit("\n", 1)[-1]
    both = all(re.match(r"([-*]|\d+\.) ", text) for text in (last, below))
    return "\n" if both else "\n\n"


def with_links(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Return the cells with links to notebooks that lead to their slides; other files'
    names stay without a link.
    """
    for cell in cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.html)", cell.source)
            text = text.replace("](../README.md)", "](index.html)").replace(
                "](../figures/", "](figures/"
            )
            kept = r"(?<!!)\[([^]]*)\]\((?![a-z]+:|#|index\.html|\d\d_\w+\.html|figures/)[^)]*\)"
            cell.source = re.sub(kept, r"\1", text)
    return cells


def title_of(notebook: NotebookNode) -> str:
    """Return a notebook's title as plain text."""
    return shown_text(notebook.cells[0].source.splitlines()[0].removeprefix("# "))


def contents(titles: dict[str, str]) -> str:
    """Return the page from which the slides of all notebooks are opened."""
    points = "\n".join(
        f'<li><a href="{name}">{html.escape(title)}</a></li>'
        for name, title in titles.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoRA and DoRA from scratch: slides</title>
<link rel="stylesheet" href="contents.css">
</head>
<body>
<main>
<h1>LoRA and DoRA from scratch: slides</h1>
<ul>
{points}
</ul>
<p>Space or → goes on, ← goes back, Esc shows all slides, F fills the screen, S opens the notes with the whole text.
Add <code>?print-pdf</code> to an address to print its slides.</p>
</main>
</body>
</html>
"""


def build(output: Path, notebooks: Path = ROOT / "notebooks") -> list[Path]:
    """Build the slides of all notebooks.

    Args:
        output: the folder that is served afterwards.
        notebooks: the folder with the notebooks.

    Returns:
        The page of each notebook.

    Raises:
        MissingPackages: reveal.js or MathJax can't be had.
    """
    packages = install_packages()
    output.mkdir(parents=True, exist_ok=True)
    copy_mathjax(packages, output / "mathjax")
    for name in REVEAL:
        source, target = packages / "reveal.js" / name, output / "reveal" / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for style in (DOCS / "slides").glob("*.css"):
        shutil.copy2(style, output)
    (output / "figures").mkdir(exist_ok=True)
    for figure in (ROOT / "figures").glob("*.svg"):
        shutil.copy2(figure, output / "figures")
    options = {
        "template_name": "slides",
        "extra_template_basedirs": [str(DOCS)],
        "exclude_anchor_links": True,
        "exclude_input_prompt": True,
        "exclude_output_prompt": True,
        "reveal_url_prefix": "reveal",
        "reveal_theme": "white",
    }
    exporter = SlidesExporter(config=Config({"SlidesExporter": options}))
    titles = {}
    for path in sorted(notebooks.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        titles[f"{path.stem}.html"] = title_of(notebook)
        slides = slides_of(notebook)
        slides.metadata["title"] = title_of(notebook)
        text, _ = exporter.from_notebook_node(slides)
        (output / f"{path.stem}.html").write_text(text, encoding="utf-8")
    (output / "index.html").write_text(contents(titles), encoding="utf-8")
    return [output / name for name in titles]


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=BUILD / "slides", help="default: build/slides"
    )
    output = parser.parse_args().output
    try:
        build(output)
    except MissingPackages as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The slides are in {output}; open {output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
