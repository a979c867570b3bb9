"""Open an embedder by its name: a model that is loaded once in this process and shared, or a server's model."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from c2v_rag.protocols import Embedder, is_url, same_weights

if TYPE_CHECKING:
    import torch

    from c2v_rag.model import Causal2Vec

DEFAULT = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedderSpec:
    """The description of an embedder: its name, how to load it, and which weights it must have.

    `name_or_path`: "default", a checkpoint folder, a Hub id, or the http(s) address of a server; "" for
    a model that exists in memory only. `llm_kwargs` go to the decoder's `from_pretrained`. `weights`: the expected
    identity ("weights" of a stamp); "" accepts any. `is_stored`: True for a spec from stored data, which the person who
    runs the program did not write; a server's address in it is not opened. A spec never contains an API key.
    """

    name_or_path: str = DEFAULT
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    llm_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str = ""
    is_stored: bool = False

    @classmethod
    def of(cls, embedder: Embedder) -> EmbedderSpec:
        """The spec that opens a loaded embedder again, with the weights that it has now.

        A part of a model, such as `EncoderEmbedder`, has no name that opens it, as a model that exists in memory only.
        """
        stamp = embedder.stamp
        arguments = getattr(embedder, "load_arguments", {})
        name = "" if "part" in stamp else str(stamp["name"])
        return cls(name_or_path=name, weights=str(stamp["weights"]), **arguments)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], *, place: str) -> EmbedderSpec:
        """The spec from values of `to_dict`. Raises ValueError, naming their source `place`, for an unknown setting."""
        known = {field.name for field in dataclasses.fields(cls)} - {"is_stored"}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{place} has unknown settings {unknown}. Upgrade c2v-rag.")
        return cls(**values, is_stored=True)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values. Raises ValueError if `llm_kwargs` contains other values."""
        values = dataclasses.asdict(self)
        del values["is_stored"]
        try:
            json.dumps(values)
        except TypeError as error:
            raise ValueError(
                f"These settings cannot be stored, because llm_kwargs holds more than JSON values: {error}. Load the "
                "model with plain values, such as device_map='auto'."
            ) from error
        return values

    def open(self) -> Embedder:
        """The embedder. It is loaded unless this process has already loaded it.

        Raises ValueError for other weights than expected, and the errors of loading. Raises ValueError for a server's
        address from stored data, unless this process has created a `RemoteModel` for it: that one is returned.
        """
        if not self.name_or_path:
            raise ValueError("This model exists in memory only. Save it with save_pretrained and load it from there.")
        embedder = self._open_stored_address() if self.is_stored and is_url(self.name_or_path) else None
        if embedder is None:
            embedder = load_embedder(
                self.name_or_path, revision=self.revision, device=self.device, dtype=self.dtype, **self.llm_kwargs
            )
        self.check(embedder)
        return embedder

    def _open_stored_address(self) -> Embedder:
        from c2v_rag.remote import opened_model

        if (model := opened_model(self.name_or_path)) is None:
            raise ValueError(
                f"Stored data names the server {self.name_or_path} as its model. An address that comes out of stored "
                "data is not opened: your texts and your key would be sent there. If you trust it, give it yourself: "
                f'--model {self.name_or_path}, or RemoteModel("{self.name_or_path}") where a model is expected.'
            )
        return model

    def check(self, embedder: Embedder) -> None:
        """Raise ValueError if the embedder has other weights than expected: their vectors must not be mixed."""
        stamp = embedder.stamp
        if self.weights and not same_weights(self.weights, stamp):
            raise ValueError(
                f"The stored vectors were made with another model: weights {self.weights!r} of {self.name_or_path!r}, "
                f"which now has the weights {stamp['weights']!r}. It was trained or replaced since. Load the model "
                "that made the vectors, or embed the documents again with this one, into a new collection."
            )


