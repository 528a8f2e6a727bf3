"""A real browser: the fixtures of pytest-playwright (``page``, ``new_context``, …) with
the system's Chromium.

Nothing but this machine can be reached, and a page that tries to is a failure.
"""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]

# Milliseconds for whatever is waited for, which a slow machine with other work may take
# long to do.
PATIENCE = 180_000

# The first has the same engine and no window to draw, which saves a part of the
# processor's time.
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Without them the browser itself asks its maker's servers now and then.
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

LONGEST = ("test_every_notebook.py", "test_site.py")

expect.set_options(timeout=PATIENCE)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put these tests last: from the first of them on, Playwright's event loop holds
    this thread to the end.

    Those that take minutes are the first of them, so that no core waits for one of them
    in the end.
    """

    def place(item):
        here = Path(__file__).parent in item.path.parents
        return here, here and item.path.name not in LONGEST

    items.sort(key=place)


@pytest.fixture(scope="session")
def base_url():
    """No address to begin with. The plugin's own fixture is a method, of which pytest
    warns."""
    return


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args, playwright):
    """As the plugin's, with the system's Chromium, or else with the one that Playwright
    installs."""
    program = next(
        filter(None, map(shutil.which, PROGRAMS)), playwright.chromium.executable_path
    )
    if not Path(program).exists():
        pytest.skip(
            "there is no Chromium. On Debian and Ubuntu: sudo apt install chromium. "
            "Elsewhere: .venv/bin/python -m playwright install chromium"
        )
    return {**browser_type_launch_args, "executable_path": program, "args": [*FLAGS]}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args):
    """As the plugin's, for the smallest screen that a learner's laptop is likely to
    have."""
    return {
        **browser_context_args,
        "viewport": {"width": 1280, "height": 800},
        "reduced_motion": "reduce",
    }


@pytest.fixture
def requests_elsewhere():
    """The addresses beyond this machine that pages ask for; the test fails if any is
    left at its end."""
    addresses = []
    yield addresses
    assert not addresses, "a page asked another machine"


@pytest.fixture
def new_context(new_context, requests_elsewhere):
    """As the plugin's; requests that would leave this machine go nowhere and are
    recorded."""

    def record(asked):
        # Pictures in the page itself (data:, blob:) have no host.
        if urlsplit(asked.url).hostname not in (None, "127.0.0.1", "localhost", "::1"):
            requests_elsewhere.append(asked.url)

    def create(**settings):
        context = new_context(**settings)
        context.set_default_timeout(PATIENCE)
        context.on("request", record)
        context.on("page", lambda page: page.on("websocket", record))
        return context

    return create


@pytest.fixture
def screenshot(pytestconfig):
    """A function that keeps a picture of a page under a name, where ``--screenshot=on``
    asks for it.

    It goes into the folder that pytest's option ``--output`` names, where failing tests
    also leave theirs. A notebook's page in full takes a second or two, which is why it
    isn't done where nobody looks.
    """
    folder = Path(pytestconfig.getoption("--output"))

    def keep(page, name, **options):
        if pytestconfig.getoption("--screenshot") == "on":
            page.screenshot(path=folder / f"{name}.png", **options)

    return keep


def built(tool, folder):
    """Return the folder of pages that a script in tools/ builds."""
    if shutil.which("npm") is None:
        pytest.skip(
            "npm is missing, which fetches what the pages load. On Debian and Ubuntu: sudo apt install npm. "
            "Elsewhere: https://nodejs.org/"
        )
    command = [sys.executable, ROOT / "tools" / tool, "--output", folder]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built once."""
    return built("build_site.py", tmp_path_factory.mktemp("pages") / "site")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    """The folder of the slides, built once."""
    return built("build_slides.py", tmp_path_factory.mktemp("pages") / "slides")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def serve():
    """A function that serves a folder on this machine, and returns its address."""
    servers = []

    def start(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
