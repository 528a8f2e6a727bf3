"""CITATION.cff has the form of CFF 1.2.0 and names the works that the series builds
on."""

import datetime
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from lowrank_utils import __version__

ROOT = Path(__file__).resolve().parents[2]

TEXT = {"type": "string", "minLength": 1}
WEB = {"type": "string", "pattern": r"^(https|http|ftp|sftp)://.+"}
PERSON = {
    "type": "object",
    "additionalProperties": False,
    "required": ["family-names", "given-names"],
    "properties": {"family-names": TEXT, "given-names": TEXT},
}
ENTITY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {"name": TEXT},
}
AUTHORS = {
    "type": "array",
    "minItems": 1,
    "uniqueItems": True,
    "items": {"oneOf": [PERSON, ENTITY]},
}
PAGE = {"type": ["integer", "string"]}
REFERENCE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["authors", "title", "type"],
    "properties": {
        "type": {
            "enum": [
                "article",
                "blog",
                "data",
                "software",
                "website",
                "book",
                "conference-paper",
                "report",
            ]
        },
        "title": TEXT,
        "authors": AUTHORS,
        "year": {"type": "integer"},
        "url": WEB,
        "doi": {
            "type": "string",
            "pattern": r"^10\.\d{4,9}(\.\d+)?/[A-Za-z0-9:/_;\-\.\(\)\[\]\\]+$",
        },
        "journal": TEXT,
        "volume": PAGE,
        "issue": PAGE,
        "start": PAGE,
        "end": PAGE,
        "notes": TEXT,
        "license-url": WEB,
        "identifiers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "value"],
                "properties": {
                    "type": {"enum": ["doi", "url", "swh", "other"]},
                    "value": TEXT,
                },
            },
        },
    },
}
# The part of CFF 1.2.0 that the file uses: the keys, which of them are required, and
# the form of their values.
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["authors", "cff-version", "message", "title"],
    "properties": {
        "cff-version": {"const": "1.2.0"},
        "message": TEXT,
        "title": TEXT,
        "type": {"enum": ["software", "dataset"]},
        "abstract": TEXT,
        "authors": AUTHORS,
        "version": {"type": ["string", "number"]},
        "license": {"const": "MIT"},
        "keywords": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": TEXT,
        },
        "references": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": REFERENCE,
        },
    },
}


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_has_the_form(citation):
    jsonschema.validate(citation, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"cff-version": "1.1.0"},
        {"authors": []},
        {"authors": [{"family-names": "X"}]},
        {"url": "x"},
        {"title": ""},
    ],
)
def test_another_form_is_noticed(citation, change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**citation, **change}, SCHEMA)


def test_it_names_this_version_and_who_the_licence_names(citation):
    assert str(citation["version"]) == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    assert citation["license"] == project["license"]
    (author,) = citation["authors"]
    assert f"(c) 2026 {author['name']}\n" in (ROOT / "LICENSE").read_text(
        encoding="utf-8"
    )


def test_it_names_what_the_series_builds_on(citation):
    by_link = {
        reference["url"] if "url" in reference else reference["doi"]: reference
        for reference in citation["references"]
    }
    first_authors = {
        link: reference["authors"][0]["family-names"]
        for link, reference in by_link.items()
    }
    assert first_authors == {
        "https://sebastianraschka.com/blog/2024/lora-dora.html": "Raschka",
        "https://arxiv.org/abs/2106.09685": "Hu",
        "https://arxiv.org/abs/2402.09353": "Liu",
        "https://arxiv.org/abs/1602.07868": "Salimans",
        "https://arxiv.org/abs/2402.12354": "Hayou",
        "https://arxiv.org/abs/2210.08823": "Lian",
        "https://arxiv.org/abs/2205.05638": "Liu",
        "https://arxiv.org/abs/2106.10199": "Ben Zaken",
        "https://arxiv.org/abs/2310.11454": "Kopiczko",
        "10.1109/SLT.2014.7078569": "Swietojanski",
        "10.1109/5.726791": "LeCun",
        "http://yann.lecun.com/exdb/mnist/": "LeCun",
    }
    for link, reference in by_link.items():
        assert 1990 < reference["year"] <= datetime.date.today().year
        if "arxiv" in link:
            number = link.rsplit("/", 1)[1]
            assert reference["identifiers"] == [
                {"type": "other", "value": f"arXiv:{number}"}
            ]


def test_the_page_of_sources_names_the_same(citation):
    sources = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    cited = {reference.get("url") for reference in citation["references"]}
    papers = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", sources))
    # The one on rank-stabilised scaling is further reading.
    assert papers - cited == {"https://arxiv.org/abs/2312.03732"}
    assert {link for link in cited if link and "arxiv" in link} <= papers
