"""The facts on the page's tab "About": model, device, collection, speed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from c2v_rag import __version__
from c2v_rag.app import render
from c2v_rag.index import StoreAddress, VectorIndex, store_name
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder

SPEED_TEXTS = 64


def facts(model: Embedder, store: StoreAddress, index: VectorIndex | None) -> dict[str, Any]:
    """Rows of the tab "About", by label. The speed is measured now, on passages of the collection."""
    rows: dict[str, Any] = {"c2v-rag": __version__, "store": store_name(store)}
    rows |= {name: value for name, value in model.stamp.items() if value != ""}
    if isinstance(model, Causal2Vec):
        rows |= {
            "device": model.device,
            "dtype": str(model.dtype).removeprefix("torch."),
            "decoder layers": model.llm.config.get_text_config().num_hidden_layers,
            "longest text": f"{model.config.max_length} tokens in the decoder, "
            f"{model.config.encoder_max_length} in the encoder",
        }
    if index is not None:
        rows["passages"] = f"{len(index):,}"
        if isinstance(model, Causal2Vec):
            command = f"c2v-rag adapt --store {store_name(store)} --collection COLLECTION --output runs/adapted"
            rows["train it on these documents"] = command
        rows |= _measure(model, [chunk.text for chunk in islice(index.chunks(), SPEED_TEXTS)])
    return rows


def _measure(model: Embedder, texts: list[str]) -> Mapping[str, str]:
    if not texts:
        return {}
    started = time.perf_counter()
    model.encode_document(texts)
    documents = time.perf_counter() - started
    started = time.perf_counter()
    model.encode_query(["how fast is one query?"])
    query = time.perf_counter() - started
    speed = f"{len(texts) / documents:.0f} passages/s"
    if isinstance(model, Causal2Vec):
        speed += f", {sum(model.count_tokens(texts)) / documents:,.0f} tokens/s"
    return {"measured now": f"{speed}; one query {render.milliseconds(query)}"}
