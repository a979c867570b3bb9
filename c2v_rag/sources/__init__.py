"""Documents from files, folders, tables, and the Python standard library's own docstrings."""

from __future__ import annotations

from c2v_rag.sources.docstrings import PYTHON_DOCS, python_docs
from c2v_rag.sources.document import Document, Format
from c2v_rag.sources.files import files_below, read_sources, source_of

__all__ = ["PYTHON_DOCS", "Document", "Format", "files_below", "python_docs", "read_sources", "source_of"]
