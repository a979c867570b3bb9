"""The five packages of this repository have one version and one licence, and require each other's version."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
INTEGRATIONS = {
    "chroma": ROOT / "integrations" / "chroma-c2v",
    "langchain": ROOT / "integrations" / "langchain-c2v",
    "llama-index": ROOT / "integrations" / "llama-index-embeddings-c2v",
    "sentence-transformers": ROOT / "integrations" / "sentence-transformers-c2v",
}


def read_project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def read_version(folder: Path) -> Version:
    """`__version__` of the file that the build reads it from."""
    tree = ast.parse((folder / read_project(folder)["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8"))
    (found,) = (
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__version__"
        and isinstance(node.value, ast.Constant)
    )
    return Version(str(found))


def test_every_integration_is_one_of_the_packages() -> None:
    assert set(INTEGRATIONS.values()) == {path for path in (ROOT / "integrations").iterdir() if path.is_dir()}


@pytest.mark.parametrize("extra", INTEGRATIONS)
def test_versions_agree_and_each_package_asks_for_the_same_minor_version(extra: str) -> None:
    core, folder = read_project(ROOT)["project"], INTEGRATIONS[extra]
    project = read_project(folder)["project"]
    version = read_version(ROOT)
    assert read_version(folder) == version
    bounds = f">={version.major}.{version.minor},<{version.major}.{version.minor + 1}"
    assert f"c2v-rag{bounds}" in project["dependencies"]
    assert core["optional-dependencies"][extra] == [f"{project['name']}{bounds}"]
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project["requires-python"] == core["requires-python"]


def test_every_dependency_has_a_lowest_version() -> None:
    for folder in (ROOT, *INTEGRATIONS.values()):
        project = read_project(folder)["project"]
        extras = project.get("optional-dependencies", {}).values()
        for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
            requirement = Requirement(line)
            ours = requirement.name == "c2v-rag" and requirement.extras
            assert ours or any(each.operator in (">=", "==") for each in requirement.specifier), line
