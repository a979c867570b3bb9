"""Index Python's own docstrings, then serve the search app at http://127.0.0.1:7860."""

from __future__ import annotations

import argparse

from quickstart import MODULES, documents_of

from c2v_rag import Causal2Vec, VectorIndex
from c2v_rag.app.page import SearchApp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="demo-store", help="folder of the index")
    parser.add_argument("--model", default="default")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()

    model = Causal2Vec.from_pretrained(arguments.model)
    VectorIndex(arguments.store, model).add(documents_of(MODULES), show_progress=True)
    SearchApp(arguments.store, model).launch(port=arguments.port)


if __name__ == "__main__":
    main()
