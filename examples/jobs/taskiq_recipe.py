"""taskiq: a task whose progress is streamed.

taskiq worker taskiq_recipe:broker --workers 1     # the worker
python taskiq_recipe.py                            # orders a run and follows it, as a web process would
"""

import asyncio
import os

from taskiq_redis import RedisStreamBroker

from asgi_stream import AsyncStreamChannel, StreamContext, shutdown_streaming

broker = RedisStreamBroker(os.environ["REDIS_URL"])


@broker.task(task_name="build")
async def build(ctx_dict: dict, steps: int) -> None:
    async with StreamContext.from_dict(ctx_dict) as ctx:
        await ctx.begin_attempt_async()
        await ctx.log_async(f"pid {os.getpid()}")
        for step in range(steps):
            await ctx.progress_async(100 * step / steps, step="building")
            ctx.raise_if_cancelled()
            await asyncio.sleep(0.01)
        await ctx.complete_async(artifact="build.whl")


async def main() -> None:
    await broker.startup()
    ctx = StreamContext.create("ann")
    await ctx.queued_async()
    await build.kiq(ctx.to_dict(), 20)
    async for event in AsyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
    await broker.shutdown()
    await shutdown_streaming()


if __name__ == "__main__":
    asyncio.run(main())