class LazyEmbedder:
    """An embedder that is opened at its first use. Each integration stores one.

    `LazyEmbedder(spec)` opens the embedder of a spec. `LazyEmbedder.of` takes the arguments that users pass to an
    integration: a loaded embedder or a name. A pickle contains the spec with the identity of the weights in use, and
    the embedder is opened again after loading. A `RemoteModel` is pickled itself, with its key.
    """

    def __init__(self, spec: EmbedderSpec, embedder: Embedder | None = None) -> None:
        self.spec = spec
        self._embedder = embedder

    @classmethod
    def of(
        cls,
        model: Embedder | None,
        *,
        name_or_path: str | None = None,
        name_argument: str = "name_or_path",
        **arguments: Any,
    ) -> LazyEmbedder:
        """Wrap a loaded embedder, or the embedder with this name and these other fields of `EmbedderSpec`.

        Raises ValueError if both are given, because one would be ignored. `name_argument`: the name of the caller's
        own parameter for `name_or_path`, for this message.
        """
        given = {name: value for name, value in arguments.items() if value}
        if model is None:
            return cls(EmbedderSpec(name_or_path=DEFAULT if name_or_path is None else name_or_path, **given))
        if named := ([name_argument] if name_or_path is not None else []) + sorted(given):
            raise ValueError(f"Give either a loaded model or its name, not both: model and {', '.join(named)}.")
        return cls(EmbedderSpec.of(model), model)

    def __call__(self) -> Embedder:
        """The embedder. Raises the errors of `EmbedderSpec.open`."""
        if self._embedder is None:
            self._embedder = self.spec.open()
        return self._embedder

    @property
    def current_spec(self) -> EmbedderSpec:
        """The spec; once the embedder is open, with the identity of its weights."""
        if self._embedder is None:
            return self.spec
        return dataclasses.replace(self.spec, weights=str(self._embedder.stamp["weights"]))

    def __getstate__(self) -> dict[str, Any]:
        """State for pickling. Raises ValueError for a model in memory only, which could not be loaded again."""
        from c2v_rag.remote import RemoteModel

        if isinstance(self._embedder, RemoteModel):
            return {"spec": self.spec, "_embedder": self._embedder}
        if not self.spec.name_or_path:
            raise ValueError("A model that exists in memory only cannot be pickled: save it and give its folder.")
        return {"spec": self.current_spec, "_embedder": None}


def load_embedder(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **llm_kwargs: Any,
) -> Embedder:
    """A `RemoteModel` for the http(s) address of a server, else `shared_model` with the same arguments.

    Raises ValueError for an address together with arguments that only the server can choose.
    """
    name = os.fspath(name_or_path)
    if not is_url(name):
        return shared_model(name, revision=revision, device=device, dtype=dtype, **llm_kwargs)
    given = {"revision": revision, "device": device, "dtype": dtype, **llm_kwargs}
    if unused := sorted(key for key, value in given.items() if value is not None):
        raise ValueError(f"{', '.join(unused)}: the server at {name} has chosen that already. Leave it out.")
    from c2v_rag.remote import RemoteModel

    return RemoteModel(name)


class _SharedModel:
    """A model of this process, and the lock for loading it. Different models can be loaded at the same time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: Causal2Vec | None = None


_shared_models: dict[tuple[object, ...], _SharedModel] = {}
_shared_models_lock = threading.Lock()


def shared_model(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **llm_kwargs: Any,
) -> Causal2Vec:
    """Load a model with `Causal2Vec.from_pretrained`, once: later calls with equal arguments return the same model.

    Frameworks create many embedding objects. All of them share one model in this process. The device or dtype `None`
    equals the default that it stands for.
    """
    from c2v_rag import inference
    from c2v_rag.model import Causal2Vec

    resolved = inference.resolve_device(device)
    resolved_dtype = inference.resolve_dtype(dtype, resolved)
    key = (os.fspath(name_or_path), revision, str(resolved), str(resolved_dtype), repr(sorted(llm_kwargs.items())))
    with _shared_models_lock:
        shared = _shared_models.setdefault(key, _SharedModel())
    with shared.lock:
        if shared.model is None:
            shared.model = Causal2Vec.from_pretrained(
                name_or_path, revision=revision, device=device, dtype=dtype, **llm_kwargs
            )
        return shared.model


def release_shared_models() -> None:
    """Remove every model that `shared_model` has stored, to free memory; the next call loads the model again."""
    with _shared_models_lock:
        _shared_models.clear()
