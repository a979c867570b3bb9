"""The page's message for an error."""

from __future__ import annotations

from c2v_rag.app.task import Stopped


def reason(error: Exception) -> str:
    """The message for people; the type's name too if the text of a library's own exception may not be enough."""
    if isinstance(error, Stopped):
        return "Stopped."
    if isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
        return str(error)
    return f"{type(error).__name__}: {error}"
