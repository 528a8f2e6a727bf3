"""Start JupyterLab behind the token in ``JUPYTER_TOKEN``, whatever a configuration file
says.

``environment.py`` runs this in the environment and passes JupyterLab's arguments on.
"""

import os
import sys
from typing import Any

from jupyterlab.labapp import LabApp

# It asks whether it may fetch news and look for newer versions, in front of the
# notebook, and does so if it may.
ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"


def without_announcements(_handler: Any, page_config: dict[str, Any]) -> dict[str, Any]:
    """Return a page's configuration with the announcements turned off: no network is
    needed, nor asked for.
    """
    return {
        **page_config,
        "disabledExtensions": [
            *page_config.get("disabledExtensions", ()),
            ANNOUNCEMENTS,
        ],
    }


def main() -> None:
    """Configure the server, make sure that it is closed, and run it until it is
    ended.
    """
    token = os.environ.pop("JUPYTER_TOKEN")
    # A configuration file goes over the environment variable, and an argument over the
    # file. The argument is added here, where the system's list of processes doesn't
    # show it.
    server = LabApp.initialize_server(
        argv=[*sys.argv[1:], f"--PasswordIdentityProvider.token={token}"]
    )
    identity = server.identity_provider
    if server.ip != "127.0.0.1" or identity.token != token or not identity.auth_enabled:
        sys.exit(
            "A Jupyter configuration file opens the server to others, so it was not started. "
            "Run `jupyter --paths` to see where these files are, and move the setting away"
        )
    server.web_app.settings["page_config_hook"] = without_announcements
    # Jupyter prints the address with the token only if it made the token by itself.
    identity.token_generated = True
    server.start()


if __name__ == "__main__":
    main()
