"""Build the talk from docs/talk.md, and a handout from each notebook.

    python tools/build_slides.py                 into build/slides, with index.html to start from
    python tools/build_slides.py --output FOLDER

The talk is reveal.js with what docs/talk.md says; that file's first lines say how it is
written. A handout is nbconvert's own page, with nothing left out. No page loads
anything from another host.
"""

import argparse
import base64
import html
import io
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbconvert.exporters import HTMLExporter
from PIL import Image
from traitlets.config import Config
from web_packages import (
    BUILD,
    DOCS,
    ROOT,
    MissingPackages,
    copy_mathjax,
    install_packages,
)

# The parts of reveal.js that the talk loads. Its other themes ask another host for
# their fonts.
REVEAL = (
    "dist/reveal.css",
    "dist/reveal.js",
    "dist/theme/white.css",
    "dist/theme/fonts/source-sans-pro",
    "plugin/notes",
)
TITLE = "LoRA and DoRA from scratch"


def plot(notebook: Path, words: str) -> tuple[bytes, str]:
    """Return the plot of a notebook whose description begins with ``words``, and the
    whole description.
    """
    for cell in nbformat.read(notebook, as_version=4).cells:
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        for output in cell.get("outputs", []):
            if alt.startswith(words) and "image/png" in output.get("data", {}):
                return base64.b64decode(output.data["image/png"]), alt
    raise ValueError(f"{notebook.name} has no plot that is described by {words!r}")


def stacked(image: Image.Image) -> Image.Image:
    """Return a picture with its right half below its left one."""
    width, height = image.width // 2, image.height
    both = Image.new("RGB", (width, 2 * height), "white")
    for place in (0, 1):
        half = image.crop((place * width, 0, (place + 1) * width, height))
        both.paste(half, (0, place * height))
    return both


def picture(source: Path, words: str, options: str, folder: Path) -> str:
    """Put a picture into ``folder``, and return it as HTML.

    Args:
        source: a drawing, a plot, or the notebook that has the plot.
        words: what it shows, as docs/talk.md says it.
        options: which part of it is shown, where it is cut into steps, and whether its
            halves are stacked.
        folder: the talk's pictures.
    """
    part = re.search(r"part (\d+) (\d+) (\d+) (\d+)", options)
    shares = [int(share) / 100 for share in part.groups()] if part else [0, 0, 1, 1]
    if source.suffix == ".svg":
        svg = source.read_text(encoding="utf-8")
        size = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        box = [share * n for share, n in zip(shares, [*size] * 2, strict=True)]
        width, height = box[2] - box[0], box[3] - box[1]
        view = f"{box[0]},{box[1]},{width},{height}"
        address = f"figures/{source.name}#svgView(viewBox({view}))"
    else:
        data = source.read_bytes()
        if source.suffix == ".ipynb":
            data, words = plot(source, words)
        image = Image.open(io.BytesIO(data))
        box = [share * n for share, n in zip(shares, image.size * 2, strict=True)]
        image = image.crop([round(n) for n in box])
        if "stacked" in options:
            image = stacked(image)
        width, height = image.size
        address = f"pictures/{len(list(folder.iterdir()))}-{source.stem}.png"
        image.save(folder.parent / address)
    steps = re.search(r"(left|top)((?: \d+)+)", options)
    cuts = [0, *map(int, steps[2].split() if steps else ()), 100]
    below = re.search(r"below (\d+)", options)
    top = int(below[1]) if below else 0
    layers = ""
    for place, (start, end) in enumerate(pairwise(cuts)):
        shape = f"inset({top}% {100 - end}% 0 {start}%)"
        if steps and steps[1] == "top":
            shape = f"inset({start}% 0 {100 - end}% 0)"
        elif top and not place:
            # What stands above all steps comes with the first.
            corners = f"0 0, 100% 0, 100% {top}%, {end}% {top}%, {end}% 100%, 0 100%"
            shape = f"polygon({corners})"
        layers += (
            f'<img src="{address}" alt="{"" if place else html.escape(words)}"'
            f' class="{"fragment" if place else ""}" style="--ratio: {width / height:.4f};'
            f' clip-path: {shape}">'
        )
    return f'<span class="picture">{layers}</span>'


def bars(text: str) -> str:
    """Return a bar for each line "name number unit". Percents are parts of a hundred;
    a line that begins with + comes in a step of its own.
    """
    found = re.findall(r"^(\+ )?(.+) ([\d.]+)( [^\d\n]+)?$", text, flags=re.M)
    if len(found) != len(text.splitlines()):
        raise ValueError(f'a line of bars is no "name number unit":\n{text}')
    largest = max(float(number) for _, _, number, _ in found)
    rows = ""
    for step, name, number, unit in found:
        share = float(number) / (1 if unit == " %" else largest / 100)
        rows += (
            f'<div class="bar {"fragment" if step else ""}" data-name="{html.escape(name)}">'
            f'<span>{html.escape(name)}</span><span><i style="width: {share:.1f}%"></i>'
            f"<b>{number}{unit}</b></span></div>"
        )
    return f'<div class="bars">{rows}</div>'


