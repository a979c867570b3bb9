"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Store = Annotated[str, typer.Option(help="Folder of the index, or the http(s) URL of a Chroma server.")]
Collection = Annotated[str, typer.Option(help="Name of the Chroma collection.")]
ModelName = Annotated[str, typer.Option(help='"default", a checkpoint folder, or a Hugging Face Hub id.')]
EmbedderName = Annotated[
    str, typer.Option("--model", help='"default", a checkpoint folder, a Hugging Face Hub id, or the URL of a server.')
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the first there is unless given.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; what the hardware computes in unless given.")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help='Work on a Ray cluster; "local" starts one on this machine, "auto" where none is found.'
    ),
]
RayWorkers = Annotated[int | None, typer.Option(min=1, help="With --ray: processes that embed; one a GPU, or one.")]
RayGpus = Annotated[float | None, typer.Option(min=0, help="With --ray: GPUs of each; 1 where there are any.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
