"""``lowrank-compare``: run comparison.ipynb for every combination of settings, and put
the results in one table.

A sweep keeps each run as soon as it ends. Started again with the same settings, it goes
on where it stopped.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lowrank_utils.comparison.grid import (
    NOTEBOOK,
    Plan,
    SweepError,
    code_version,
    expand,
    notebook_defaults,
    parse_yaml,
    read_notebook,
    read_plan,
    run_id,
)
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.store import Outcome, Store
from lowrank_utils.comparison.sweep import dask_workers, local_workers, run_all

if TYPE_CHECKING:
    from lowrank_utils.comparison.declared import Declaration


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="lowrank-compare", description=" ".join(__doc__.split("\n\n")[0].split())
    )
    parser.add_argument(
        "grid",
        nargs="?",
        type=Path,
        help="YAML file: each parameter with the values to go through, or a list of such grids, or both such "
        "grids and what is declared to be decided",
    )
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter and its values, in the place of those in the file; may be given several times. "
        "A single value stands for a list of one where the parameter is a list: -p ranks 1 2 4 are three runs, "
        "-p ranks '[1, 2, 4]' is one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="folder for the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs", type=int, default=None, help="runs at a time (default: one per core)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="threads for each run (default: cores over jobs)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run on dask workers, such as tcp://host:8786",
    )
    parser.add_argument(
        "--notebook",
        type=Path,
        default=NOTEBOOK,
        help="default: comparison.ipynb of the series",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the runs")
    parser.add_argument(
        "--retry-failed", action="store_true", help="run just those that failed before"
    )
    parser.add_argument(
        "--name", help="of the table and the report (default: the grid file's name)"
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="when all runs are done, put table and report there too",
    )
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan of the file, with the command line's values in the place of the
    file's.
    """
    given: dict[str, Any] = {}
    for name, *values in arguments.parameters:
        if not values:
            raise SweepError(f"-p {name} has no values")
        if name in given:
            raise SweepError(f"-p {name} is given twice; name all its values once")
        try:
            given[name] = [parse_yaml(value) for value in values]
        except ValueError as error:
            raise SweepError(f"-p {name}: {error}") from None
    plan = read_plan(arguments.grid) if arguments.grid else Plan([{}])
    return plan._replace(grids=[{**grid, **given} for grid in plan.grids])


def declaration_of(plan: Plan, settings: Sequence[Settings]) -> "Declaration | None":
    """Return what the plan declares, if the runs can answer it."""
    if plan.declared is None:
        return None
    # Imported here because only a plan that declares something needs tables.
    from lowrank_utils.comparison.declared import read_declaration

    try:
        declaration = read_declaration(plan.declared)
        declaration.check(settings)
    except (TypeError, ValueError) as error:
        raise SweepError(str(error)) from None
    return declaration


def check_places(arguments: argparse.Namespace) -> None:
    """Refuse a folder that is a file, or lies below one, and a name that is a path,
    before anything is run.
    """
    for option in ("out", "publish"):
        path: Path | None = getattr(arguments, option)
        if path is None:
            continue
        try:
            # A link that leads nowhere is there, too.
            there = (p for p in (path, *path.parents) if p.exists() or p.is_symlink())
            nearest = next(there, Path())
            if nearest.is_dir():
                continue
        except OSError as error:
            raise SweepError(f"--{option} {path}: {error.strerror}") from None
        raise SweepError(
            f"--{option} must be a folder, and {nearest} is a file; choose another --{option}"
        )
    name = arguments.name
    if name is not None and (not name or Path(name).name != name):
        raise SweepError(
            f"--name must be a file's name, without a folder or an ending; got {name!r}"
        )


def cores() -> int:
    """Return how many cores this process may use."""
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


