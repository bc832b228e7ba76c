"""The command line: ``asgi-stream`` and ``python -m asgi_stream``."""

from __future__ import annotations

import sys

from asgi_stream.errors import MissingExtraError, require


def main() -> None:
    """Run the command line. A missing extra is one line on stderr, not a traceback."""
    try:
        require("typer", extra="cli")
        from asgi_stream.commands import cli

        cli()
    except MissingExtraError as exc:
        print(exc, file=sys.stderr)
        raise SystemExit(1) from None
