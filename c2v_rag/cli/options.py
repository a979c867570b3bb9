"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Store = Annotated[
    str,
    typer.Option(
        help="Folder of the index, or the URL of a Chroma server, such as http://localhost:8000 or "
        "https://USER:PASSWORD@HOST:PORT/PATH?tenant=T&database=D; unless given, the port is 80 or 443. For a server, "
        "the environment can give CHROMA_TENANT, CHROMA_DATABASE, C2V_RAG_CHROMA_HEADERS (a JSON object such as "
        '{"Authorization": "Bearer KEY"}) and, for Chroma Cloud, CHROMA_API_KEY.'
    ),
]
Collection = Annotated[str, typer.Option(help="Name of the Chroma collection.")]
ModelName = Annotated[str, typer.Option(help='"default", a checkpoint folder, or a Hugging Face Hub id.')]
EmbedderName = Annotated[
    str,
    typer.Option("--model", help='"default", a checkpoint folder, a Hugging Face Hub id, or the URL of a server.'),
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; unless given, the first of them that is available.")
]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; unless given, the best one for the hardware.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help='Run on a Ray cluster at this address. "local" starts one here; "auto" uses a running one or starts one.',
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="With --ray: number of processes that embed; unless given, one for each GPU, or one."),
]
RayGpus = Annotated[
    float | None, typer.Option(min=0, help="With --ray: GPUs for each process; unless given, 1 if the cluster has any.")
]
WriterModel = Annotated[str | None, typer.Option(help="Name of the model on the writer's server.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
