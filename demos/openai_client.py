"""Embed and search through the server with OpenAI's client. Start the server first: c2v-rag serve.

Needs c2v-rag[server] and: pip install openai numpy.
"""

import argparse
import os

import numpy as np
from openai import OpenAI

DOCUMENTS = [
    "Returns are free for 30 days; the label is in the box.",
    "Parcels leave our warehouse on the day of the order if it arrives before two o'clock.",
    "The battery lasts for eleven hours of video.",
    "Gift cards can be used for any product and never expire.",
]
QUESTIONS = ["How long can I send something back?", "When will my order be shipped?", "Does a gift voucher run out?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    arguments = parser.parse_args()
    # A server that was started without keys accepts any key, but the client wants one.
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key=os.environ.get("C2V_RAG_API_KEY", "none"))

    name = client.models.list().data[0].id
    documents = embed(client, name, DOCUMENTS)
    queries = embed(client, f"{name}:query", QUESTIONS)  # queries get the model's instruction, documents do not
    for question, scores in zip(QUESTIONS, queries @ documents.T, strict=True):
        print(f"{question}\n  {scores.max():.2f}  {DOCUMENTS[int(scores.argmax())]}")


def embed(client: OpenAI, model: str, texts: list[str]) -> np.ndarray:
    """(number of texts, columns) float32."""
    return np.array([row.embedding for row in client.embeddings.create(model=model, input=texts).data], np.float32)


if __name__ == "__main__":
    main()
