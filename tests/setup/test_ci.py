""".ci/run brings what the tests need where it may, and says what is missing where it
may not."""

import os
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script is for bash")


@pytest.fixture
def run(root, tmp_path):
    """Run .ci/run where only the given programs exist; each notes its call, and apt-get
    brings the packages."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "touch", "chmod", "sleep"):
        (programs / name).symlink_to(shutil.which(name))

    def add(name, body):
        (programs / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n'
        )
        (programs / name).chmod(0o755)

    def start(*present, user=0, packages=()):
        for name in ("python3", *present):
            add(name, "")
        add("id", f"echo {user}")
        # It takes its time, so that tests which didn't wait for it would begin too
        # early.
        brought = " ".join(f"[{name}]=1" for name in packages)
        add(
            "apt-get",
            f'sleep 0.2\ndeclare -A brought=({brought})\n[[ "$1" == update ]] && exit 0\nshift 4\n'
            f'for name in "$@"; do [[ -v "brought[$name]" ]] || exit 100; '
            f'touch "{programs}/$name"; chmod +x "{programs}/$name"; done',
        )
        # Relative to the project, so that no other folder's data is found.
        command = [shutil.which("bash"), str(root / ".ci" / "run")]
        outcome = subprocess.run(
            command,
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )
        calls = (
            (tmp_path / "calls").read_text().splitlines()
            if (tmp_path / "calls").exists()
            else []
        )
        return outcome, [
            call for call in calls if not call.startswith(("id", "python3"))
        ]

    return start


INSTALL = "apt-get install -y -qq --no-install-recommends"


@pytest.mark.parametrize(
    "program",
    ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"],
)
def test_nothing_is_installed_where_all_is_there(run, program):
    outcome, calls = run("make", "npm", program)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert calls == ["make test"]


def test_root_gets_a_browser(run):
    outcome, calls = run(
        "make", "npm", packages=["chromium-headless-shell", "fonts-dejavu-core"]
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert calls == [
        "apt-get update -qq",
        f"{INSTALL} chromium-headless-shell fonts-dejavu-core",
        "make test",
    ]


def test_root_gets_npm(run):
    outcome, calls = run("make", "chromium", packages=["npm"])
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert calls == ["apt-get update -qq", f"{INSTALL} npm", "make test"]


def test_the_tests_run_without_npm_and_it_is_said(run):
    outcome, calls = run("make", "chromium", user=1000)
    assert outcome.returncode == 0
    assert "npm is missing" in outcome.stderr
    assert calls == ["make test"]


@pytest.mark.parametrize(("user", "tries"), [(0, 2), (1000, 0)])
def test_the_tests_run_without_a_browser_and_it_is_said(run, user, tries):
    outcome, calls = run("make", "npm", user=user)
    assert outcome.returncode == 0
    assert "Chromium is missing" in outcome.stderr
    assert len(calls) == tries + 1
    assert calls[-1] == "make test"


def test_without_make_nothing_runs_unless_it_can_be_installed(run):
    outcome, calls = run("chromium", "npm", user=1000)
    assert (outcome.returncode, calls) == (1, [])
    assert "make is missing" in outcome.stderr
    outcome, calls = run("chromium", "npm", packages=["make"])
    assert outcome.returncode == 0
    assert calls == ["apt-get update -qq", f"{INSTALL} make"]
