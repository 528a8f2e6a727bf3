"""Read built pages as a browser would: their links, what they load, their headings and
pictures."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What makes a browser fetch something while it shows a page; a link is followed by the
# reader.
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "embed": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "link": "href",
}
# Says something about other pages, and fetches nothing.
ONLY_SAID = {
    "next",
    "prev",
    "index",
    "search",
    "canonical",
    "author",
    "copyright",
    "license",
}


class Page(HTMLParser):
    """What the tests ask of a page.

    Attributes:
        ids: all places that a link can lead to.
        links: the targets of its links.
        loaded: the addresses that the browser fetches.
        pictures: (address, alternative text or None).
        headings: the levels of the headings in its article.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self.headings: list[int] = []
        self.in_article = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update(values[key] for key in ("id", "name") if values.get(key))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            source = values.get("src", "")
            self.pictures.append(
                (
                    source[:30] if source.startswith("data:") else source,
                    values.get("alt"),
                )
            )
        address = values.get(LOADED.get(tag, ""))
        if address and not (
            tag == "link" and set((values.get("rel") or "").split()) & ONLY_SAID
        ):
            self.loaded.append(address)
        if tag == "article":
            self.in_article = True
        if re.fullmatch("h[1-6]", tag) and self.in_article:
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag == "article":
            self.in_article = False


def pages_of(folder):
    """Return all pages of a folder by their path."""
    return {
        path: Page(path)
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.parts
    }


def is_elsewhere(address):
    """Tell whether an address names a host."""
    return bool(urlsplit(address).netloc)


def broken_links(pages):
    """Return the links and addresses of files that lead nowhere, each with its page."""
    broken = []
    for path, page in pages.items():
        for address in [
            *page.links,
            *page.loaded,
            *(source for source, _ in page.pictures),
        ]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve() if parts.path else path
            )
            wanted = unquote(parts.fragment)
            found = target.is_file()
            if found and wanted and target in pages:
                found = wanted in pages[target].ids
            if not found:
                broken.append((path.name, address))
    return broken


def loaded_from_elsewhere(folder, pages):
    """Return what the pages and their style sheets would fetch from another host."""
    found = [
        (path.name, address)
        for path, page in pages.items()
        for address in page.loaded
        if is_elsewhere(address)
    ]
    for path in folder.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        fetched = re.findall(
            r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", style
        )
        found += [(path.name, address) for address in fetched]
    return found
