"""A text to be found, and where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Scalar = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to be found, its source, and metadata to show with it (strings, numbers, booleans)."""

    text: str
    source: str
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
