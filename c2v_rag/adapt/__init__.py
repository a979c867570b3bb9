"""Adapt a model to a person's own documents: write questions, filter them, train, and report what was gained."""

from __future__ import annotations

from c2v_rag.adapt.report import AdaptReport
from c2v_rag.adapt.run import adapt

__all__ = ["AdaptReport", "adapt"]
