"""An HTTP server for one loaded model: OpenAI's embeddings API, with limits, API keys and metrics."""