def boxes(text: str) -> str:
    """Return a table with a row for each line, its cells parted by "|"; a line that
    begins with + comes in a step of its own.
    """
    rows = ""
    for step, line in re.findall(r"^(\+ )?(.+)$", text, flags=re.M):
        cells = "".join(
            f"<td>{html.escape(cell.strip())}</td>" for cell in line.split("|")
        )
        rows += f'<tr class="{"fragment" if step else ""}">{cells}</tr>'
    return f'<table class="boxes">{rows}</table>'


def markdown(pictures: Path) -> MarkdownIt:
    """Return what renders the talk's Markdown, and puts its pictures into a folder."""
    renderer = MarkdownIt("commonmark")
    code = renderer.renderer.rules["fence"]
    kinds = {"bars": bars, "boxes": boxes}

    def fence(_, tokens, place, options, env):
        kind = kinds.get(tokens[place].info)
        return (
            kind(tokens[place].content) if kind else code(tokens, place, options, env)
        )

    def image(_, tokens, place, *__):
        token = tokens[place]
        source = (DOCS / token.attrs["src"]).resolve()
        return picture(source, token.content, token.attrs.get("title", ""), pictures)

    renderer.add_render_rule("fence", fence)
    renderer.add_render_rule("image", image)
    return renderer


def slides_of(text: str) -> list[tuple[str, str]]:
    """Return the slides of a talk, each with its notes."""
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S)
    parts = (re.split(r"^Notes ", slide, flags=re.M) for slide in text.split("\n---\n"))
    return [(slide.strip(), notes.strip()) for slide, notes in parts]


def talk(text: str, output: Path) -> str:
    """Return the page of the talk, and put its pictures into ``output``."""
    shutil.rmtree(output / "pictures", ignore_errors=True)
    (output / "pictures").mkdir()
    renderer, sections = markdown(output / "pictures"), ""
    for slide, notes in slides_of(text):
        first, *steps = map(renderer.render, slide.split("\n. . .\n"))
        shown = first + "".join(f'<div class="fragment step">{s}</div>' for s in steps)
        kind = "title" if slide.startswith("# ") else ""
        aside = f'<aside class="notes">{renderer.render(notes)}</aside>'
        sections += f'<section class="{kind}">{shown}{aside}</section>\n'
    page = (DOCS / "slides" / "talk.html").read_text(encoding="utf-8")
    return page.replace("SLIDES", sections)


def handout(exporter: HTMLExporter, notebook: nbformat.NotebookNode, title: str) -> str:
    """Return a notebook as a page. Links to notebooks lead to their handouts; other
    files' names stay without a link.
    """
    notebook.metadata["title"] = title
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = cell.source.replace("](../README.md)", "](index.html)")
            text = text.replace("](../figures/", "](figures/")
            text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.html)", text)
            kept = r"[a-z]+:|#|index\.html|talk\.html|\d\d_\w+\.html"
            cell.source = re.sub(rf"(?<!!)\[([^]]*)\]\((?!{kept})[^)]*\)", r"\1", text)
    return exporter.from_notebook_node(notebook)[0]


def build(output: Path) -> None:
    """Build the talk and the handouts into a folder.

    Raises:
        MissingPackages: reveal.js or MathJax can't be had.
    """
    packages = install_packages()
    output.mkdir(parents=True, exist_ok=True)
    copy_mathjax(packages, output / "mathjax")
    for name in REVEAL:
        source, target = packages / "reveal.js" / name, output / "reveal" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target, **({"dirs_exist_ok": True} if source.is_dir() else {}))
    shutil.copy2(DOCS / "slides" / "talk.css", output)
    (output / "figures").mkdir(exist_ok=True)
    for figure in (ROOT / "figures").glob("*.svg"):
        shutil.copy2(figure, output / "figures")
    text = (DOCS / "talk.md").read_text(encoding="utf-8")
    (output / "talk.html").write_text(talk(text, output), encoding="utf-8")
    options = {
        "template_name": "slides",
        "extra_template_basedirs": [str(DOCS)],
        "exclude_anchor_links": True,
    }
    exporter = HTMLExporter(config=Config({"HTMLExporter": options}))
    points = ["- [The talk, 45 minutes](talk.html)"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        points.append(f"- [{title}]({path.stem}.html)")
        page = handout(exporter, notebook, title)
        (output / f"{path.stem}.html").write_text(page, encoding="utf-8")
    start = f"# {TITLE}: the talk and the handouts\n\n" + "\n".join(points)
    cells = [nbformat.v4.new_markdown_cell(start)]
    page = handout(exporter, nbformat.v4.new_notebook(cells=cells), TITLE)
    (output / "index.html").write_text(page, encoding="utf-8")


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
    print(f"The talk and the handouts are in {output}; open {output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
