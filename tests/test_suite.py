"""The last lines that a run of these tests prints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import NO_CHROMIUM, pytest_terminal_summary


@pytest.mark.parametrize(
    ("reasons", "expected_lines"), [([f"Skipped: {NO_CHROMIUM}"] * 3 + ["other"], 1), (["other"], 0)]
)
def test_skipped_browser_tests_are_one_line_that_says_what_to_install(reasons: list[str], expected_lines: int) -> None:
    lines: list[str] = []
    skipped = [SimpleNamespace(longrepr=("test_browser.py", 1, reason)) for reason in reasons]
    reporter: Any = SimpleNamespace(stats={"skipped": skipped}, write_line=lambda line, **colours: lines.append(line))
    pytest_terminal_summary(reporter)
    assert len(lines) == expected_lines
    for line in lines:
        assert line.startswith("3 browser tests skipped: no Chromium; apt-get install chromium")
