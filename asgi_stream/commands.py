"""The commands of ``asgi-stream``. Imported by `asgi_stream.cli` once it knows that typer is there."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from asgi_stream import __version__
from asgi_stream.errors import StreamError, require

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
    redis_url: Annotated[str | None, typer.Option(help="A Redis to use instead of an embedded one.")] = None,
) -> None:
    """Show a page that streams tokens, hits the limit, and follows a job over killed workers and restarts of Redis.

    The tokens come from OPENAI_BASE_URL (with OPENAI_API_KEY, OPENAI_MODEL) if it is set, else from a local server
    that speaks the same protocol. Two web processes, two workers and a Redis are started, and end with the demo.
    """
    for module in ("fastapi", "uvicorn", "httpx", "docket"):
        require(module, extra="demo")
    from asgi_stream.demo.server import run

    try:
        run(host=host, port=port, browser=browser, speed=speed, limit=limit, redis_url=redis_url)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None


@cli.command("run", context_settings={"ignore_unknown_options": True})
def run_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="What to run.", show_default=False)],
    redis_url: Annotated[str | None, typer.Option(envvar="REDIS_URL", help="Redis; default: an embedded one.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Serve the page until Ctrl-C, also after the command.")] = False,
) -> None:
    """Run a command and stream its output to a page, and to `asgi-stream tail` in other terminals.

    Ends with the command's own exit code.
    """
    require("uvicorn", extra="demo")
    from asgi_stream.runner.server import run

    try:
        code = run(command, redis_url=redis_url, port=port, browser=browser, keep=keep)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


@cli.command()
def worker(
    registry: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:NAME", help="A dict of operations, a QueueConfig or a QueueWorker.", show_default=False
        ),
    ],
    redis_url: Annotated[
        str | None, typer.Option(envvar="REDIS_URL", help="The queue's Redis, for a dict of operations.")
    ] = None,
    queue: Annotated[str, typer.Option(help="The queue's name, for a dict of operations.")] = "default",
    max_workers: Annotated[int, typer.Option(min=1, max=10_000, help="Jobs at once.")] = 4,
    archive: Annotated[bool, typer.Option("--archive", help="Do the archiver's work as well.")] = False,
) -> None:
    """Do the jobs of a queue until Ctrl-C or SIGTERM, which lets them finish. A second one hands them back."""
    require("docket", extra="queue")
    from asgi_stream.job_queue.command import run

    try:
        run(registry, redis_url=redis_url, queue=queue, max_workers=max_workers, archive=archive)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None


@cli.command()
def tail(
    channel: Annotated[str, typer.Argument(help="The channel's id.", show_default=False)],
    redis_url: Annotated[
        str, typer.Option(envvar="REDIS_URL", help="Where the channel is.")
    ] = "redis://localhost:6379/0",
    after: Annotated[str | None, typer.Option(help="Begin after the event with this id.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with id, event and data.")] = False,
) -> None:
    """Print a channel's events, from the beginning of its history to the run's end.

    Exits with 0 if the run succeeded, else with 1 or the exit code of a command that was run.
    """
    from asgi_stream.runner.tail import follow

    try:
        code = follow(channel, redis_url, after=after, as_json=json)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(code)


@cli.command()
def archiver(
    redis_url: Annotated[
        str, typer.Option(envvar="REDIS_URL", help="The channels' Redis.")
    ] = "redis://localhost:6379/0",
) -> None:
    """Write the record of events into OpenSearch until Ctrl-C or SIGTERM. Any number of them share the work.

    Publishers need OPENSEARCH_WRITER=archiver (and ASGI_STREAM_ENABLE_STORAGE=1), or writer="archiver". OPENSEARCH_HOST
    and the other variables of that kind say where the record is.
    """
    require("opensearchpy", extra="opensearch")
    from asgi_stream.storage.command import archive

    try:
        archive(redis_url)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None


storage = typer.Typer(no_args_is_help=True, help="Look after the record of events in OpenSearch (OPENSEARCH_HOST, …).")
cli.add_typer(storage, name="storage")


@storage.command("setup")
def set_up_storage() -> None:
    """Install the index template and, for a data stream, the retention policy."""
    _storage("setup")


@storage.command("prune")
def prune_storage(
    days: Annotated[
        int | None,
        typer.Option(min=1, envvar="OPENSEARCH_RETENTION_DAYS", help="Keep so many days.", show_default=False),
    ] = None,
) -> None:
    """Delete what is older than so many days."""
    _storage("prune", days)


@storage.command("status")
def show_storage(
    redis_url: Annotated[
        str | None, typer.Option(envvar="REDIS_URL", help="Show what waits there for an archiver, too.")
    ] = None,
) -> None:
    """Show what the record holds, and what waits to be written."""
    _storage("status", redis_url)


def _storage(verb: str, *arguments: object) -> None:
    require("opensearchpy", extra="opensearch")
    from asgi_stream.storage import command

    try:
        getattr(command, verb)(*arguments)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None


leases = typer.Typer(no_args_is_help=True, help="See and take away the leases of open streams.")
cli.add_typer(leases, name="leases")

RedisURL = Annotated[str, typer.Option(envvar="REDIS_URL", help="Where the leases are.")]
Namespace = Annotated[
    str | None,
    typer.Option(
        envvar="ASGI_STREAM_LEASE_KEY_NAMESPACE", help="What their keys begin with.", show_default="stream_leases"
    ),
]


@leases.command("list")
def list_leases(
    user: Annotated[str | None, typer.Argument(help="Only this user's.", show_default=False)] = None,
    redis_url: RedisURL = "redis://localhost:6379/0",
    namespace: Namespace = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List who holds which leases, the oldest first, in all processes. Looks through all keys if no user is named."""
    from asgi_stream.leases.command import show

    try:
        show(user, redis_url=redis_url, namespace=namespace, as_json=json)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None


@leases.command("revoke")
def revoke_leases(
    user: Annotated[str | None, typer.Option(help="All leases of this user.", show_default=False)] = None,
    lease: Annotated[str | None, typer.Option(help="This one lease.", show_default=False)] = None,
    redis_url: RedisURL = "redis://localhost:6379/0",
    namespace: Namespace = None,
) -> None:
    """Take leases away: their streams end with `close` (`revoked`). Exits with 1 if there was none."""
    from asgi_stream.leases.command import revoke

    try:
        count = revoke(user, lease, redis_url=redis_url, namespace=namespace)
    except StreamError as exc:
        print(exc, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{count} revoked")
    raise typer.Exit(0 if count else 1)
