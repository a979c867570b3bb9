"""Print the lowest versions that the five packages allow, as a pip constraints file.

Each direct dependency becomes `name==lowest`. If it has several lower bounds, the highest one is used. torch is the
exception: its version comes from constraints.txt, because old torch wheels bring gigabytes of CUDA libraries on x86-64.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
OUR_PACKAGES = [ROOT, *sorted((ROOT / "integrations").iterdir())]


def lowest_versions() -> dict[str, Version]:
    """Lower bound of every direct dependency, by canonical name. ValueError if a dependency has no lower bound."""
    projects = [tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")) for folder in OUR_PACKAGES]
    own_names = {project["project"]["name"] for project in projects}
    lowest: dict[str, Version] = {}
    for project in (entry["project"] for entry in projects):
        extras = project.get("optional-dependencies", {}).values()
        for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in own_names:
                continue
            bounds = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==", "~=")]
            if not bounds:
                raise ValueError(f"{project['name']} requires {line!r} without a lowest version: give one with >=.")
            lowest[name] = max([*bounds, lowest[name]] if name in lowest else bounds)
    return lowest


def pinned_torch() -> str:
    """The line of constraints.txt that pins torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("torch=="))
    return line


if __name__ == "__main__":
    versions = lowest_versions()
    del versions["torch"]
    print("\n".join([pinned_torch(), *(f"{name}=={version}" for name, version in sorted(versions.items()))]))
