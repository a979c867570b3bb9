"""Follow the README as a newcomer does, in an empty directory and with an empty HOME; print times and sizes.

    python .ci/first_steps.py         `make demo` in a copy of the tracked files, which is deleted at the end
    python .ci/first_steps.py --here  `make demo` in this checkout, which then has its .venv; nothing if it has one

`make wheel` does the same with the built wheels and pip: .ci/wheels.py uses `Walk`, too. SystemExit at the first
command that fails, or if the demo does not find what the README says that it finds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Walk:
    """Runs commands with a HOME of their own, and records how long each took.

    pip keeps this machine's settings, such as its index. `home` is empty at first.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        ours = ("C2V_RAG_", "PYTHONPATH", "PYTHONHOME", "XDG_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self._environment |= {"HOME": str(home), "COLUMNS": "160"}  # tables without cut names
        settings = Path.home() / ".config" / "pip" / "pip.conf"
        if settings.is_file():
            self._environment["PIP_CONFIG_FILE"] = str(settings)

    def step(self, name: str, *command: str | Path, cwd: Path) -> str:
        """Run a command, and return what it printed."""
        started = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{name}: {' '.join(map(str, command))} ended with {done.returncode}.")
        return done.stdout

    def report(self, **folders: Path) -> str:
        """A line for each step with its seconds, and for each folder with its size."""
        lines = [f"{seconds:7.1f} s   {name}" for name, seconds in self.seconds.items()]
        lines += [f"{size(folder) / 2**20:6,.0f} MiB  {name}" for name, folder in folders.items()]
        return "\n".join(lines)


def size(folder: Path) -> int:
    """Bytes of the files below a folder; a file with several names counts once."""
    files = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({file.st_ino: file.st_size for file in files}.values())


def check_demo(printed: str) -> None:
    """SystemExit if `make demo` does not print the first answer to each question that the README shows."""
    (block,) = re.findall(r"`make demo`\s+then prints.*?```\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines():
        question, name, *_ = re.split(r"\s{2,}|, ", line)
        table = printed.partition(question)[2].partition("└")[0]
        if name not in table:
            raise SystemExit(f"The README says that {question!r} finds {name}; make demo printed:\n{table or printed}")


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """A folder with the tracked files as they are now."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "c2v-rag"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listed.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        yield copy


def walk_by_make(checkout: Path) -> None:
    """Run `make demo`, and compare what it prints with the README."""
    with tempfile.TemporaryDirectory() as home:
        walk = Walk(Path(home))
        walk.step("set up .venv and the default model", "make", "-s", ".venv/demo", cwd=checkout)
        check_demo(walk.step("make demo", "make", "-s", "demo", cwd=checkout))
        folders = {".venv": checkout / ".venv", "HOME (caches)": walk.home, "index": checkout / "demo-store"}
        print(walk.report(**folders))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="walk in this checkout, unless it has a .venv")
    if not parser.parse_args().here:
        with copy_of_the_repository() as copy:
            walk_by_make(copy)
    elif (ROOT / ".venv").exists():
        print("This checkout has a .venv already: the first steps are not walked.")
    else:
        walk_by_make(ROOT)


if __name__ == "__main__":
    main()
