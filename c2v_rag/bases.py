"""Find the weights of an encoder or a decoder: in a folder, an installed package, on the Hub, or in a GGUF file.

Only safetensors are read (a GGUF file is converted first), never a pickle. Code that comes with weights is not run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from c2v_rag.hashes import cache_folder, sha256, verify_sums, write_sums

logger = logging.getLogger(__name__)

# The files to download from a hub repository: safetensors weights, tokenizers and settings. No pickles, no code.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "SHA256SUMS", "*.md"]


@dataclasses.dataclass(frozen=True)
class Base:
    """An encoder's or a decoder's weights on this machine.

    `folder`: transformers can open it. `origin`: a description for people of where the weights came from.
    `reference`: the entry for these weights in `base.json`; None if they can only be copied. `hashes`: the SHA-256 of
    each weight file, by file name. `identity`: a hash that differs for different weights; unless given, it is computed
    from `hashes`.
    """

    folder: Path
    origin: str
    reference: dict[str, Any] | None
    hashes: dict[str, str]
    identity: str = ""

    def __post_init__(self) -> None:
        if not self.identity:
            digest = hashlib.sha256(json.dumps(sorted(self.hashes.values())).encode()).hexdigest()
            object.__setattr__(self, "identity", digest)


def locate_base(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Base:
    """Find weights by the path of a folder or a .gguf file, the name of an installed package, or a hub id.

    Raises FileNotFoundError if `name_or_path` is none of these, ValueError if no safetensors file is there.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_dir():
        return Base(path, f"folder {path}", None, weight_hashes(path))
    if path.is_file() and path.suffix == ".gguf":
        digest = sha256(path)
        return Base(convert_gguf(path, digest), f"file {path}", None, {path.name: digest})
    if (package := package_base(name)) is not None:
        return package
    folder = hub_folder(name, revision)
    hashes = weight_hashes(folder)
    # The name of a snapshot's folder is the commit. A commit never changes; a branch can.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    reference = {"kind": "hub", "name": name, "revision": commit, "sha256": hashes}
    return Base(folder, f"hub {name}@{commit or 'main'}", reference, hashes)


def is_installed(name: str) -> bool:
    """Whether a package of this name is installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def package_base(name: str) -> Base | None:
    """The weights in an installed package; None if there is no such package, or if it contains no weights."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not is_installed(name):
        return None
    distribution = metadata.distribution(name)
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    origin = f"package {name}=={distribution.version}"
    reference = {"kind": "package", "name": name, "version": distribution.version}
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        hashes = {ggufs[0].name: sha256(ggufs[0])}
        folder = convert_gguf(ggufs[0], hashes[ggufs[0].name])
        return Base(folder, f"{origin} (GGUF)", reference | {"sha256": hashes}, hashes)
    folders = {file.parent for file in files if file.suffix == ".safetensors"}
    folders = {folder for folder in folders if (folder / "config.json") in files}
    if len(folders) != 1:
        return None
    folder = folders.pop()
    hashes = weight_hashes(folder)
    return Base(folder, origin, reference | {"sha256": hashes}, hashes)


def hub_folder(name: str, revision: str | None) -> Path:
    """Download a hub repository unless it is cached, and return its folder.

    Raises FileNotFoundError if `name` cannot be a hub id, or if the Hub cannot be reached or has no such repository.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {name!r}, and it cannot be a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is no folder and no installed package with weights on this machine, and the Hugging Face Hub "
            f"did not give it (revision {revision or 'main'}): {reason}"
        ) from error


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file in a folder, by file name. Raises ValueError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors file. Pickled weights (.bin, .pt) are not read, since they can run code: "
            "convert them with transformers' save_pretrained."
        )
    return {file.name: sha256(file) for file in files}


def convert_gguf(path: Path, digest: str) -> Path:
    """Convert a GGUF file into a float32 transformers folder in the cache, and return that folder.

    The file is converted once. If several processes need it at the same time, one converts and the others wait. A
    folder that exists is complete. Raises ImportError without the gguf package, ValueError if the file lacks a tensor.
    """
    folder = cache_folder() / f"gguf-{digest[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                logger.warning("Converting %s into %s, once (20 to 50 s).", path.name, folder)
                write_converted_gguf(path, folder)
    verify_sums(folder, f"Delete {folder}; it is made again from {path.name}.")
    return folder


def write_converted_gguf(path: Path, folder: Path) -> None:
    """Write `folder`, the transformers folder of a GGUF file, in one rename. Errors as in `convert_gguf`."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError(f'{path.name} is a GGUF file; reading it needs gguf: pip install "c2v-rag[gguf]"') from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    # Not AutoModel: with it, transformers 5 finds no tensor and silently keeps random weights.
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **options
        )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{path} lacks the tensors {sorted(report['missing_keys'])[:4]}. Install its package again.")
    # transformers marks the model as quantised, and does not save a model with these attributes.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        staging = Path(temporary) / folder.name
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(staging)
        write_sums(staging)
        staging.rename(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and log messages of transformers inside the `with` block.

    Its report of unused layers is expected. Missing tensors are reported by the functions that open weights.
    """
    logs: Any = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
