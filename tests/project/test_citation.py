"""CITATION.cff names this version, and the works that the series builds on."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from lowrank_utils import __version__

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
# On the page of sources as further reading.
NOT_CITED = {"https://arxiv.org/abs/2312.03732"}


def test_it_has_the_form_of_the_citation_file_format():
    command = [sys.executable, "-m", "check_jsonschema", "CITATION.cff"]
    schema = "--builtin-schema=vendor.citation-file-format"
    done = subprocess.run([*command, schema], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_names_this_version_and_who_the_licence_names():
    assert str(CITATION["version"]) == __version__
    (author,) = CITATION["authors"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith(CITATION["license"])
    assert f"(c) 2026 {author['name']}\n" in licence


def test_it_names_the_papers_of_the_page_of_sources():
    sources = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    papers = set(re.findall(r"https://arxiv\.org/abs/[\d.]+", sources))
    cited = {reference.get("url", "") for reference in CITATION["references"]}
    assert papers - cited == NOT_CITED
    assert {link for link in cited if "arxiv" in link} <= papers
    assert "https://sebastianraschka.com/blog/2024/lora-dora.html" in cited
