"""A sweep runs each combination once, in parallel, on this machine or on dask, and
survives being killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import filelock
import pandas as pd
import psutil
import pytest
import yaml

from lowrank_utils.comparison.command import main
from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.comparison.sweep import local_workers

pytestmark = pytest.mark.slow

# How many rows of the table a run with one rank is: two methods above two networks,
# with three seeds.
ROWS = 2 * 2 * 3
RANKS = ("-p", "ranks", "1", "2", "4", "8")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture
def ranks(kept):
    """Return the ranks of the runs that are done, and of those that failed."""

    def read(out="out"):
        results, failed = kept(out)
        done = {run["rank"] for result in results.values() for run in result["runs"]}
        paths = [folder / "parameters.json" for folder in failed]
        without = [r for p in paths for r in json.loads(p.read_text())["ranks"]]
        return sorted(done), sorted(without)

    return read


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_each_combination_is_a_part_of_one_table(command, kept, ranks, tmp_path):
    out, published = tmp_path / "out", tmp_path / "published"
    words = ("--jobs", 2, "--publish", published, "--name", "small")
    # As a user types it, in a process of its own.
    typed = command("-p", "ranks", 1, 4, "-p", "shift", "rotation", "inversion", *words)
    plain = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    run = subprocess.run(typed, timeout=240, check=False, **plain)
    assert run.returncode == 0, run.stderr
    results, _ = kept()
    assert len(results) == 4
    assert ranks() == ([1, 4], [])
    table = pd.read_csv(out / "small.csv")
    assert len(table) == 4 * ROWS
    assert not table.duplicated(["shift", "network", "method", "rank", "seed"]).any()
    report = (out / "small.md").read_text()
    assert files(published).keys() == files(out).keys() - {".lock", "declared.json"}
    assert (published / "small.md").read_text() == report
    for picture in re.findall(r"\]\((\S+\.png)\)", report):
        assert (out / picture).stat().st_size > 10_000
    assert "### DoRA with m's rate − LoRA" in report
    assert "4 of 4 runs done" in run.stdout
    # The bar says how many are done, running and left, and for how long.
    assert "0 done, 2 running, 2 left" in run.stderr
    assert re.search(r"4 done, 0 running, 0 left.*about", run.stderr)
    # Two jobs share the cores.
    counted = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if counted else os.cpu_count()
    threads = {result["settings"]["threads"] for result in results.values()}
    assert threads == {str(max(1, cores // 2))}


def test_a_finished_sweep_runs_nothing_again(sweep, kept, tmp_path):
    sweep("-p", "ranks", 1)
    (name,) = kept()[0]
    path = tmp_path / "out" / "runs" / name / "notebook.ipynb"
    before = path.stat()
    assert "running" not in sweep("-p", "ranks", 1).err
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # More of the grid runs only what is new.
    assert "0 done, 1 running, 0 left" in sweep("-p", "ranks", 1, 2).err
    assert len(kept()[0]) == 2


def test_a_test_is_declared_before_the_runs_and_judged_after_them(sweep, tmp_path):
    out, path = tmp_path / "out", tmp_path / "declaring.yaml"
    lora, dora = "LoRA", "DoRA with m's rate"
    test = {"first": dora, "second": lora, "ranks": [1]}
    declared = {"shifts": ["rotation"], "steps": [64], "tests": [test]}
    # Two runs, the first of which has as many networks as one test needs.
    networks = ("[1, 2, 3, 4, 5, 6]", "[7, 8]")

    def run(content, *words, **options):
        plan = {"grids": {"shift": "rotation", "ranks": [1]}, "declared": content}
        path.write_text(yaml.safe_dump(plan), encoding="utf-8")
        return sweep(path, *words, networks=networks, **options).err

    # Six networks have all that the test needs, but one run of the sweep isn't there:
    # it isn't looked at.
    run(declared, status=1, PLANTED_NETWORK="7")
    assert json.loads((out / "declared.json").read_text(encoding="utf-8")) == declared
    report = (out / "declaring.md").read_text(encoding="utf-8")
    assert "above 6 pretrained networks" in report
    assert "p (Holm)" not in report
    before = files(out)

    # A run is there: no other test may be declared now, and none may be left out, and
    # nothing is run.
    swapped = {"first": lora, "second": dora, "ranks": [1]}
    for content in (declared | {"tests": [swapped]}, None):
        said = run(content, status=2)
        assert "was declared before them" in said
        assert said.count("\n") == 1
    assert files(out) == before

    run(declared, "--retry-failed")
    report = (out / "declaring.md").read_text(encoding="utf-8")
    assert "## What was declared before the runs" in report
    assert f"| 64 | {dora} − {lora}, rank 1 | 8 |" in report


def test_a_dry_run_shows_the_grid_and_runs_nothing(sweep, tmp_path):
    said = sweep(*RANKS, "--dry-run").out
    assert said.count("to do") == 5  # a line each, and the sum
    assert "ranks=[8]" in said
    assert "4 runs: 0 done, 0 failed, 4 to do" in said
    assert not (tmp_path / "out").exists()


def test_a_failure_keeps_its_notebook_and_the_others_go_on(
    sweep, kept, ranks, tmp_path
):
    published = tmp_path / "published"
    said = sweep(*RANKS, "--publish", published, status=1, PLANTED_FAILURE="[2];[8]")
    assert not published.exists(), "half a grid isn't published"
    assert ranks() == ([1, 4], [2, 8])
    for folder in kept()[1]:
        cells = json.loads((folder / "notebook.ipynb").read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        (error,) = [o["evalue"] for o in outputs if o["output_type"] == "error"]
        assert "planted failure at" in error
        assert "planted failure" in (folder / "error.txt").read_text()
        assert str(folder) in said.err
    assert "2 of 4 runs done, 2 failed: --retry-failed" in said.out
    assert "2 failed" in said.err

    # Started again it doesn't run them, and still says so.
    assert "running" not in sweep(*RANKS, status=1).err

    # With the option it runs those and nothing else, also if one fails again.
    more = ("-p", "shift", "permutation", "inversion", "--retry-failed")
    said = sweep(*RANKS, *more, status=1, PLANTED_FAILURE="[8]")
    assert "0 done, 2 running, 0 left" in said.err
    assert ranks() == ([1, 2, 4], [8])
    sweep(*RANKS, "--retry-failed")
    assert ranks() == ([1, 2, 4, 8], [])


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


# Killed before the first run has ended, between runs, and while the last is at work.
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_sweep_goes_on_where_it_stopped(
    command, sweep, kept, ranks, tmp_path, after
):
    words, runs = (*RANKS, "--jobs", 2), tmp_path / "out" / "runs"
    slow = os.environ | {"PLANTED_SECONDS": "1"}
    with subprocess.Popen(command(*words), env=slow, **QUIET) as process:
        wait_until(lambda: runs.is_dir() and len(list(runs.iterdir())) >= after)
        time.sleep(0.3)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    done = {path: path.read_bytes() for path in runs.glob("*/result.json")}
    assert len(done) >= after
    assert len(kept()[0]) == len(done), "nothing is half-written"
    psutil.wait_procs(children, timeout=30)
    alive = [child for child in children if child.is_running()]
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)

    said = sweep(*words).err
    if len(done) < 4:
        assert f"0 done, {min(2, 4 - len(done))} running" in said
    assert ranks() == ([1, 2, 4, 8], [])
    assert {path: path.read_bytes() for path in done} == done
    assert len(pd.read_csv(tmp_path / "out" / "comparison.csv")) == 4 * ROWS
    assert not list((tmp_path / "out").glob(".partial-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_sweep_says_how_to_go_on(command, tmp_path):
    slow = os.environ | {"PLANTED_SECONDS": "60"}
    options = QUIET | {"stderr": subprocess.PIPE, "text": True, "env": slow}
    with subprocess.Popen(command("-p", "ranks", 1), **options) as process:
        children = psutil.Process(process.pid).children
        wait_until(lambda: len(children(recursive=True)) >= 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to go on" in said
    assert not list((tmp_path / "out" / "runs").iterdir())


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SweepError])
def test_what_ended_a_sweep_is_not_hidden_by_its_workers_end(monkeypatch, reason):
    class Breaking:
        def __init__(self, **_):
            self.shut_down = None

        def shutdown(self, **options):
            self.shut_down = options
            raise OSError("handle is closed")

    monkeypatch.setattr("joblib.externals.loky.ProcessPoolExecutor", Breaking)
    with pytest.raises(reason), local_workers(1) as executor:
        raise reason
    assert executor.shut_down == {"wait": True, "kill_workers": True}
    with pytest.raises(OSError, match="handle is closed"), local_workers(1) as executor:
        pass
    assert executor.shut_down == {"wait": True, "kill_workers": True}


def test_two_sweeps_do_not_share_a_folder(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        said = sweep("-p", "ranks", 1, status=2).err
    assert "another sweep is at work" in said


def test_a_full_disk_keeps_what_is_done_and_with_space_the_sweep_goes_on(
    sweep, ranks, mount
):
    disk = mount("size=4m")
    out = disk / "out"
    options = {"out": "disk/out"}
    sweep("-p", "ranks", 1, "--jobs", 1, **options)
    before = files(out)
    assert len(before) > 3
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    both = ("-p", "ranks", 1, 2, "--jobs", 1)
    said = sweep(*both, status=1, **options).err
    assert "is the disk full? What is done is kept, run it again" in said
    assert ranks("disk/out") == ([1], [])
    assert files(out) == before
    assert {path.name for path in out.iterdir()} == {*before, "runs", "failed"}
    filler.unlink()
    sweep(*both, **options)
    assert ranks("disk/out") == ([1, 2], [])


def test_a_read_only_disk_is_one_clear_line_before_anything_runs(
    notebook, mount, capsys
):
    out = mount("ro") / "out"
    words = ["--notebook", notebook, "-p", "ranks", "1", "--out", out]
    assert main([*map(str, words)]) == 2
    said = f"lowrank-compare: {out} can't be written (Read-only file system); choose"
    assert capsys.readouterr().err == f"{said} another --out\n"


@contextlib.contextmanager
def dask_cluster(tmp_path):
    """A scheduler and two workers, each a process of its own, on loopback."""
    file = tmp_path / "scheduler.json"
    with contextlib.ExitStack() as stack:

        def start(*words):
            command = [sys.executable, "-m", "dask", *map(str, words)]
            command += ["--host", "127.0.0.1", "--no-dashboard"]
            process = subprocess.Popen(command, cwd=tmp_path, **QUIET)
            stack.callback(stack.enter_context(process).kill)

        start("scheduler", "--port", 0, "--scheduler-file", file)
        wait_until(lambda: file.is_file() and file.stat().st_size > 0)
        address = json.loads(file.read_text())["address"]
        for _ in range(2):
            start("worker", address, "--nthreads", 1, "--local-directory", tmp_path)
        yield address


def test_the_workers_of_a_dask_scheduler_give_the_same_results(sweep, kept, tmp_path):
    from distributed import Client

    sweep(*RANKS, "--jobs", 1, "--threads", 1, out="alone")
    with dask_cluster(tmp_path) as address:
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        said = sweep(*RANKS, "--scheduler", address, out="dask").err
        assert "0 done, 2 running, 2 left" in said
    alone, dask = (
        {
            str(path.relative_to(tmp_path / out)): path.read_bytes()
            for pattern in ("runs/*/result.json", "comparison.[cm]*")
            for path in (tmp_path / out).glob(pattern)
        }
        for out in ("alone", "dask")
    )
    assert len(alone) == 4 + 2
    assert alone == dask
    assert kept("alone") == kept("dask")


def test_a_scheduler_that_does_not_answer_is_one_clear_line(sweep):
    said = sweep("-p", "ranks", 1, "--scheduler", "tcp://127.0.0.1:1", status=2).err
    assert "no scheduler answers at tcp://127.0.0.1:1" in said
