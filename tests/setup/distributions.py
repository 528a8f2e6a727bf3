"""What is installed, and what the project's lists of dependencies lead to."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def installed(name):
    """Return the version of a package that is installed, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def needed(project, extras):
    """Return the names of all packages that the project needs here with ``extras``."""
    waiting = [Requirement(f"{project['name']}[{','.join(extras)}]")]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if name == project["name"]:
                lines = (
                    project["optional-dependencies"][extra]
                    if extra
                    else project["dependencies"]
                )
            else:
                lines = (metadata.requires(name) if installed(name) else None) or []
            for line in map(Requirement, lines):
                if line.marker is None or line.marker.evaluate({"extra": extra}):
                    waiting.append(line)
    return {name for name, _ in seen if name != project["name"]}
