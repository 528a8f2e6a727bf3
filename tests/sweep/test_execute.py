"""One run in a process of its own: a kernel that never answers is started again, another failure isn't."""

import subprocess

import pytest

from lowrank_utils import sweep
from lowrank_utils.grid import code_version

NO_ANSWER = "RuntimeError: Kernel didn't respond in 60 seconds"
DIED = "RuntimeError: Kernel died before replying to kernel_info"


@pytest.fixture
def papermill(monkeypatch):
    """Stand in for papermill: what its processes write to stderr, one after the other, and how many there were."""
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
