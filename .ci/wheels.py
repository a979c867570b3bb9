"""Build sdist and wheel of the five packages, and test each wheel without the source tree.

`make wheel` runs this. A new environment, to which only torch is linked from .venv, gets the core's wheel. Each
integration gets a copy of that environment (hard links) with its own wheel and the dependencies that this wheel
declares. In each environment a text must be embedded. In the core's, the README's commands and its example run, with an
empty HOME; times and sizes are printed. The script stops at the first command that fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from environments import new_environment
from first_steps import README, ROOT, Walk

DIST = ROOT / "dist"
ENVIRONMENTS = ROOT / "build" / "wheels"
PIP = ["-m", "pip", "install", "-q", "--no-compile", "-c", str(ROOT / "constraints.txt"), "--find-links", str(DIST)]

# Package -> (the only folder that its wheel installs, a program that embeds a text).
CORE = "c2v_rag"
INTEGRATIONS = {
    "chroma_c2v": (
        "chroma_c2v",
        "from chroma_c2v import Causal2VecEmbeddingFunction; vector = Causal2VecEmbeddingFunction()(['a heap'])[0]",
    ),
    "langchain_c2v": (
        "langchain_c2v",
        "from langchain_c2v import Causal2VecEmbeddings; vector = Causal2VecEmbeddings().embed_query('a heap')",
    ),
    "llama_index_embeddings_c2v": (
        "llama_index",
        "from llama_index.embeddings.c2v import Causal2VecEmbedding\n"
        "vector = Causal2VecEmbedding().get_query_embedding('a heap')",
    ),
    "sentence_transformers_c2v": (
        "sentence_transformers_c2v",
        "from sentence_transformers_c2v import load; vector = load('default').encode_query(['a heap'])[0]",
    ),
}
CORE_PROGRAM = """
import importlib.util
from c2v_rag import Causal2Vec
for name in ("llama_index", "langchain_c2v", "chroma_c2v", "sentence_transformers_c2v"):
    assert importlib.util.find_spec(name) is None, f"the core's wheel installed {name}"
vector = Causal2Vec.from_pretrained("default").encode_query(["a heap"])[0]
"""


def build_packages(root: Path, folder: Path) -> None:
    """Build sdist and wheel of the five packages of a source tree into `folder`, and check their descriptions."""
    for source in (root, *sorted((root / "integrations").iterdir())):
        command = [sys.executable, "-m", "build", "-qq", "-n", "--outdir", folder, source]  # the wheel from the sdist
        subprocess.run([str(part) for part in command], cwd=folder.parent, check=True)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *sorted(folder.iterdir())], check=True)


def embed(walk: Walk, name: str, python: Path, program: str) -> None:
    """Run a program outside the source tree, so that only installed packages can be imported."""
    walk.step(
        f"{name} embeds a text",
        *(python, "-I", "-c", program + "\nassert len(vector) == 384, len(vector)"),
        cwd=ENVIRONMENTS,
    )


def follow_the_readme(walk: Walk, programs: Path) -> None:
    """Run the README's commands and its first example in an empty folder, with the programs of an environment."""
    folder = ENVIRONMENTS / "empty"
    folder.mkdir()
    command, question = programs / "c2v-rag", "How do I descale the machine?"
    walk.step("c2v-rag info", command, "info", cwd=folder)
    walk.step("c2v-rag index, two PDFs", command, "index", ROOT / "demos/data/pdfs", "--store", "notes", cwd=folder)
    found = walk.step("c2v-rag search", command, "search", question, "--store", "notes", "--json", cwd=folder)
    assert "coffee-machine.pdf" in found, found
    code = re.findall(r"```python\n(.*?)# (.*?)\n```", README, re.DOTALL)[0]
    printed = walk.step("the example in Python", programs / "python", "-I", "-c", code[0], cwd=folder)
    assert printed.strip() == code[1], printed


def built_file(pattern: str) -> Path:
    """The only file in `dist` that matches the pattern."""
    (found,) = DIST.glob(pattern)
    return found


def check_contents(name: str, folder: str) -> None:
    """AssertionError if a wheel or sdist holds other files than expected, or has no py.typed or no licence."""
    names = zipfile.ZipFile(built_file(f"{name}-*.whl")).namelist()
    code = {path for path in names if ".dist-info/" not in path}
    assert {path.split("/")[0] for path in code} == {folder}, f"{name}: {sorted(code)}"
    assert any(path.endswith("/py.typed") for path in code), f"{name}: no py.typed"
    assert any(path.endswith("/licenses/LICENSE") for path in names), f"{name}: no licence"
    with tarfile.open(built_file(f"{name}-*.tar.gz")) as sdist:
        tops = {path.split("/")[1] for path in sdist.getnames() if "/" in path}
    more = {"CHANGELOG.md", "CITATION.cff"} if name == CORE else set()
    expected = {folder, "README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"} | more
    assert tops <= expected, f"{name}: its sdist also holds {sorted(tops - expected)}"


def main() -> None:
    for folder in (DIST, ENVIRONMENTS):
        shutil.rmtree(folder, ignore_errors=True)
    ENVIRONMENTS.mkdir(parents=True)

    build_packages(ROOT, DIST)
    for name, folder in {CORE: CORE, **{name: folder for name, (folder, _) in INTEGRATIONS.items()}}.items():
        check_contents(name, folder)
    assert len(list(DIST.iterdir())) == 2 * (1 + len(INTEGRATIONS)), "a package of integrations/ is not tested"

    walk = Walk(ENVIRONMENTS / "home")
    core = ENVIRONMENTS / "core"
    programs = core / "bin"
    python = programs / "python"
    new_environment(core)
    wheel = f"{built_file(f'{CORE}-*.whl')}[gguf,files]"
    walk.step("pip install c2v-rag[gguf,files]", python, *PIP, wheel, cwd=ENVIRONMENTS)
    walk.step("c2v-rag download default", programs / "c2v-rag", "download", "default", cwd=ENVIRONMENTS)
    embed(walk, CORE, python, CORE_PROGRAM)
    follow_the_readme(walk, programs)
    print(walk.report(environment=core, **{"HOME (caches)": walk.home}), flush=True)

    for name, (_, program) in INTEGRATIONS.items():
        copy = ENVIRONMENTS / name
        shutil.copytree(core, copy, symlinks=True, copy_function=os.link)
        python = copy / "bin" / "python"
        walk.step(f"pip install {name}", python, *PIP, built_file(f"{name}-*.whl"), cwd=ENVIRONMENTS)
        embed(walk, name, python, program)
        print(f"{name}: installed from its wheel, embeds a text", flush=True)
    shutil.rmtree(ENVIRONMENTS)


if __name__ == "__main__":
    main()
