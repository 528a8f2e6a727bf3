"""What the site and the slides are made from: links that lead to pages, sentences that
stay whole, locked packages."""

import json

import build_site
import build_slides
import nbformat
import pytest
import web_packages


@pytest.mark.parametrize(
    ("place", "link", "expected"),
    [
        ("README.md", "notebooks/01_a.ipynb", "notebooks/01_a.ipynb"),
        ("README.md", "lowrank_utils/lora.py", "api/lora.md"),
        ("notebooks/01_a.ipynb", "../README.md", "../index.md"),
        ("notebooks/01_a.ipynb", "02_b.ipynb", "../notebooks/02_b.ipynb"),
        ("docs/teaching.md", "../lowrank_utils/lora.py", "../api/lora.md"),
        ("docs/teaching.md", "../README.md#data", "../index.md#data"),
        ("README.md", "https://example.org/README.md", "https://example.org/README.md"),
        ("README.md", "#results", "#results"),
    ],
)
def test_links_lead_to_pages(place, link, expected):
    assert (
        build_site.with_links_to_pages(f"See [it]({link}).", place)
        == f"See [it]({expected})."
    )


def test_the_results_and_the_experiment_are_in_the_navigation(tmp_path):
    start = build_site.pages()["index.md"]
    build_site.assemble(tmp_path)
    for name in (
        "docs/results",
        "notebooks/comparison",
        "notebooks/results/comparison",
    ):
        assert f"\n{name}\n" in start or f"<{name}>" in start
        assert list(tmp_path.glob(f"{name}.*"))
    assert "| full fine-tuning |" not in start


def test_each_document_of_the_project_is_in_the_navigation(tmp_path):
    start = build_site.pages()["index.md"]
    documents = [name for names in build_site.DOCUMENTS.values() for name in names]
    assert "docs/teaching.md" in documents
    build_site.assemble(tmp_path)
    for name in documents:
        assert f"\n{name.removesuffix('.md')}\n" in start
        assert (tmp_path / name).is_file()


def test_what_an_earlier_build_left_is_removed(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "09_gone.ipynb").write_text("{}", encoding="utf-8")
    build_site.assemble(tmp_path)
    assert not (tmp_path / "notebooks" / "09_gone.ipynb").exists()
    assert (tmp_path / "notebooks" / "05_dora.ipynb").is_file()


def test_long_lines_of_code_are_broken_at_spaces_and_stay_what_they_were():
    room = build_slides.characters_of(build_slides.CODE_SIZES[-1])
    call = "    print(" + ", ".join(f"argument_{place}" for place in range(12)) + ")"
    lines = build_slides.wrapped(call).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("            argument_")
    assert [line for line in lines if len(line) > room] == []
    assert " ".join(map(str.strip, lines)) == call.strip()
    assert build_slides.wrapped("short = 1  # a remark") == "short = 1  # a remark"
    remark = "a remark that stands behind a line of code and makes it longer than a slide is wide, so it goes above"
    assert (
        build_slides.wrapped(f"    short = 1  # {remark}")
        == f"    # {remark}\n    short = 1"
    )
    first, second = build_slides.wrapped(
        f"  # {remark}, and on to a second line"
    ).splitlines()
    assert (first[:4], second[:4]) == ("  # ", "  # ")


def test_a_slider_that_slides_do_not_have_is_not_announced():
    cell = build_slides.markdown_cell(
        "It is an arrow (a short one). Try it with two sliders, one for each part:"
    )
    assert (
        build_slides.without_last_lead_in(cell).source
        == "It is an arrow (a short one)."
    )
    assert cell.source.endswith("part:"), "the notebook's own cell stays"


def test_what_is_to_be_predicted_is_not_on_the_slide_that_asks():
    code = build_slides.nbformat.v4.new_code_cell("print(1)")

    def goes_on(words):
        above = build_slides.markdown_cell(words)
        above.metadata["slideshow"] = {"slide_type": "slide"}
        return build_slides.introduced([above], 100, code, "subslide")[1]

    assert goes_on("Count them.")
    assert not goes_on("**Predict.** How many are there?")


def test_a_long_output_is_cut_where_a_line_is_empty():
    text = "\n".join(["first"] * 20) + "\n\n" + "\n".join(["second"] * 20)
    parts = build_slides.parts_of(text)
    assert [set(part.split()) for part in parts] == [{"first"}, {"second"}]
    assert build_slides.parts_of("a\n\nb") == ["a\n\nb"]


def test_a_heading_within_a_cell_opens_a_slide():
    cell = nbformat.v4.new_markdown_cell(
        "Words.\n\n## Section\n\nMore.\n\n**Further reading**\n- A paper"
    )
    starts = [
        (block.cell.source, block.start)
        for block in build_slides.blocks_of(cell, "fragment")
    ]
    assert starts == [("Words.", "fragment"), ("## Section\n\nMore.", "slide")]


def test_the_lock_holds_exact_versions_with_digests_and_no_host():
    wanted = json.loads(
        (web_packages.DOCS / "package.json").read_text(encoding="utf-8")
    )
    lock = json.loads(
        (web_packages.DOCS / "package-lock.json").read_text(encoding="utf-8")
    )["packages"]
    for name, version in {
        **wanted["dependencies"],
        **wanted["devDependencies"],
    }.items():
        entry = lock[f"node_modules/{name}"]
        assert entry["version"] == version
        assert entry["integrity"].startswith("sha512-")
    # npm takes the registry that the machine is set to; the digests decide.
    assert not [name for name, entry in lock.items() if "resolved" in entry]


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(web_packages, "BUILD", tmp_path)
    monkeypatch.setattr(web_packages.shutil, "which", lambda _: None)
    with pytest.raises(
        web_packages.MissingPackages, match=r"npm is missing.*install Node\.js 18"
    ):
        web_packages.install_packages()


def test_a_fetch_that_failed_is_reported_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(web_packages, "BUILD", tmp_path)
    monkeypatch.setattr(web_packages.shutil, "which", lambda _: "npm")
    calls = []

    def run(command, **settings):
        calls.append(settings["cwd"])
        return web_packages.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(web_packages.subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(web_packages.MissingPackages, match="status 1"):
            web_packages.install_packages()
    assert calls == [tmp_path / "npm"] * 2
