"""The page, made with Gradio: search, ask, add documents, map, about. It loads nothing from other servers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from c2v_rag.app import render, render_answer
from c2v_rag.app.about import facts
from c2v_rag.app.access import Logins, check_access, is_only_local
from c2v_rag.app.add_tab import AddTab
from c2v_rag.app.ask_tab import AskTab
from c2v_rag.app.collections import Collections
from c2v_rag.app.errors import reason
from c2v_rag.app.preparing import prepare
from c2v_rag.app.search import BM25, DEFAULT_METHODS, ENCODER, METHODS, Searcher
from c2v_rag.app.writers import DEFAULT, writer_opener
from c2v_rag.hosts import HostCheck
from c2v_rag.index import DEFAULT_COLLECTION, StoreAddress, check_mode
from c2v_rag.model import Causal2Vec
from c2v_rag.protocols import Embedder
from c2v_rag.sentences import best_sentences

PYTHON_QUESTIONS = (
    "How do I run several coroutines at the same time and wait for all of them?",
    "What splits a web address into its parts?",
    "How can I keep only the most recent results of an expensive function?",
    "How do I copy a whole folder tree?",
)
MAP_POINTS = 1500
NO_COMPARISON = "(nothing)"
# A click on a circle of the map sends its chunk's id to Python. The listener is on the element around the map, so that
# it still works after the map was drawn again.
_MAP_CLICK = (
    "element.addEventListener('click', event => { const id = event.target.dataset && event.target.dataset.id; "
    "if (id) trigger('click', {id: id}); });"
)


class SearchApp:
    """The search page of one store. It shows the store's collections that `model` made, and adds documents with it.

    `collection`: the collection that is shown first; it is created when documents are added. `is_local`: only this
    machine reaches the page. Only then can a visitor index its folders and create new collections. `writer`: the
    language model of the tab "Ask": "default" for the model's own decoder, a language model's folder or Hub id, or the
    URL of an OpenAI-compatible server, whose model is `writer_model`. It is loaded at the first question.

    Raises ValueError for a collection name that ends in ".encoder": the encoder's own vectors use such names; the
    errors of `EndpointWriter` for a server that cannot write.
    """

    def __init__(
        self,
        store: StoreAddress,
        model: Embedder,
        *,
        collection: str = DEFAULT_COLLECTION,
        is_local: bool = True,
        writer: str = DEFAULT,
        writer_model: str | None = None,
    ) -> None:
        self.store: Final = store
        self.model: Final = model
        self._is_local = is_local
        self._collections = Collections(store, model, collection)
        self._adding = AddTab(self._collections, lambda: self._is_local)
        self._asking = AskTab(self._collections, writer_opener(writer, writer_model, model))
        self.add: Final = self._adding.add
        self.cancel: Final = self._adding.cancel
        self.ask: Final = self._asking.ask

    # The page

    @property
    def is_local(self) -> bool:
        """Whether a visitor can index folders of this machine and create new collections."""
        return self._is_local

    def collections(self) -> list[str]:
        """Names of the store's collections that this model made."""
        return self._collections.names()

    def methods(self) -> list[str]:
        """Names of the search methods. "Encoder alone" is among them only if the model runs in this process."""
        return [name for name in METHODS if isinstance(self.model, Causal2Vec) or name != ENCODER]

    def blocks(self) -> gr.Blocks:
        """The page as Gradio blocks, to launch or to mount in another app, which must then ask for a login itself."""
        with gr.Blocks(title="Causal2Vec search", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            with gr.Row(equal_height=True):
                gr.Markdown("# Search your documents")
                collection = gr.Dropdown(label="Collection", choices=[], scale=0, min_width=260)
            with gr.Tab("Search"):
                with gr.Row():
                    query = gr.Textbox(
                        label="Query", placeholder="Ask in your own words, then press Enter", scale=5, autofocus=True
                    )
                    search_button = gr.Button("Search", variant="primary", scale=1, min_width=90)
                with gr.Row(visible=False) as examples:
                    example_buttons = [gr.Button(text, size="sm") for text in PYTHON_QUESTIONS]
                with gr.Row():
                    methods = self.methods()
                    method = gr.Dropdown(label="Method", choices=methods, value=DEFAULT_METHODS[check_mode(None)])
                    other = gr.Dropdown(label="Compare with", choices=[NO_COMPARISON, *methods], value=NO_COMPARISON)
                    top_k = gr.Slider(1, 20, value=5, step=1, label="Passages")
                    by_source = gr.Checkbox(True, label="One passage per source", min_width=120)
                results = gr.HTML(elem_id="results")
                search_inputs = [query, collection, method, other, top_k, by_source]
                # One listener for all inputs; only the latest request is answered, so that no older result replaces it.
                gr.on(
                    [
                        query.submit,
                        search_button.click,
                        collection.input,
                        method.input,
                        other.input,
                        top_k.release,
                        by_source.input,
                    ],
                    self.search,
                    search_inputs,
                    results,
                    trigger_mode="always_last",
                    show_progress="hidden",
                    concurrency_limit=4,
                    concurrency_id="search",
                )
                for button in example_buttons:
                    button.click(lambda text: text, button, query).then(
                        self.search, search_inputs, results, show_progress="hidden", concurrency_id="search"
                    )
            with gr.Tab("Ask"):
                self._asking.build(collection)
            with gr.Tab("Add documents"):
                self._adding.build(collection, examples, self.choices)
            with gr.Tab("Map") as map_tab:
                gr.Markdown(
                    "Near points are passages of similar meaning. Colours are sources. Click a point to read it."
                )
                plot = gr.HTML(elem_id="map", js_on_load=_MAP_CLICK)
                chosen = gr.HTML(elem_id="chosen")
                map_tab.select(self.map, collection, plot)
                plot.click(self.chosen, collection, chosen)
            with gr.Tab("About") as about_tab:
                about = gr.HTML(elem_id="about")
                about_tab.select(self.about, collection, about)
            page.load(self.choices, gr.State(self._collections.first), [collection, examples])
        blocks: gr.Blocks = page
        return blocks

    def launch(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = 7860,
        wait: bool = True,
        auth: Logins = (),
        allowed_hosts: Sequence[str] = (),
    ) -> tuple[gr.Blocks, str]:
        """Serve the page, and return it and its address. With `wait`, the call returns after Ctrl-C.

        `auth`: pairs of user and password; if there are any, the page asks for a login. `allowed_hosts`: names of this
        server besides `host`, localhost and IP addresses, such as a proxy's; other `Host` headers are refused.

        Raises ValueError if other machines reach the page and there is no `auth`, OSError if the port is taken.
        """
        check_access(host, allowed_hosts, auth)
        self._is_local = self._is_local and is_only_local(host, allowed_hosts)
        page = self.blocks()
        page.queue(max_size=64)
        hosts = Middleware(HostCheck, allowed_hosts=[host, *allowed_hosts], same_origin=True)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=list(auth) or None,
            app_kwargs={"middleware": [hosts]},
            ssr_mode=False,  # Node would answer first, without the middleware
            num_workers=0,  # static file workers would do the same
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            footer_links=[],
            max_file_size="200mb",
            css=render.CSS + render_answer.CSS,
            theme=gr.themes.Default(),
        )
        if wait:
            print(f"The page is at {address} (Ctrl-C stops it).", file=sys.stderr, flush=True)
            page.block_thread()
        return page, address

    # Handlers

    def choices(self, wanted: str) -> tuple[Any, Any]:
        """Updates of the collection list and of the example questions, which only Python's documentation has."""
        names = self.collections()
        value = wanted if wanted in names else (names[0] if names else None)
        about_python = False
        if value is not None:
            about_python = any(
                "kind" in chunk.metadata for chunk in islice(self._collections.to_search(value).index.chunks(), 50)
            )
        return gr.update(choices=names, value=value), gr.update(visible=about_python)

    def search(
        self, query: str, collection: str | None, method: str, other: str, top_k: int, by_source: bool = False
    ) -> Iterator[str]:
        """Yield progress messages while a method is prepared, then the results. An error is shown as a message."""
        query = query.strip()
        if not query:
            yield render.message("Type a question or a few words first, then press Enter.")
            return
        if collection is None:
            yield render.message(render.NOTHING_INDEXED)
            return
        try:
            searcher = self._collections.to_search(collection)
            if not len(searcher.index):
                yield render.message("This collection is empty. Open “Add documents” and give it some files.")
                return
            names = [method] if other in (NO_COMPARISON, method) else [method, other]
            for name in names:
                yield from prepare(searcher, name)
            yield self._results(searcher, query, names, int(top_k), by_source)
        except Exception as error:
            yield render.message(reason(error), "error")

    def _results(self, searcher: Searcher, query: str, names: list[str], top_k: int, by_source: bool) -> str:
        columns = []
        for name in names:
            started = time.perf_counter()
            hits = searcher.search(name, query, top_k, by_source=by_source)
            took = render.milliseconds(time.perf_counter() - started)
            timing = f"{len(hits)} of {len(searcher.index):,} passages in {took}"
            columns.append((name, METHODS[name], timing, hits))
        texts = {hit.id: hit.text for *_, hits in columns for hit in hits}
        model = None if names == [BM25] else self.model
        marked = dict(zip(texts, best_sentences(query, list(texts.values()), model), strict=True))
        return render.results(
            [(*column, [marked[hit.id] for hit in column[3]]) for column in columns], self._notices(query)
        )

    def _notices(self, query: str) -> list[str]:
        model = self.model
        if not isinstance(model, Causal2Vec):
            return []
        (length,) = model.count_tokens([query])
        if length <= model.max_tokens:
            return []
        return [
            f"Your query has {length:,} tokens; the encoder reads its first {model.config.encoder_max_length}, the "
            f"decoder its first {model.config.max_length}. BM25 uses all of it."
        ]

    def map(self, collection: str | None) -> str:
        """A map of the collection: two principal components of its embeddings, or of a sample of them."""
        if collection is None:
            return render.message("Nothing is indexed yet.")
        from sklearn.decomposition import PCA

        try:
            chunks = self._collections.to_search(collection).index.sample(MAP_POINTS)
        except Exception as error:
            return render.message(reason(error), "error")
        if len(chunks) < 3:
            return render.message("A map needs at least three passages.")
        embeddings = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
        return render.map_svg(chunks, PCA(2, random_state=0).fit_transform(embeddings))

    def chosen(self, collection: str, event: gr.EventData) -> str:
        """The passage of a point on the map."""
        try:
            chunk = self._collections.to_search(collection).index.get(str(event._data["id"]))
        except Exception as error:
            return render.message(reason(error), "error")
        if chunk is None:
            return render.message("This passage is no longer in the collection. Open the map again.")
        return render.chunk(chunk)

    def about(self, collection: str | None) -> str:
        """A table of model, device and dimensions, and of the speed on passages of the collection, measured now."""
        try:
            index = None if collection is None else self._collections.to_search(collection).index
            return render.table(facts(self.model, self.store, index))
        except Exception as error:
            return render.message(reason(error), "error")
