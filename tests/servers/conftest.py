"""The report of these tests: every cell of the matrix with its time."""

from __future__ import annotations

import pytest

cells: dict[tuple[str, str], float] = {}
"""From (framework, server) to the seconds from the server's notice to the producer's end."""

endings: dict[str, float] = {}
"""From a way to stop a server to the seconds until it had ended, streams open."""

slots: dict[str, float] = {}
"""From a way to hold leases to the longest seconds from the server's notice of a stream's end to its free slot."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if cells:
        terminalreporter.section("client leaves → producer closed, ms")
        servers = sorted({server for _, server in cells})
        terminalreporter.line(f"{'':12}" + "".join(f"{server:>20}" for server in servers))
        for framework in sorted({framework for framework, _ in cells}):
            values = [cells.get((framework, server)) for server in servers]
            row = "".join(f"{'-' if value is None else f'{value * 1000:.1f}':>20}" for value in values)
            terminalreporter.line(f"{framework:12}{row}")
    if endings:
        terminalreporter.section("signal → server ended, streams open, s")
        for name, seconds in endings.items():
            terminalreporter.line(f"{name:45}{seconds:.2f}")
    if slots:
        terminalreporter.section("stream over → slot free, longest, ms")
        for name, seconds in slots.items():
            terminalreporter.line(f"{name:45}{seconds * 1000:.2f}")
