"""Make a new virtual environment in which torch is installed already: its files are hard links to those of .venv.

python .ci/environments.py FOLDER

The environment has pip, torch and what torch requires, in the versions of .venv, and nothing else. Unpacking torch
again would take a large part of the checks' time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def with_requirements(name: str) -> set[str]:
    """The names of an installed package and of the installed packages that it requires, directly or not."""
    found, waiting = set[str](), [name]
    while waiting:
        one = waiting.pop()
        try:
            requires = distribution(one).requires or []
        except PackageNotFoundError:  # on another system it would be required
            continue
        if one in found:
            continue
        found.add(one)
        needed = [Requirement(line) for line in requires]
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def new_environment(folder: Path) -> None:
    """Create the environment. It must be on the file system of the running interpreter's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    source = Path(sysconfig.get_path("purelib"))
    target = folder / source.relative_to(sys.prefix)
    for name in {"pip"} | with_requirements("torch"):
        for file in distribution(name).files or []:
            path = Path(str(file))
            if ".." in path.parts or path.suffix == ".pyc":  # programs name the interpreter of their environment
                continue
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / path, target / path)


if __name__ == "__main__":
    new_environment(Path(sys.argv[1]).absolute())
