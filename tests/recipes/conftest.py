"""The report of these tests: every runner with the process that did its job."""

from __future__ import annotations

import pytest

recipes: dict[str, str] = {}
"""From a runner to its line of the table."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if recipes:
        terminalreporter.section("recipes: the run of a job in a real worker")
        terminalreporter.line(f"{'':14}{'pid':>8}{'events':>10}{'order to ending, s':>22}")
        for runner, line in recipes.items():
            terminalreporter.line(f"{runner:14}{line}")
