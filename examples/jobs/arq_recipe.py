"""arq: a coroutine whose progress is streamed.

    arq arq_recipe.WorkerSettings     # the worker
    python arq_recipe.py              # orders a run and follows it, as a web process would

arq's newer releases ask for a redis-py below 6, which asgi_stream cannot use; pip then takes arq 0.25,
whose worker does not start on Python 3.14.
"""

import asyncio
import os

from arq import create_pool
from arq.connections import RedisSettings

from asgi_stream import AsyncStreamChannel, StreamContext, shutdown_streaming


async def build(arq_context: dict, ctx_dict: dict, steps: int) -> None:
    async with StreamContext.from_dict(ctx_dict) as ctx:
        await ctx.begin_attempt_async()
        await ctx.log_async(f"pid {os.getpid()}")
        for step in range(steps):
            await ctx.progress_async(100 * step / steps, step="building")
            ctx.raise_if_cancelled()
            await asyncio.sleep(0.01)
        await ctx.complete_async(artifact="build.whl")


class WorkerSettings:
    functions = (build,)
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])


async def main() -> None:
    pool = await create_pool(WorkerSettings.redis_settings)
    ctx = StreamContext.create("ann")
    await ctx.queued_async()
    await pool.enqueue_job("build", ctx.to_dict(), 20)
    async for event in AsyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
    await shutdown_streaming()


if __name__ == "__main__":
    asyncio.run(main())
