"""The drawings are what their scripts draw, byte for byte, and can be read by whoever
can't see them."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FIGURES = Path(__file__).resolve().parents[2] / "figures"
sys.path.insert(0, str(FIGURES))

from alt_texts import ALT_TEXTS  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    """The drawings, drawn again from a copy of the scripts, in another folder and
    locale."""
    copy = tmp_path_factory.mktemp("figures") / "drawn anew"
    copy.mkdir()
    for script in FIGURES.glob("*.py"):
        (copy / script.name).write_bytes(script.read_bytes())
    subprocess.run(
        [sys.executable, copy / "draw_all.py"],
        check=True,
        cwd=copy.parent,
        env={"LC_ALL": "C", "HOME": str(copy)},
    )
    return copy


@pytest.mark.parametrize("name", ALT_TEXTS)
def test_a_drawing_is_what_its_script_draws(name, redrawn):
    assert (FIGURES / f"{name}.py").is_file()
    assert (redrawn / f"{name}.svg").read_bytes() == (
        FIGURES / f"{name}.svg"
    ).read_bytes()


def test_every_drawing_has_a_text_and_a_script():
    assert {path.stem for path in FIGURES.glob("*.svg")} == set(ALT_TEXTS)
    assert len(ALT_TEXTS) == 10


@pytest.mark.parametrize("name", ALT_TEXTS)
def test_a_drawing_says_what_it_shows(name):
    root = ElementTree.parse(FIGURES / f"{name}.svg").getroot()
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text == ALT_TEXTS[name].title
    assert " ".join(root.find(f"{SVG}desc").text.split()) == ALT_TEXTS[name].text
    assert len(ALT_TEXTS[name].text) > 60
