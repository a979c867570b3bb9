"""Which module may import which, and which packages an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "c2v_rag"

# The modules of the package that each module of the core may import, by dotted name. "index" stands for the whole
# package `index`, which its own modules may not import: they import each other, as listed. Packages above the core
# (finetune, evaluate, scale, server, app) may import all of it, and it never imports them.
CORE = {
    "__init__": {
        "config",
        "embedders",
        "gatherer",
        "index",
        "model",
        "protocols",
        "remote",
        "sources",
        "tokenization",
    },  # for type checkers, and on first use
    "protocols": set(),
    "fusion": set(),
    "config": set(),
    "hashes": set(),
    "identity": set(),
    "bases": {"hashes"},
    "checkpoint": {"bases", "config"},
    "tokenization": {"config"},
    "allocator": set(),
    "running": {"identity", "tokenization"},
    "replicas": {"identity"},
    "inference": {"allocator", "running", "tokenization"},
    "parts": {"bases", "checkpoint", "config", "identity", "tokenization"},
    "pooling": {"attention", "config", "tokenization"},
    "attention": set(),
    "prefix": {"attention", "identity", "parts", "tokenization"},
    "projector": {"parts"},
    "weights": {"bases", "checkpoint", "config", "hashes", "identity", "inference", "parts", "tokenization"},
    "model": {
        "attention",
        "bases",
        "checkpoint",
        "config",
        "hashes",
        "inference",
        "parts",
        "pooling",
        "prefix",
        "projector",
        "replicas",
        "tokenization",
        "weights",
    },
    "encoder": {"identity", "model", "inference", "tokenization"},
    "sentences": {"encoder", "index", "model", "protocols"},
    "generation": {"bases", "model", "parts"},
    "gatherer": {"protocols"},  # for type checkers
    "hosts": set(),
    "remote": {"inference", "protocols"},  # of inference the types only
    "embedders": {"inference", "model", "protocols", "remote"},
    "language_models": {"bases", "inference"},
    "sources.__init__": {"sources.docstrings", "sources.document", "sources.files"},
    "sources.docstrings": {"sources.document"},
    "sources.document": set(),
    "sources.files": {"sources.docstrings", "sources.document", "sources.formats"},
    "sources.formats": {"sources.document"},
    "index.__init__": {
        "index.chroma_server",
        "index.chunking",
        "index.known_files",
        "index.lexical",
        "index.query",
        "index.settings",
        "index.stamp",
        "index.stores",
        "index.vanished",
        "index.vector_index",
        "index.writing",
    },
    "index.chroma_server": set(),
    "index.chunking": {"index.cutting", "index.pages", "index.sections", "index.settings", "sources"},
    "index.cutting": set(),
    "index.sections": {"sources"},
    "index.settings": set(),
    "index.lexical": set(),
    "index.pages": set(),
    "index.search_cache": {"index.chunking", "index.diversity", "index.lexical"},
    "index.query": set(),
    "index.diversity": set(),
    "index.neighbours": {"index.pages", "index.query"},
    "index.reranking": {"index.query"},
    "index.searching": {
        "index.chunking",
        "index.diversity",
        "index.lexical",
        "index.neighbours",
        "index.pages",
        "index.query",
        "index.reranking",
    },
    "index.stamp": {"index.stores", "protocols"},
    "index.stores": {"hashes", "index.chroma_server", "protocols"},
    "index.vanished": {"index.vector_index"},
    "index.known_files": {"hashes", "index.vector_index", "sources"},
    "index.vector_index": {
        "index.chunking",
        "index.lexical",
        "index.pages",
        "index.query",
        "index.search_cache",
        "index.searching",
        "index.settings",
        "index.stamp",
        "index.stores",
        "index.writing",
        "protocols",
        "sources",
    },
    "index.writing": {"index.chunking", "index.settings", "index.stores", "protocols", "sources"},
}
# The modules of its own package that each module above the core may import. It may also import all of the core.
ABOVE = {
    "finetune": {
        "__init__": set(),
        "data": set(),
        "masks": set(),
        "bm25": set(),
        "loss": {"bm25", "masks"},
        "vectors": set(),
        "batches": {"vectors"},
        "averaging": set(),
        "recipe": {"loss"},
        "dev": {"data", "recipe"},
        "scoring": {"dev", "recipe", "vectors"},
        "monitor": {"loss"},
        "reports": set(),
        "mining": {"data"},
        "start": {"vectors"},
        "module": {"bm25", "recipe", "start", "vectors"},
        "trainer": {"data", "loss", "module", "monitor", "recipe"},
        "opening": {"recipe"},
        "memory": {"recipe"},
        "sharding": {"recipe", "trainer"},
        "run": {
            "averaging",
            "batches",
            "bm25",
            "data",
            "dev",
            "loss",
            "module",
            "monitor",
            "opening",
            "recipe",
            "reports",
            "scoring",
            "sharding",
            "trainer",
        },
    },
    "adapt": {
        "passages": set(),
        "prompts": set(),
        "work": set(),
        "questions": {"passages", "work"},
        "headings": {"passages", "questions"},
        "writers": {"headings", "passages", "prompts", "questions"},
        "corpus": {"passages", "questions", "work"},
        "filter": {"corpus", "questions"},
        "scoring": {"corpus"},
        "training": {"corpus", "passages", "work"},
        "reindex": set(),
        "report": {"corpus", "filter", "passages", "questions", "scoring", "work"},
        "options": {"passages", "reindex", "writers"},
        "run": {
            "corpus",
            "filter",
            "options",
            "passages",
            "questions",
            "reindex",
            "report",
            "scoring",
            "training",
            "work",
            "writers",
        },
        "__init__": {"report", "run"},
    },
    "cli": {
        "options": set(),
        "shared": set(),
        "download": {"shared"},
        "hits": set(),
        "search": {"hits", "options", "shared"},
        "train": {"options", "shared"},
        "serve": {"options", "shared"},
        "adapt": {"options", "shared"},
        "__init__": {"adapt", "download", "search", "train", "serve", "shared"},
        "__main__": {"main"},
    },
}
CORE_PACKAGES = {"index", "sources"}
HEAVY = {"torch", "transformers", "peft", "chromadb"}
HEAVY_AT_TOP = {
    "attention", "bases", "checkpoint", "encoder", "generation", "identity", "inference", "model", "parts", "pooling",
    "prefix", "projector", "replicas", "running", "tokenization", "weights",
}  # fmt: skip


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top level) for every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            package = node.module in ("c2v_rag", "c2v_rag.cli")  # from which modules are imported by name
            names = [f"{node.module}.{alias.name}" for alias in node.names] if package else [node.module or ""]
            found += [(name, node in top and node not in typing_only) for name in names]
    return found


def test_every_core_module_has_a_rule() -> None:
    files = [*PACKAGE.glob("*.py"), *(path for name in CORE_PACKAGES for path in (PACKAGE / name).glob("*.py"))]
    assert {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files} == CORE.keys()


def test_rules_of_the_core_have_no_cycle() -> None:
    def above(module: str, chain: tuple[str, ...] = ()) -> None:
        assert module not in chain, " -> ".join((*chain, module))
        for name in CORE[f"{module}.__init__"] if module in CORE_PACKAGES else CORE[module]:
            if name in CORE_PACKAGES | CORE.keys():
                above(name, (*chain, module))

    for module in CORE:
        above(module)


@pytest.mark.parametrize("module", CORE)
def test_imports_go_one_way(module: str) -> None:
    for name, at_top in imports(PACKAGE / f"{module.replace('.', '/')}.py"):
        if name.startswith("c2v_rag.") and name != "c2v_rag.__version__":
            parts = name.split(".")[1:]
            own_package = "." in module and parts[0] == module.split(".")[0]
            imported = ".".join(parts[:2]) if own_package else parts[0]
            assert imported in CORE[module], f"{module} may not import {name}"
        if name.split(".")[0] in HEAVY and at_top:
            assert module in HEAVY_AT_TOP, f"{module} may not import {name} at its top"


@pytest.mark.parametrize("package", ABOVE)
def test_packages_above_the_core_import_one_way(package: str) -> None:
    assert {path.stem for path in (PACKAGE / package).glob("*.py")} == ABOVE[package].keys()
    for module, may_import in ABOVE[package].items():
        for name, _ in imports(PACKAGE / package / f"{module}.py"):
            if name.startswith(f"c2v_rag.{package}"):
                assert name.split(".")[2] in may_import, f"{package}.{module} may not import {name}"


def test_the_command_line_loads_nothing_heavy_and_nothing_imports_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name, at_top in imports(path):
            if path.parent.name == "cli":
                assert not at_top or name.split(".")[0] not in HEAVY, f"{path} may not import {name} at its top"
            else:
                assert not name.startswith("c2v_rag.cli"), f"{path} imports {name}"


def test_nothing_outside_the_standard_library_is_needed_by_config_and_sources() -> None:
    for module in ("config", *(name for name in CORE if name.startswith("sources."))):
        for name, at_top in imports(PACKAGE / f"{module.replace('.', '/')}.py"):
            assert not at_top or name.split(".")[0] in sys.stdlib_module_names | {"c2v_rag", "__future__"}, name


def run(program: str) -> str:
    """The output of `program` in a new interpreter."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_no_torch_and_no_training_and_its_names_exist() -> None:
    program = """
import sys, c2v_rag
from c2v_rag import Causal2VecConfig, Document, read_sources
import c2v_rag.cli, c2v_rag.index
heavy = {"torch", "transformers", "chromadb", "peft"} & set(sys.modules)
assert not heavy, heavy
for name in c2v_rag.__all__:
    getattr(c2v_rag, name)
assert dir(c2v_rag) == sorted(c2v_rag.__all__)
assert "torch" in sys.modules
try:
    c2v_rag.nothing
except AttributeError as error:
    print(error)
print([name for name in sys.modules if "finetune" in name or name in ("datasets", "sentence_transformers")])
"""
    assert run(program).splitlines() == ["module 'c2v_rag' has no attribute 'nothing'", "[]"]


