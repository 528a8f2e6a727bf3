"""Where the repository can be found by others: ``Repository`` under ``project.urls`` in
pyproject.toml, which is the one setting for it.

Without it there is no link that needs it.
"""

import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
BINDER = "https://mybinder.org"
BRANCH = "main"


def address(project: dict[str, Any] | None = None) -> str:
    """Return the repository's address; empty where it isn't set.

    Args:
        project: the table of that name; that of pyproject.toml if it is left out.

    Raises:
        ValueError: it is no repository's page on GitHub, whose links are known.
    """
    if project is None:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
    found = project.get("urls", {}).get("Repository", "").rstrip("/")
    if found and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", found):
        raise ValueError(
            f"Repository under project.urls in pyproject.toml is {found!r}; "
            "it must be https://github.com/OWNER/NAME"
        )
    return str(found)


def binder(found: str, notebook: str) -> str:
    """Return the address at which Binder opens a notebook in JupyterLab.

    Args:
        found: the repository's address.
        notebook: a path from the project's folder.
    """
    place = urlsplit(found).path.strip("/")
    return f"{BINDER}/v2/gh/{place}/{BRANCH}?urlpath=lab/tree/{notebook}"


def launch_options(found: str | None = None) -> dict[str, Any]:
    """Return what the site's theme is told: buttons that lead to the repository and,
    on a notebook's page, to Binder; nothing where the address isn't set.
    """
    found = address() if found is None else found
    if not found:
        return {}
    return {
        "repository_url": found,
        "repository_branch": BRANCH,
        "path_to_docs": ".",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {"binderhub_url": BINDER, "notebook_interface": "jupyterlab"},
    }


def badges(found: str | None = None) -> str:
    """Return Markdown with links to run the series elsewhere and to its tests; empty
    where the address isn't set. They are words, for a picture would be asked for from
    another host.
    """
    found = address() if found is None else found
    if not found:
        return ""
    first = min((ROOT / "notebooks").glob("[0-9]*.ipynb")).name
    return (
        f"[Run it in Binder]({binder(found, f'notebooks/{first}')}) · "
        f"[The repository]({found}) · [Its tests]({found}/actions)"
    )
