"""One run in a process of its own: a kernel that never answers is started again,
another failure isn't."""

import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from lowrank_utils.comparison import sweep
from lowrank_utils.comparison.grid import code_version

pytestmark = pytest.mark.slow

NOTEBOOK = '{"cells": []}'
NO_ANSWER = "RuntimeError: Kernel didn't respond in 60 seconds"
DIED = "RuntimeError: Kernel died before replying to kernel_info"
OTHER = "ValueError: a loss became infinite"


@pytest.mark.parametrize(
    ("said", "processes", "outcome"),
    [
        # A kernel that never answers is started again.
        ([NO_ANSWER, DIED, ""], 3, ("executed", "{}", "")),
        # After three times it is a failure that says so.
        ([NO_ANSWER] * 4, 3, (NOTEBOOK, None, NO_ANSWER)),
        # Another failure isn't tried again.
        ([OTHER, ""], 1, (NOTEBOOK, None, OTHER)),
    ],
)
def test_only_a_silent_kernel_is_started_again(monkeypatch, said, processes, outcome):
    left = list(said)

    def papermill(command, *, cwd, **_):
        stderr = left.pop(0)
        if not stderr:
            (cwd / "out.ipynb").write_text("executed")
            (cwd / "result.json").write_text("{}")
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    monkeypatch.setattr(sweep.subprocess, "run", papermill)
    version = code_version(NOTEBOOK)
    assert sweep.execute(NOTEBOOK, {"seeds": [1]}, version, threads=1) == outcome
    assert len(said) - len(left) == processes


# A signal that Python takes note of while the main thread is about to wait interrupts
# no wait.
INTERRUPTED = """
import _thread, threading
from concurrent.futures import Future
from types import SimpleNamespace
from lowrank_utils.comparison.sweep import run_all

future = Future()
settings = SimpleNamespace(as_dict=dict)
threading.Timer(0.5, _thread.interrupt_main).start()
rescue = threading.Timer(20, future.set_exception, [TimeoutError("the run went on")])
rescue.start()
try:
    run_all(SimpleNamespace(submit=lambda *_: future), None, {"run": settings}, '{"cells": []}', 1, None)
except KeyboardInterrupt:
    print("the run is left" if not future.done() or future.cancelled() else "the run went on")
rescue.cancel()
"""


def test_an_interruption_that_comes_just_before_a_wait_is_noticed():
    words = [sys.executable, "-c", INTERRUPTED]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stdout == "the run is left\n"


def test_what_is_done_is_kept_when_a_worker_ends_at_the_same_moment():
    futures = {"lost": Future(), "done": Future()}
    futures["lost"].set_exception(RuntimeError("a worker was ended"))
    futures["done"].set_result(sweep.Outcome("executed", "{}", ""))
    settings = {run: SimpleNamespace(as_dict=lambda name=run: name) for run in futures}
    kept = {}
    executor = SimpleNamespace(submit=lambda _, __, name, *___: futures[name])
    store = SimpleNamespace(keep=lambda run, _, outcome: kept.update({run: outcome}))
    with pytest.raises(RuntimeError, match="a worker was ended"):
        sweep.run_all(executor, store, settings, NOTEBOOK, 1, lambda *_: None)
    assert kept == {"done": ("executed", "{}", "")}
