"""One resident model behind HTTP: OpenAI's embeddings API, with limits, keys and metrics."""