@contextlib.contextmanager
def workers(
    arguments: argparse.Namespace, wanted: int
) -> Iterator[tuple[Executor, int, int]]:
    """Yield where the runs are executed, how many at a time, and with how many threads
    each.
    """
    if arguments.scheduler:
        with dask_workers(arguments.scheduler) as (executor, slots):
            yield executor, slots, arguments.threads or 1
        return
    jobs = max(1, min(arguments.jobs or cores(), wanted))
    # Jobs × threads isn't more than there are cores.
    with local_workers(jobs) as executor:
        yield executor, jobs, arguments.threads or max(1, cores() // jobs)


def show(runs: Mapping[str, Settings], store: Store) -> None:
    """Print each run's name, state and those of its parameters that differ between the
    runs.
    """
    differing = [
        name
        for name in Settings.names()
        if len({repr(getattr(settings, name)) for settings in runs.values()}) > 1
    ]
    for run, settings in runs.items():
        values = "  ".join(f"{name}={getattr(settings, name)}" for name in differing)
        print(f"{run}  {store.state(run):<6}  {values}")
    states = [store.state(run) for run in runs]
    print(
        f"{len(runs)} runs: "
        + ", ".join(f"{states.count(s)} {s}" for s in ("done", "failed", "to do"))
    )


def sweep(arguments: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit status."""
    for name in ("jobs", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SweepError(f"--{name} must be 1 or more; got {value}")
    check_places(arguments)
    plan = plan_of(arguments)
    defaults = notebook_defaults(arguments.notebook)
    needed = [*Settings.names(), "result_path"]
    if lacking := [name for name in needed if name not in defaults]:
        raise SweepError(
            f"--notebook {arguments.notebook} lacks the parameters {', '.join(lacking)}; "
            f"it must have {', '.join(needed)}"
        )
    settings = expand(plan.grids, defaults)
    declaration = declaration_of(plan, settings)
    notebook = read_notebook(arguments.notebook)
    version = code_version(notebook)
    runs = {run_id(s, version): s for s in settings}
    store = Store(arguments.out.absolute())
    if arguments.dry_run:
        show(runs, store)
        return 0
    with store.locked():
        store.declare(None if declaration is None else declaration.as_dict())
        wanted = "failed" if arguments.retry_failed else "to do"
        left = {run: s for run, s in runs.items() if store.state(run) == wanted}
        if left:
            with (
                workers(arguments, len(left)) as (executor, slots, threads),
                bar_for(len(left), slots) as advance,
            ):
                run_all(executor, store, left, notebook, threads, advance)
        done = {run: s for run, s in runs.items() if store.state(run) == "done"}
        failed = [run for run in runs if store.state(run) == "failed"]
        if done:
            # Imported here because only the report needs tables and plots.
            from lowrank_utils.comparison.report import write_report

            results = [(run, store.result(run)) for run in done]
            stem = arguments.name or (
                arguments.grid.stem if arguments.grid else "comparison"
            )
            complete = len(done) == len(runs)
            # Half of the runs decide nothing.
            judged = declaration if complete else None
            for folder in [
                store.folder,
                *([arguments.publish] if arguments.publish and complete else []),
            ]:
                print(
                    f"written: {write_report(results, version, folder, stem, judged)}"
                )
    for run in failed:
        print(
            f"failed: {store.folder / 'failed' / run} (its notebook and error.txt)",
            file=sys.stderr,
        )
    print(
        f"{len(done)} of {len(runs)} runs done"
        + (f", {len(failed)} failed: --retry-failed" if failed else "")
    )
    return 0 if len(done) == len(runs) else 1


@contextlib.contextmanager
def bar_for(total: int, slots: int) -> Iterator[Callable[[str, Outcome], None]]:
    """Show a bar with the runs done, running and left and the time to go; yield what
    advances it.
    """
    failures = 0
    with tqdm(
        total=total, bar_format="{desc} |{bar}| {elapsed}, about {remaining} to go"
    ) as bar:

        def describe(done: int) -> None:
            running = min(slots, total - done)
            words = f"{done} done, {running} running, {total - done - running} left"
            bar.set_description_str(
                words + f", {failures} failed" * (failures > 0), refresh=done == 0
            )

        def advance(run: str, outcome: Outcome) -> None:
            nonlocal failures
            if outcome.result is None:
                failures += 1
                bar.write(
                    f"{run} failed: {outcome.error.strip().splitlines()[-1]}",
                    file=sys.stderr,
                )
            describe(bar.n + 1)
            bar.update()

        describe(0)
        yield advance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 if all runs are done, 1 if some failed, 2 if it can't
    begin, 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The terminal's encoding may lack letters of a help text, or of a folder.
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        return sweep(arguments)
    except SweepError as error:
        print(f"lowrank-compare: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool as error:
        print(
            f"lowrank-compare: a worker was ended ({error}); what is done is kept, run it again",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(
            f"lowrank-compare: {error}{': is the disk full?' if full else '.'} "
            "What is done is kept, run it again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What is done is kept; run the same command again to go on.",
            file=sys.stderr,
        )
        return 130
