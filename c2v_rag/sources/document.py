"""A text to search for, with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Scalar = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to search for, its source, and metadata that results show (strings, numbers, booleans)."""

    text: str
    source: str
    metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
