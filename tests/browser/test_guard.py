"""The browser of the tests reaches this machine only, and what a page asks of others
doesn't go unnoticed."""

import http.server
import threading
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.image
import pytest

PAGE = b"""<!doctype html><title>A page that asks others</title>
<link rel="icon" href="data:,">
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
<img src="http://picture.example/a.png">
<script>
  window.outcomes = Promise.allSettled([fetch("https://192.0.2.1/"), new Promise((resolve) => {
    const socket = new WebSocket("ws://socket.example/");
    socket.onerror = resolve;
  })]);
</script>
"""


class OnePage(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OnePage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_what_a_page_asks_of_other_machines_is_refused_and_recorded(
    page, address, requests_elsewhere
):
    refused = {}
    page.on(
        "requestfailed",
        lambda asked: refused.setdefault(urlsplit(asked.url).hostname, asked.failure),
    )
    page.goto(address)
    first, second = page.evaluate("window.outcomes")
    assert (first["status"], second["status"]) == ("rejected", "fulfilled")
    assert {urlsplit(one).hostname for one in requests_elsewhere} == {
        "picture.example",
        "192.0.2.1",
        "socket.example",
    }
    assert refused == dict.fromkeys(
        ("picture.example", "192.0.2.1"), "net::ERR_NAME_NOT_RESOLVED"
    )
    requests_elsewhere.clear()


def test_a_picture_of_a_page_is_kept_where_it_is_asked_for(
    page, address, screenshot, pytestconfig, requests_elsewhere, monkeypatch
):
    file = Path(pytestconfig.getoption("--output"), "guard.png")
    file.unlink(missing_ok=True)
    page.goto(address)
    monkeypatch.setattr(pytestconfig.option, "screenshot", "only-on-failure")
    screenshot(page, "guard")
    assert not file.exists()
    monkeypatch.setattr(pytestconfig.option, "screenshot", "on")
    screenshot(page, "guard")
    assert matplotlib.image.imread(file).shape[:2] == (800, 1280)
    requests_elsewhere.clear()
