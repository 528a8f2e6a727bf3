"""What the runs of a sweep left, kept so that nothing is lost when it is killed."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock

from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.comparison.whole import write_whole

if TYPE_CHECKING:
    from lowrank_utils.comparison.settings import Settings


class Outcome(NamedTuple):
    """What a run left: its notebook as executed and, unless it failed, its result as
    JSON.
    """

    notebook: str
    result: str | None
    error: str


@dataclass(frozen=True)
class Store:
    """A folder with what the runs of a sweep left, one folder for each, that appears in
    one step.

    Attributes:
        folder: holds ``runs/ID`` with ``notebook.ipynb`` and ``result.json``, and
            ``failed/ID`` with ``notebook.ipynb``, ``parameters.json`` and
            ``error.txt``.
    """

    folder: Path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out, and remove what a killed one left half-written.

        Raises:
            SweepError: another sweep is at work here, or the folder can't be written.
        """
        try:
            for part in ("runs", "failed"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.folder / ".lock", timeout=0):
                for partial in self.folder.glob(".partial-*"):
                    shutil.rmtree(partial)
                yield
        except filelock.Timeout:
            raise SweepError(
                f"another sweep is at work in {self.folder}; wait for it or choose another --out"
            ) from None
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise SweepError(
                    f"{error.filename or self.folder} isn't what a sweep puts there "
                    f"({error.strerror}); choose another --out"
                ) from None
            # A disk that is full is another matter: there what is done is kept, and the
            # sweep goes on later.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise SweepError(
                f"{self.folder} can't be written ({error.strerror}); choose another --out"
            ) from None

    def declare(self, declared: dict[str, Any] | None) -> None:
        """Write down what the runs are to decide, before the first of them; later it
        can't be changed.

        Args:
            declared: as JSON holds it; None if nothing is declared.

        Raises:
            SweepError: runs are there already, and something else was declared for
                them.
        """
        path = self.folder / "declared.json"
        text = json.dumps(declared, indent=1) + "\n"
        try:
            earlier = path.read_text(encoding="utf-8") if path.is_file() else "null\n"
        except UnicodeDecodeError:
            raise SweepError(
                f"{path} isn't text, so somebody has altered it; choose another --out"
            ) from None
        if any((self.folder / "runs").iterdir()) and earlier != text:
            raise SweepError(
                f"what the runs in {self.folder} decide was declared before them, in {path}, and is another "
                "thing now; choose another --out for another declaration"
            )
        if path.is_file() and earlier == text:
            return
        write_whole(path, text)

    def state(self, run: str) -> str:
        """Return ``"done"``, ``"failed"`` or ``"to do"``."""
        if (self.folder / "runs" / run).is_dir():
            return "done"
        return "failed" if (self.folder / "failed" / run).is_dir() else "to do"

    def result(self, run: str) -> dict[str, Any]:
        """Return the result of a run that is done.

        Raises:
            SweepError: somebody has altered it.
        """
        path = self.folder / "runs" / run / "result.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or not isinstance(result.get("runs"), list):
                raise ValueError("it holds no runs")
            return result
        except (OSError, ValueError) as error:
            raise SweepError(
                f"{path} can't be read ({error}); remove its folder, and the run is done again"
            ) from None

    def keep(self, run: str, settings: "Settings", outcome: Outcome) -> None:
        """Write down what a run left. It is there whole or not at all, also if the
        machine stops.
        """
        if outcome.result is not None:
            files, place = {"result.json": outcome.result}, "runs"
        else:
            parameters = json.dumps(settings.as_dict(), indent=1)
            files, place = (
                {
                    "error.txt": outcome.error + "\n",
                    "parameters.json": parameters + "\n",
                },
                "failed",
            )
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            for name, text in {"notebook.ipynb": outcome.notebook, **files}.items():
                with (partial / name).open("w", encoding="utf-8", newline="\n") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            partial.chmod(0o755)
            earlier = self.folder / "failed" / run
            if place == "failed" and earlier.is_dir():
                shutil.rmtree(earlier)
            partial.rename(self.folder / place / run)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if place == "runs" and earlier.is_dir():
            shutil.rmtree(earlier)
