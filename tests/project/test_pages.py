"""What the site is made from: links that lead to pages, and locked packages."""

import json
import re

import build_site
import pytest
import repository
import web_packages
from contents import lessons
from drawings import inline


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


def test_without_an_address_no_link_needs_one():
    assert repository.address({}) == ""
    assert repository.launch_options("") == {}
    assert repository.badges("") == ""


def test_with_an_address_the_site_leads_to_binder_and_the_repository(monkeypatch):
    project = {"urls": {"Repository": "https://github.com/someone/lora-dora/"}}
    found = repository.address(project)
    options = repository.launch_options(found)
    assert options["repository_url"] == found == "https://github.com/someone/lora-dora"
    assert options["launch_buttons"]["binderhub_url"] == "https://mybinder.org"
    first = lessons()[0].path.name
    link = "https://mybinder.org/v2/gh/someone/lora-dora/main?urlpath=lab/tree/"
    assert f"({link}notebooks/{first})" in repository.badges(found)
    monkeypatch.setattr(build_site, "badges", lambda: repository.badges(found))
    assert link in build_site.start_page()


@pytest.mark.parametrize("wrong", ["github.com/a/b", "https://example.org/a/b"])
def test_an_address_whose_links_are_not_known_is_refused(wrong):
    with pytest.raises(ValueError, match="it must be https"):
        repository.address({"urls": {"Repository": wrong}})


def test_every_part_of_the_start_page_is_filled_in():
    text = build_site.start_page()
    assert build_site.MOVING_PICTURE in text
    for name in ("SENTENCE", "FIRST", "MOVING", "BADGES", "CARDS", "FINDINGS"):
        assert not re.search(rf"\b{name}\b", text), name
    assert text.count('class="lesson"') == len(lessons())


@pytest.mark.parametrize("path", sorted((build_site.ROOT / "figures").glob("*.svg")))
def test_each_word_of_a_drawing_is_text(path):
    drawn = inline(path, 'says "so"')
    words = re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))
    assert re.findall(r"<text [^>]*>(.*?)</text>", drawn) == words
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]*)', drawn)
    assert used
    assert set(used) <= set(ids)
    assert 'aria-label="says &quot;so&quot;"' in drawn
