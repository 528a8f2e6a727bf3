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

# How many rows of the table a run with one rank is: two methods above two networks,
# with three seeds.
ROWS = 2 * 2 * 3
RANKS = ("-p", "ranks", "1", "2", "4", "8")


def ranks_of(results):
    return sorted(
        {run["rank"] for result in results.values() for run in result["runs"]}
    )


def test_each_combination_is_one_notebook_one_result_and_part_of_one_table(
    command, kept, tmp_path
):
    published = tmp_path / "published"
    words = ("--jobs", 2, "--publish", published, "--name", "small")
    # As a user types it, in a process of its own.
    typed = command("-p", "ranks", 1, 4, "-p", "shift", "rotation", "inversion", *words)
    run = subprocess.run(
        typed,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results, failed = kept()
    assert len(results) == 4
    assert not failed
    assert ranks_of(results) == [1, 4]
    table = pd.read_csv(tmp_path / "out" / "small.csv")
    assert len(table) == 4 * ROWS
    assert not table.duplicated(["shift", "network", "method", "rank", "seed"]).any()
    report = (tmp_path / "out" / "small.md").read_text()
    assert {file.name for file in published.iterdir()} == {
        file.name
        for file in (tmp_path / "out").iterdir()
        if file.is_file() and file.name not in (".lock", "declared.json")
    }
    assert (published / "small.md").read_text() == report
    for picture in re.findall(r"\]\((\S+\.png)\)", report):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    assert "### DoRA with m's rate − LoRA" in report
    assert "4 of 4 runs done" in run.stdout
    # The bar says how many are done, running and left, and for how long.
    assert re.search(r"0 done, 2 running, 2 left", run.stderr)
    assert re.search(r"4 done, 0 running, 0 left.*about", run.stderr)
    # Two jobs share the cores.
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    assert {result["settings"]["threads"] for result in results.values()} == {
        str(max(1, cores // 2))
    }


def test_a_finished_sweep_runs_nothing_again(sweep, kept, tmp_path):
    assert sweep("-p", "ranks", 1).returncode == 0
    (name,) = kept()[0]
    before = (tmp_path / "out" / "runs" / name / "notebook.ipynb").stat()
    again = sweep("-p", "ranks", 1)
    assert again.returncode == 0
    assert "running" not in again.stderr
    after = (tmp_path / "out" / "runs" / name / "notebook.ipynb").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # More of the grid runs only what is new.
    more = sweep("-p", "ranks", 1, 2)
    assert "0 done, 1 running, 0 left" in more.stderr
    assert len(kept()[0]) == 2


DECLARED = {
    "shifts": ["rotation"],
    "steps": [64],
    "tests": [{"first": "DoRA with m's rate", "second": "LoRA", "ranks": [1]}],
}


@pytest.fixture
def declaring(tmp_path):
    """Write a grid's file that declares something, and return its path."""

    def write(**changes):
        path = tmp_path / "declaring.yaml"
        content = {"shift": "rotation", "ranks": [1]}
        path.write_text(
            yaml.safe_dump({"declared": DECLARED | changes, "grids": content}),
            encoding="utf-8",
        )
        return path

    return write


def test_a_test_is_declared_before_the_runs_and_judged_after_all_of_them(
    arguments, declaring, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"

    def run(*words):
        given = arguments(*words)
        place = given.index("networks")
        # Two runs, the first of which has as many networks as one test needs.
        given[place + 1 : place + 2] = ["[1, 2, 3, 4, 5, 6]", "[7, 8]"]
        return main(given), capsys.readouterr().err

    # Six networks have all that the test needs, but one run of the sweep isn't there:
    # it isn't looked at.
    monkeypatch.setenv("PLANTED_NETWORK", "7")
    assert run(declaring())[0] == 1
    assert json.loads((out / "declared.json").read_text(encoding="utf-8")) == DECLARED
    report = (out / "declaring.md").read_text(encoding="utf-8")
    assert "above 6 pretrained networks" in report
    assert "p (Holm)" not in report
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    # A run is there: no other test may be declared now, and none may be left out, and
    # nothing is run.
    swapped = {"first": "LoRA", "second": "DoRA with m's rate", "ranks": [1]}
    undeclared = tmp_path / "undeclared.yaml"
    undeclared.write_text("{shift: rotation, ranks: [1]}", encoding="utf-8")
    for path in (declaring(tests=[swapped]), undeclared):
        status, said = run(path)
        assert status == 2
        assert "was declared before them" in said
        assert said.count("\n") == 1
    assert {
        path.name: path.read_bytes() for path in out.iterdir() if path.is_file()
    } == before

    monkeypatch.delenv("PLANTED_NETWORK")
    assert run(declaring(), "--retry-failed")[0] == 0
    report = (out / "declaring.md").read_text(encoding="utf-8")
    assert "## What was declared before the runs" in report
    assert "| 64 | DoRA with m's rate − LoRA, rank 1 | 8 |" in report


def test_too_few_networks_for_what_is_declared_are_refused_before_anything_runs(
    sweep, declaring, tmp_path
):
    run = sweep(declaring())
    assert run.returncode == 2
    assert "have 2 networks in common; 1 tests need 6 or more" in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_grid_and_runs_nothing(sweep, tmp_path):
    run = sweep(*RANKS, "--dry-run")
    assert run.returncode == 0
    assert run.stdout.count("to do") == 5  # a line each, and the sum
    assert "ranks=[8]" in run.stdout
    assert "4 runs: 0 done, 0 failed, 4 to do" in run.stdout
    assert not (tmp_path / "out").exists()


def test_a_failure_keeps_its_notebook_and_the_others_go_on(sweep, kept, tmp_path):
    run = sweep(*RANKS, "--publish", tmp_path / "published", PLANTED_FAILURE="[2];[8]")
    assert run.returncode == 1
    assert not (tmp_path / "published").exists(), "half a grid isn't published"
    results, failed = kept()
    assert ranks_of(results) == [1, 4]
    assert len(failed) == 2
    for folder in failed.values():
        cells = json.loads((folder / "notebook.ipynb").read_text())["cells"]
        errors = [
            o
            for cell in cells
            for o in cell.get("outputs", [])
            if o["output_type"] == "error"
        ]
        assert "planted failure at" in errors[0]["evalue"]
        assert "planted failure" in (folder / "error.txt").read_text()
        assert json.loads((folder / "parameters.json").read_text())["ranks"] in (
            [2],
            [8],
        )
        assert str(folder) in run.stderr
    assert "2 of 4 runs done, 2 failed: --retry-failed" in run.stdout
    assert "2 failed" in run.stderr

    # Started again it doesn't run them, and still says so.
    again = sweep(*RANKS)
    assert again.returncode == 1
    assert "running" not in again.stderr

    # With the option it runs those and nothing else, also if one fails again.
    retried = sweep(
        *RANKS,
        "-p",
        "shift",
        "permutation",
        "inversion",
        "--retry-failed",
        PLANTED_FAILURE="[8]",
    )
    assert retried.returncode == 1
    assert "0 done, 2 running, 0 left" in retried.stderr
    results, failed = kept()
    assert ranks_of(results) == [1, 2, 4]
    assert len(failed) == 1
    assert sweep(*RANKS, "--retry-failed").returncode == 0
    results, failed = kept()
    assert ranks_of(results) == [1, 2, 4, 8]
    assert not failed


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


# Killed before the first run has ended, between runs, and while the last is at work.
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_sweep_goes_on_where_it_stopped(command, sweep, kept, tmp_path, after):
    runs = tmp_path / "out" / "runs"
    environment = os.environ | {"PLANTED_SECONDS": "1"}
    with subprocess.Popen(
        command(*RANKS, "--jobs", 2),
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: runs.is_dir() and len(list(runs.iterdir())) >= after)
        time.sleep(0.3)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    done = {path.name: (path / "result.json").read_bytes() for path in runs.iterdir()}
    assert len(done) >= after
    kept()  # nothing half-written
    psutil.wait_procs(children, timeout=30)
    assert not [
        child
        for child in children
        if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]

    run = sweep(*RANKS, "--jobs", 2)
    assert run.returncode == 0, run.stderr
    if len(done) < 4:
        assert f"0 done, {min(2, 4 - len(done))} running" in run.stderr
    results, failed = kept()
    assert ranks_of(results) == [1, 2, 4, 8]
    assert not failed
    for name, result in done.items():
        assert (runs / name / "result.json").read_bytes() == result
    assert len(pd.read_csv(tmp_path / "out" / "comparison.csv")) == 4 * ROWS
    assert not list((tmp_path / "out").glob(".partial-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_sweep_says_how_to_go_on(command, tmp_path):
    environment = os.environ | {"PLANTED_SECONDS": "60"}
    with subprocess.Popen(
        command("-p", "ranks", 1),
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        wait_until(
            lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 3
        )
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to go on" in said
    assert not list((tmp_path / "out" / "runs").iterdir())


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SweepError])
def test_what_ended_a_sweep_is_not_hidden_by_the_end_of_its_workers(
    monkeypatch, reason
):
    class Breaking:
        def __init__(self, **_):
            self.shut_down = False

        def shutdown(self, **options):
            assert options == {"wait": True, "kill_workers": True}
            self.shut_down = True
            raise OSError("handle is closed")

    monkeypatch.setattr("joblib.externals.loky.ProcessPoolExecutor", Breaking)
    with pytest.raises(reason), local_workers(1) as executor:
        raise reason
    assert executor.shut_down
    with pytest.raises(OSError, match="handle is closed"), local_workers(1):
        pass


def test_two_sweeps_do_not_share_a_folder(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        run = sweep("-p", "ranks", 1)
    assert run.returncode == 2
    assert "another sweep is at work" in run.stderr


def test_a_full_disk_keeps_what_is_done_and_with_space_the_sweep_goes_on(
    sweep, kept, mount
):
    disk = mount("size=4m")

    def run(*ranks):
        return sweep("-p", "ranks", *ranks, "--jobs", 1, out="disk/out")

    def published():
        return {
            path.name: path.read_bytes()
            for path in (disk / "out").iterdir()
            if path.is_file()
        }

    assert run(1).returncode == 0
    before = published()
    assert len(before) > 3
    with (
        contextlib.suppress(OSError),
        (disk / "filler").open("wb", buffering=0) as filler,
    ):
        while True:
            filler.write(bytes(4096))
    full = run(1, 2)
    assert full.returncode == 1
    assert "is the disk full? What is done is kept, run it again" in full.stderr
    assert "Traceback" not in full.stderr
    assert ranks_of(kept("disk/out")[0]) == [1]
    assert published() == before
    assert {path.name for path in (disk / "out").iterdir()} == {
        *before,
        "runs",
        "failed",
    }
    (disk / "filler").unlink()
    assert run(1, 2).returncode == 0
    results, failed = kept("disk/out")
    assert ranks_of(results) == [1, 2]
    assert not failed


def test_a_read_only_disk_is_one_clear_line_before_anything_runs(
    notebook, mount, capsys
):
    out = mount("ro") / "out"
    assert (
        main(["--notebook", str(notebook), "-p", "ranks", "1", "--out", str(out)]) == 2
    )
    assert (
        capsys.readouterr().err
        == f"lowrank-compare: {out} can't be written (Read-only file system); choose another --out\n"
    )


@contextlib.contextmanager
def dask_cluster(tmp_path):
    """A scheduler and two workers, each a process of its own, on loopback."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    place = ["--host", "127.0.0.1"]
    with contextlib.ExitStack() as stack:

        def start(*words):
            process = stack.enter_context(
                subprocess.Popen([*dask, *map(str, words)], cwd=tmp_path, **quiet)
            )
            stack.callback(process.kill)

        start(
            "scheduler", *place, "--port", 0, "--no-dashboard", "--scheduler-file", file
        )
        wait_until(lambda: file.is_file() and file.stat().st_size > 0)
        address = json.loads(file.read_text())["address"]
        for _ in range(2):
            start(
                "worker",
                address,
                *place,
                "--nthreads",
                1,
                "--no-dashboard",
                "--local-directory",
                tmp_path,
            )
        yield address


def test_the_workers_of_a_dask_scheduler_give_the_same_results(sweep, kept, tmp_path):
    from distributed import Client

    alone = sweep(*RANKS, "--jobs", 1, "--threads", 1, out="alone")
    assert alone.returncode == 0, alone.stderr
    with dask_cluster(tmp_path) as address:
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        # A run that fails on a worker is kept like any other.
        run = sweep(*RANKS, "--scheduler", address, out="dask", PLANTED_FAILURE="")
        assert run.returncode == 0, run.stderr
        assert "0 done, 2 running, 2 left" in run.stderr
    assert kept("alone") == kept("dask")
    for name in kept("alone")[0]:
        first, second = (
            tmp_path / out / "runs" / name / "result.json" for out in ("alone", "dask")
        )
        assert first.read_bytes() == second.read_bytes()
    for name in ("comparison.csv", "comparison.md"):
        assert (tmp_path / "alone" / name).read_bytes() == (
            tmp_path / "dask" / name
        ).read_bytes()


def test_a_scheduler_that_does_not_answer_is_one_clear_line(sweep):
    run = sweep("-p", "ranks", 1, "--scheduler", "tcp://127.0.0.1:1")
    assert run.returncode == 2
    assert "no scheduler answers at tcp://127.0.0.1:1" in run.stderr
    assert "Traceback" not in run.stderr
