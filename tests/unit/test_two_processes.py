"""Two processes at one folder: whoever reads gets one whole adapter or one whole data
set, never a mixture."""

import contextlib
import json
import subprocess
import sys
import threading

import pytest
from jupyter_client.manager import run_kernel
from mirror import TINY, contents, serving
from support import linear_layer
from torch import nn
from torchvision.datasets import MNIST

from lowrank_utils import _mnist
from lowrank_utils.adapters.files import load_adapter
from lowrank_utils.comparison.kernels import kernel_environment

pytestmark = pytest.mark.slow

# Saves again and again an adapter whose scaling, in one file, and numbers, in the
# other, are the same number.
SAVER = """
import sys
from pathlib import Path

import torch
from torch import nn

from lowrank_utils.adapters import folders as _folders
from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters.files import save_adapter
from lowrank_utils.lora import LinearWithLoRA

folder, number, way = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if way == "two renames":
    _folders._exchange = lambda first, second: False
model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
replace_linear_layers(model, LinearWithLoRA, 2, number)
freeze_linear_layers(model)
model[0].lora.A.data.fill_(number)
model[0].lora.B.data.fill_(number)
print("ready", flush=True)
sys.stdin.readline()
saved = 0
for _ in range(60):
    try:
        save_adapter(model, folder)
        saved += 1
    except OSError:
        # Where folders can't be exchanged in one step, a saver may be told that the
        # other was faster.
        if way == "exchange":
            raise
print(saved)
"""


linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only Linux exchanges two folders in one step",
)


@pytest.mark.parametrize(
    "way", [pytest.param("exchange", marks=linux_only), "two renames"]
)
def test_two_processes_save_to_one_folder_and_a_third_reads_one_whole_adapter(
    tmp_path, way
):
    folder = tmp_path / "adapter"
    command = [sys.executable, "-c", SAVER, str(folder)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    pipes["text"] = True
    with (
        subprocess.Popen([*command, "1", way], **pipes) as first,
        subprocess.Popen([*command, "2", way], **pipes) as second,
    ):
        for saver in (first, second):
            assert saver.stdout.readline() == "ready\n", saver.stderr.read()
        for saver in (first, second):
            saver.stdin.write("go\n")
            saver.stdin.flush()
        seen = []
        while first.poll() is None or second.poll() is None:
            if folder.exists() or seen:
                model = nn.Sequential(linear_layer(7, 5))
                load_adapter(model, folder)
                seen.append(model[0].lora.alpha)
                assert model[0].lora.A.eq(seen[-1]).all()
        saved = []
        for saver in (first, second):
            output, errors = saver.communicate(timeout=60)
            assert saver.returncode == 0, errors
            saved.append(int(output))
    assert set(seen) == {1.0, 2.0}, "the savers must have been at work at the same time"
    assert min(saved) > 0
    if way == "exchange":
        assert saved == [60, 60]
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


LOADER = """
import hashlib
import json
import os

from torchvision.datasets import MNIST
from lowrank_utils import _mnist, data

given = json.loads({given!r})
_mnist.MNIST_FILES = given["digests"]
_mnist.user_cache_path = lambda *_: _mnist.Path(given["cache"])
MNIST.resources = [tuple(pair) for pair in given["resources"]]
MNIST.mirrors = [given["mirror"]]
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
os.environ.pop("LOWRANK_DATA_DIR", None)
splits = data.load_mnist("mnist", validation=10)
digest = hashlib.sha256(b"".join(part.images.numpy().tobytes() for part in splits)).hexdigest()
"""


def reply_to(kernel, question):
    """Wait for the answer to one message; what the kernel says about itself may come
    before."""
    message = {"parent_header": {}}
    while message["parent_header"].get("msg_id") != question:
        message = kernel.get_shell_msg(timeout=120)
    return message["content"]


def test_two_kernels_download_into_one_cache_at_once(
    tmp_path, tiny_is_published, monkeypatch
):
    cache = tmp_path / "cache"
    with serving(tiny_is_published, monkeypatch) as server:
        # Neither gets its last file before both have asked for it.
        server.meeting = threading.Barrier(2)
        given = {
            "digests": _mnist.MNIST_FILES,
            "cache": str(cache),
            "resources": MNIST.resources,
            "mirror": MNIST.mirrors[0],
        }
        code = LOADER.format(given=json.dumps(given))
        options = {"env": kernel_environment(), "startup_timeout": 120}
        with contextlib.ExitStack() as stack:
            kernels = [
                stack.enter_context(run_kernel(kernel_name="python3", **options))
                for _ in range(2)
            ]
            wanted = {"user_expressions": {"digest": "digest"}}
            asked = [kernel.execute(code, **wanted) for kernel in kernels]
            replies = [reply_to(*pair) for pair in zip(kernels, asked, strict=True)]
        assert not server.meeting.broken
    assert [reply["status"] for reply in replies] == ["ok", "ok"], replies
    first, second = (reply["user_expressions"]["digest"] for reply in replies)
    assert first["data"]["text/plain"] == second["data"]["text/plain"]
    assert contents(cache) == sorted(
        ["MNIST", "MNIST/raw", *(f"MNIST/raw/{n}" for n in [*TINY, *tiny_is_published])]
    )
