"""Which embedder is meant, and opening it: a model in this process, shared by all who ask for it, or a server's."""

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
    """Which embedder is meant: a name, how it is loaded, and which weights it must have.

    `name_or_path`: "default", a checkpoint folder, a Hugging Face Hub id, or the http(s) address of a server; "" for
    a model that exists in memory only. `llm_kwargs` go to the decoder's `from_pretrained`. `weights`: the expected
    identity, "weights" of a stamp; "" for any. `is_stored`: it comes out of stored data, not from the person who runs
    the program, so that an address in it is not opened. A spec never holds a key.
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
        """How a loaded embedder can be opened again, with the weights that it has now."""
        stamp = embedder.stamp
        arguments = getattr(embedder, "load_arguments", {})
        return cls(name_or_path=str(stamp["name"]), weights=str(stamp["weights"]), **arguments)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], *, place: str) -> EmbedderSpec:
        """The spec that `to_dict` wrote. ValueError, naming `place`, for a setting that this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)} - {"is_stored"}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{place} has unknown settings {unknown}. Upgrade c2v-rag.")
        return cls(**values, is_stored=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. ValueError where `llm_kwargs` holds something else."""
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
        """The embedder, loaded or already in this process.

        Raises ValueError for an address that comes out of stored data, unless a `RemoteModel` for it was made in this
        process, which is then used; for other weights than expected; and what loading raises.
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
        """ValueError where the embedder has other weights than those expected: vectors of both must not be mixed."""
        stamp = embedder.stamp
        if self.weights and not same_weights(self.weights, stamp):
            raise ValueError(
                f"The stored vectors were made with another model: weights {self.weights!r} of {self.name_or_path!r}, "
                f"which now has the weights {stamp['weights']!r}. It was trained or replaced since. Load the model "
                "that made the vectors, or embed the documents again with this one, into a new collection."
            )


class LazyEmbedder:
    """An embedder that is opened at its first use: what an integration holds.

    `LazyEmbedder(spec)` opens what the spec says; `LazyEmbedder.of` takes a loaded embedder or a name, as users give
    them. Pickled, it keeps the spec with the weights that were in use, and opens it again. A `RemoteModel` is kept
    itself, with its key.
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
        """A loaded embedder, or the one of this name and these arguments of `EmbedderSpec`.

        ValueError where both are given, since one of them would be ignored. `name_argument` is what the caller's own
        argument for the name is called.
        """
        given = {name: value for name, value in arguments.items() if value}
        if model is None:
            return cls(EmbedderSpec(name_or_path=DEFAULT if name_or_path is None else name_or_path, **given))
        if named := ([name_argument] if name_or_path is not None else []) + sorted(given):
            raise ValueError(f"Give either a loaded model or its name, not both: model and {', '.join(named)}.")
        return cls(EmbedderSpec.of(model), model)

    def __call__(self) -> Embedder:
        """The embedder. Raises what `EmbedderSpec.open` raises."""
        if self._embedder is None:
            self._embedder = self.spec.open()
        return self._embedder

    @property
    def current_spec(self) -> EmbedderSpec:
        """The spec, with the weights that are in use where it is open."""
        if self._embedder is None:
            return self.spec
        return dataclasses.replace(self.spec, weights=str(self._embedder.stamp["weights"]))

    def __getstate__(self) -> dict[str, Any]:
        """ValueError for a model that exists in memory only: it could not be loaded again."""
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
    """A `RemoteModel` for the http(s) address of a server, else `shared_model` with the same arguments."""
    name = os.fspath(name_or_path)
    if not is_url(name):
        return shared_model(name, revision=revision, device=device, dtype=dtype, **llm_kwargs)
    given = {"revision": revision, "device": device, "dtype": dtype, **llm_kwargs}
    if unused := sorted(key for key, value in given.items() if value is not None):
        raise ValueError(f"{', '.join(unused)}: the server at {name} has chosen that already. Leave it out.")
    from c2v_rag.remote import RemoteModel

    return RemoteModel(name)


class _Loading:
    """One model of this process: loaded once, while others load theirs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: Causal2Vec | None = None


_loaded: dict[tuple[object, ...], _Loading] = {}
_loaded_lock = threading.Lock()


def shared_model(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **llm_kwargs: Any,
) -> Causal2Vec:
    """`Causal2Vec.from_pretrained`, or the model it returned to an earlier call that meant the same.

    Frameworks build embedding objects over and over; they all get the one model in this process. `None` means the
    same as the device or dtype that it stands for.
    """
    import torch

    from c2v_rag import inference
    from c2v_rag.model import Causal2Vec

    resolved = torch.device(device) if device is not None else inference.default_device()
    resolved_dtype = inference.resolve_dtype(dtype, resolved)
    key = (os.fspath(name_or_path), revision, str(resolved), str(resolved_dtype), repr(sorted(llm_kwargs.items())))
    with _loaded_lock:
        loading = _loaded.setdefault(key, _Loading())
    with loading.lock:
        if loading.model is None:
            loading.model = Causal2Vec.from_pretrained(
                name_or_path, revision=revision, device=device, dtype=dtype, **llm_kwargs
            )
        return loading.model


def release_shared_models() -> None:
    """Let go of every model that `shared_model` keeps, to free their memory; the next call loads anew."""
    with _loaded_lock:
        _loaded.clear()
