"""A text to search for, with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Scalar = str | int | float | bool
Format = Literal["text", "markdown", "rst", "python"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to search for, its source, and metadata that results show (strings, numbers, booleans).

    `title`: a name for people, such as a heading; "" if there is none. `format`: how the text shows its structure.
    "markdown" and "rst" are cut along headings, "python" along functions and classes.
    """

    text: str
    source: str
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    title: str = ""
    format: Format = "text"
