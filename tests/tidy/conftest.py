"""Reports the size of the product at the end of a tidy run."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.tidy.source import product


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the product's lines of Python, blank ones and generated code not counted, by package."""
    lines: Counter[str] = Counter()
    for module in product():
        lines[module.package] += module.lines
    parts = ", ".join(f"{package.removeprefix('mainspring_')} {count}" for package, count in lines.most_common())
    terminalreporter.write_line(f"product: {lines.total()} lines of Python ({parts})")
