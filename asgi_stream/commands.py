"""The commands of ``asgi-stream``. Imported by `asgi_stream.cli` once it knows that typer is there."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from asgi_stream import __version__
from asgi_stream.errors import require

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Real-time event delivery for ASGI applications.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"asgi-stream {__version__}")
        raise typer.Exit


@cli.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Real-time event delivery for ASGI applications."""


@cli.command()
def demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    speed: Annotated[float, typer.Option(min=0.1, max=1000, help="Tokens a second of the built-in model.")] = 25.0,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Open streams per user.")] = 5,
) -> None:
    """Show a page that streams tokens, hits the limit and cuts connections.

    The tokens come from OPENAI_BASE_URL (with OPENAI_API_KEY, OPENAI_MODEL) if it is set, else from a local server
    that speaks the same protocol.
    """
    for module in ("fastapi", "uvicorn", "httpx"):
        require(module, extra="demo")
    from asgi_stream.demo.server import PortTakenError, run

    try:
        run(host=host, port=port, browser=browser, speed=speed, limit=limit)
    except PortTakenError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None
