"""Open JupyterLab at notebook 1 with Jupyter's own defaults: for this machine only,
behind a token.

``environment.py`` runs this in the environment and passes JupyterLab's arguments on.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jupyter_core.paths

ROOT = Path(__file__).resolve().parent.parent
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"


def leave_settings_aside() -> None:
    """Have Jupyter read no configuration but that of this environment.

    A file of the user's or the machine's may open the server to others, or end it: a
    folder outside this one, kernels that aren't allowed, a certificate that is gone.
    How JupyterLab looks, and what was open, is the user's all the same.
    """
    user = Path(jupyter_core.paths.jupyter_config_dir(), "lab")
    os.environ.setdefault("JUPYTERLAB_SETTINGS_DIR", str(user / "user-settings"))
    os.environ.setdefault("JUPYTERLAB_WORKSPACES_DIR", str(user / "workspaces"))
    os.environ["JUPYTER_CONFIG_DIR"] = jupyter_core.paths.ENV_CONFIG_PATH[0]
    os.environ.pop("JUPYTER_CONFIG_PATH", None)
    jupyter_core.paths.SYSTEM_CONFIG_PATH.clear()


def lab_arguments(words: list[str]) -> list[str]:
    """Return JupyterLab's arguments: those of this project, and the user's."""
    first = min((ROOT / "notebooks").glob("01_*.ipynb")).relative_to(ROOT)
    arguments = [
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{quote(first.as_posix())}",
        # Ctrl-C ends the server without a question.
        "--ServerApp.answer_yes=True",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        print("You are root, which JupyterLab refuses by default; here it is allowed.")
        arguments.append("--ServerApp.allow_root=True")
    return arguments + words


def without_announcements(_handler: Any, page_config: dict[str, Any]) -> dict[str, Any]:
    """Return a page's configuration in which nothing asks for news and newer versions
    in front of the notebook, nor does so over the network.
    """
    disabled = [*page_config.get("disabledExtensions", ()), ANNOUNCEMENTS]
    return {**page_config, "disabledExtensions": disabled}


def main() -> None:
    """Check the set-up, and run JupyterLab until it is ended."""
    # In a process of its own, so that the server doesn't keep torch in its memory.
    command = [sys.executable, "-m", "lowrank_utils"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:  # noqa: S603
        sys.exit(
            "JupyterLab was not opened: do what the lines with FIX say, then run this "
            "again"
        )
    leave_settings_aside()
    from jupyterlab.labapp import LabApp

    print("Opening JupyterLab; Ctrl-C in this window ends it.", flush=True)
    server = LabApp.initialize_server(argv=lab_arguments(sys.argv[1:]))
    server.web_app.settings["page_config_hook"] = without_announcements
    server.start()


if __name__ == "__main__":
    main()
