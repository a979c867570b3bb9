"""Build a release into build/release: packages, checksums, a bill of materials, and the notes.

`make release REPOSITORY=https://HOST/OWNER/NAME` runs this. The packages are built from the last commit. In that copy,
the relative links of the READMEs become links to the tagged files, and the metadata get the repository's addresses, so
that the pages of the packages work elsewhere. Raises SystemExit if the tree has changes that are not committed, or if
the changelog has no dated section for the version.

    packages/*.whl *.tar.gz   SHA256SUMS   sbom.cdx.json   NOTES.md
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from wheels import ROOT, build_packages

RELEASE = ROOT / "build" / "release"
PYTHON = sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="Address of the repository's page, without a slash at the end.")
    parser.add_argument("--rehearsal", action="store_true", help='Accept a changelog section marked "(unreleased)".')
    arguments = parser.parse_args()
    if not re.fullmatch(r"https://[^\s/]+(/[^\s/]+)+", arguments.repository):
        sys.exit(f"REPOSITORY must be the https address of the repository, got {arguments.repository!r}.")
    if output("git", "status", "--porcelain"):
        sys.exit("There are changes that are not committed. A release is built from a commit.")

    version = read_version()
    notes = changelog_section(version, arguments.rehearsal)
    shutil.rmtree(RELEASE, ignore_errors=True)
    packages = RELEASE / "packages"
    packages.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        archive = Path(temporary) / "source.tar"
        subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        for folder in (source, *(source / "integrations").iterdir()):
            add_addresses(folder, folder.relative_to(source), arguments.repository, version)
        build_packages(source, packages)
    write_sums(packages)
    write_bill_of_materials(packages)
    (RELEASE / "NOTES.md").write_text(notes, encoding="utf-8")
    print(f"c2v-rag {version}: {len(list(packages.iterdir()))} files in {packages}")


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def read_version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "c2v_rag" / "__init__.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def changelog_section(version: str, rehearsal: bool) -> str:
    """The text of the version's section in CHANGELOG.md."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(version)} \((.+?)\)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None or (not rehearsal and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", found[1])):
        sys.exit(f'CHANGELOG.md needs a section "## {version} (YEAR-MONTH-DAY)" for this release.')
    return found[2].strip() + "\n"


def add_addresses(folder: Path, path: Path, repository: str, version: str) -> None:
    """Make the links of a package's README absolute, and write the repository's addresses into its pyproject.toml."""
    base = f"{repository}/blob/v{version}/" + ("" if path == Path() else f"{path.as_posix()}/")
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{base.replace('/blob/', '/raw/')}", text)
    readme.write_text(re.sub(r"(\]\()(?!https?:|#)", rf"\g<1>{base}", text), encoding="utf-8")
    project = folder / "pyproject.toml"
    addresses = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
    }
    lines = "".join(f'{name} = "{address}"\n' for name, address in addresses.items())
    text = project.read_text(encoding="utf-8")
    assert text.count("[project.urls]\n") == 1, f"{project} has no [project.urls]"
    project.write_text(text.replace("[project.urls]\n", f"[project.urls]\n{lines}"), encoding="utf-8")


def write_sums(packages: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  packages/{path.name}" for path in sorted(packages.iterdir())
    ]
    (RELEASE / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def write_bill_of_materials(packages: Path) -> None:
    """CycloneDX: what is installed with the core and the constraints, in an environment of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        environment = Path(temporary) / "environment"
        subprocess.run([PYTHON, "-m", "venv", str(environment)], check=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        (wheel,) = packages.glob("c2v_rag-*.whl")
        subprocess.run([*pip, "torch"], check=True)  # first: a later step would install another build of it
        subprocess.run([*pip, str(wheel)], check=True)
        target = RELEASE / "sbom.cdx.json"
        subprocess.run(
            [PYTHON, "-m", "cyclonedx_py", "environment", str(environment / "bin" / "python"), "-o", str(target)],
            check=True,
        )


if __name__ == "__main__":
    main()
