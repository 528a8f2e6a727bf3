"""A tiny data set in MNIST's format, and a server on this machine that it can be
downloaded from."""

import gzip
import hashlib
import http.server
import struct
import threading
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from lowrank_utils import _mnist
from lowrank_utils.data import DataError, load_mnist


def idx_images(count, seed):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (count, 28, 28), dtype=np.uint8
    )
    return struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()


def idx_labels(count):
    return struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))


TINY = {
    "train-images-idx3-ubyte": idx_images(40, seed=1),
    "train-labels-idx1-ubyte": idx_labels(40),
    "t10k-images-idx3-ubyte": idx_images(20, seed=2),
    "t10k-labels-idx1-ubyte": idx_labels(20),
}


def publish(monkeypatch):
    """Let the tiny files be the published ones for the package and torchvision; return
    them as downloaded."""
    digests = {
        name: hashlib.sha256(content).hexdigest() for name, content in TINY.items()
    }
    monkeypatch.setattr(_mnist, "MNIST_FILES", digests)
    archives = {
        f"{name}.gz": gzip.compress(content, mtime=0) for name, content in TINY.items()
    }
    resources = [
        (name, hashlib.md5(content).hexdigest()) for name, content in archives.items()
    ]
    monkeypatch.setattr(MNIST, "resources", resources)
    return archives


def sizes(splits):
    return [len(part.labels) for part in splits]


def load_tiny(**options):
    return load_mnist("mnist", validation=10, **options)


def assert_tiny(splits):
    assert sizes(splits) == [30, 10, 20]
    pixels = np.frombuffer(TINY["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(
        20, 784
    )
    assert torch.equal(
        (splits.test.images * 255).round().to(torch.uint8),
        torch.from_numpy(pixels.copy()),
    )
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]


def message_of(call=load_tiny):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    # One line and no chain of causes: that is all that a learner sees.
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "'mnist-5k'" in message
    return message


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Server(http.server.ThreadingHTTPServer):
    """Serves ``archives``, or misbehaves as ``fault`` says from the second file on."""

    daemon_threads = True

    def __init__(self, archives, fault):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archives, self.fault = archives, fault
        self.requested = []
        self.meeting = None
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        """Stay quiet: broken connections are what these tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        self.server.requested.append(name)
        if self.server.meeting is not None and name.startswith("t10k-labels"):
            self.server.meeting.wait(timeout=30)
        fault = self.server.fault if not name.startswith("train-images") else None
        content = self.server.archives[name]
        if fault == "refused":
            self.send_error(403, "Forbidden")
            return
        if fault == "garbage":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
            return
        if fault == "hangs up":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "closes early":
            content = content[: len(content) // 2]
        if fault == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "stalls":
            self.wfile.write(content[: len(content) // 2])
            self.server.released.wait(timeout=30)
            return
        if fault == "slow":
            for place in range(0, len(content), len(content) // 4 + 1):
                self.server.released.wait(timeout=0.05)
                self.wfile.write(content[place : place + len(content) // 4 + 1])
            return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving(archives, monkeypatch, fault=None):
    with Server(archives, fault) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        try:
            reach(server.server_address[1], monkeypatch)
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def reach(port, monkeypatch):
    """Let torchvision download from this port, whatever proxy the machine has."""
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/mnist/"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)