INTEGRATIONS = PACKAGE.parent / "integrations"


def test_integrations_use_public_names_only_and_nothing_uses_them() -> None:
    import c2v_rag

    files = list(INTEGRATIONS.rglob("*.py"))
    assert len(files) >= 6
    for path in files:
        for name, _ in imports(path):
            if name.startswith("c2v_rag"):
                assert name.removeprefix("c2v_rag.") in {*c2v_rag.__all__, "__version__"}, f"{path} imports {name}"
    for path in PACKAGE.rglob("*.py"):
        above = path.parent.name in ("finetune", "evaluate")  # these train and score through sentence-transformers
        packages = {"langchain_c2v", "chroma_c2v", "llama_index"} | (set() if above else {"sentence_transformers_c2v"})
        for name, _ in imports(path):
            assert name.split(".")[0] not in packages, f"{path} imports {name}"


EXTRAS = {  # by integration: the package that its extra installs, and the extra
    "langchain_c2v": ("langchain_core", "langchain"),
    "chroma_c2v": ("chromadb", "chroma"),
    "llama_index.embeddings.c2v": ("llama_index.core", "llama-index"),
    "sentence_transformers_c2v": ("sentence_transformers", "sentence-transformers"),
}


def test_importing_an_integration_loads_no_torch() -> None:
    modules = [module for module in EXTRAS if module != "sentence_transformers_c2v"]  # a torch module
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    print(module, "torch" in sys.modules)
"""
    assert run(program).splitlines() == [f"{module} False" for module in modules]


def test_without_its_extra_an_integration_names_the_pip_line() -> None:
    program = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {[needs for needs, _ in EXTRAS.values()]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for module in {[*EXTRAS]}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""
    lines = run(program).splitlines()
    for (_, extra), line in zip(EXTRAS.values(), lines, strict=True):
        assert f'pip install "c2v-rag[{extra}]"' in line
