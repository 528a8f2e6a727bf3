"""One run in a process of its own: a kernel that never answers is started again,
another failure isn't."""

import json
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from lowrank_utils.comparison import sweep
from lowrank_utils.comparison.grid import code_version

NO_ANSWER = "RuntimeError: Kernel didn't respond in 60 seconds"
DIED = "RuntimeError: Kernel died before replying to kernel_info"


@pytest.fixture
def papermill(monkeypatch):
    """Stand in for papermill: what its processes write to stderr, one after the other,
    and how many there were."""
    plan, started = [], []

    def run(command, *, cwd, **_):
        started.append(command)
        stderr = plan.pop(0)
        if not stderr:
            (cwd / "out.ipynb").write_text("executed")
            (cwd / "result.json").write_text("{}")
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return plan, started


NOTEBOOK = '{"cells": []}'


def outcome():
    return sweep.execute(NOTEBOOK, {"seeds": [1]}, code_version(NOTEBOOK), threads=1)


def test_a_kernel_that_never_answers_is_started_again(papermill):
    plan, started = papermill
    plan += [NO_ANSWER, DIED, ""]
    found = outcome()
    assert (found.notebook, found.result, found.error) == ("executed", "{}", "")
    assert len(started) == 3


def test_after_three_times_it_is_a_failure_that_says_so(papermill):
    plan, started = papermill
    plan += [NO_ANSWER] * 4
    found = outcome()
    assert found.result is None
    assert found.error == NO_ANSWER
    assert len(started) == 3


def test_another_failure_is_not_tried_again(papermill):
    plan, started = papermill
    plan += ["ValueError: a loss became infinite", ""]
    assert outcome().error == "ValueError: a loss became infinite"
    assert len(started) == 1


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
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True
    )
    assert run.stdout == "the run is left\n"


def test_what_is_done_is_kept_when_a_worker_ends_at_the_same_moment():
    futures = {"lost": Future(), "done": Future()}
    futures["lost"].set_exception(RuntimeError("a worker was ended"))
    futures["done"].set_result(sweep.Outcome("executed", "{}", ""))
    settings = {run: SimpleNamespace(as_dict=lambda name=run: name) for run in futures}
    executor = SimpleNamespace(
        submit=lambda _execute, _notebook, name, *_: futures[name]
    )
    kept = {}
    store = SimpleNamespace(
        keep=lambda run, _settings, outcome: kept.update({run: outcome.result})
    )
    with pytest.raises(RuntimeError, match="a worker was ended"):
        sweep.run_all(executor, store, settings, NOTEBOOK, 1, lambda *_: None)
    assert kept == {"done": json.dumps({})}
