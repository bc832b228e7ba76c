"""What the workers of these tests can do, and the worker program: ``python -m tests.job_queue.operations``."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from asgi_stream import StreamContext
from asgi_stream.job_queue import QueueConfig, QueueWorker


def deploy_task(entity: dict[str, Any]) -> None:
    """The task of the README."""
    ctx = StreamContext.from_dict(entity["stream_ctx"])
    ctx.log("🚀 Starting deployment...")
    ctx.progress(10, step="building")
    ctx.complete(success=True, deployment_id="abc123")


def short_task(entity: dict[str, Any]) -> None:
    StreamContext.from_dict(entity["ctx"]).log("short")


async def answer(entity: dict[str, Any]) -> Any:
    ctx = StreamContext.from_dict(entity["ctx"])
    await ctx.log_async("thinking")
    return {"answer": 42}


def unserialisable(entity: dict[str, Any]) -> Any:
    StreamContext.from_dict(entity["ctx"]).log("done")
    return object()


def raises(entity: dict[str, Any]) -> None:
    StreamContext.from_dict(entity["ctx"]).log("about to fail")
    raise ValueError("a secret of the task")


def fails_once(entity: dict[str, Any]) -> None:
    ctx = StreamContext.from_dict(entity["ctx"])
    ctx.log(f"attempt {ctx.attempt}")
    if ctx.attempt == 1:
        raise ValueError("only the first time")


def exits(entity: dict[str, Any]) -> None:
    sys.exit(3)


async def hangs_async(entity: dict[str, Any]) -> None:
    async with StreamContext.from_dict(entity["ctx"]) as ctx:
        await ctx.log_async("hanging")
        await asyncio.Event().wait()


def hangs_sync(entity: dict[str, Any]) -> None:
    ctx = StreamContext.from_dict(entity["ctx"])
    ctx.log("hanging")
    while True:
        time.sleep(0.01)


def hangs_in_c(entity: dict[str, Any]) -> None:
    StreamContext.from_dict(entity["ctx"]).log("hanging")
    time.sleep(3600)


def polite(entity: dict[str, Any]) -> None:
    """Stops when it is asked to, and cleans up."""
    with StreamContext.from_dict(entity["ctx"]) as ctx:
        ctx.log("working")
        try:
            while True:
                time.sleep(0.01)
                ctx.raise_if_cancelled()
        finally:
            ctx.log("cleaned up")


def ends_its_run(entity: dict[str, Any]) -> int:
    """Ends its run as it is told, and returns."""
    ctx = StreamContext.from_dict(entity["ctx"])
    ctx.log("ending")
    if entity["ending"] == "cancelled":
        ctx.end_cancelled("enough")
    elif entity["ending"] == "failed":
        ctx.fail("no_disk", "the disk is full")
    else:
        ctx.complete()
    return 7


def steps(entity: dict[str, Any]) -> None:
    """Says a line every so often, with its attempt and its process."""
    ctx = StreamContext.from_dict(entity["ctx"])
    for n in range(entity["steps"]):
        ctx.data("step", {"n": n, "attempt": ctx.attempt, "pid": os.getpid()})
        time.sleep(entity.get("pause", 0.02))


async def steps_async(entity: dict[str, Any]) -> None:
    ctx = StreamContext.from_dict(entity["ctx"])
    for n in range(entity["steps"]):
        await ctx.data_async("step", {"n": n, "attempt": ctx.attempt, "pid": os.getpid()})
        await asyncio.sleep(entity.get("pause", 0.02))


def count(entity: dict[str, Any]) -> None:
    """Leaves a line in a file: one write, so lines of several processes do not mix."""
    with Path(entity["file"]).open("ab", buffering=0) as file:
        file.write(b"%d\n" % entity["n"])


def nothing(entity: Any) -> None:
    pass


registry = {
    "infra.deploy.service.deploy_task": deploy_task,
    **{
        f"{function.__module__}.{function.__qualname__}": function
        for function in (
            *(short_task, answer, unserialisable, raises, fails_once, exits, hangs_async, hangs_sync, hangs_in_c),
            *(polite, ends_its_run, steps, steps_async, count, nothing),
        )
    },
}


def config(url: str, queue: str, **settings: Any) -> QueueConfig:
    made: dict[str, Any] = {"redelivery_timeout": 2.0, "cancel_timeout": 1.0, "retry_delay": 0.1, **settings}
    return QueueConfig(url, queue, **made)


def main() -> None:
    import json
    import logging

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("docket").setLevel(logging.WARNING)
    settings = json.loads(sys.argv[2])
    slots = settings.pop("slots", 4)
    made = config(os.environ["REDIS_URL"], sys.argv[1], **settings)
    # Under their names elsewhere, not those they have in the program that was started.
    from tests.job_queue import operations

    made.operations_registry.update(operations.registry)
    asyncio.run(QueueWorker(made, max_workers=slots).start())


if __name__ == "__main__":
    main()
