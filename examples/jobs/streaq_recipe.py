"""streaq: a task whose progress is streamed.

streaq run streaq_recipe:worker     # the worker
python streaq_recipe.py         # orders a run and follows it, as a web process would
"""

import asyncio
import os

from streaq import Worker

from asgi_stream import AsyncStreamChannel, StreamContext, shutdown_streaming

worker = Worker(redis_url=os.environ["REDIS_URL"], queue_name="builds")


@worker.task(name="build")
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
    async with worker:
        ctx = StreamContext.create("ann")
        await ctx.queued_async()
        await build.enqueue(ctx.to_dict(), 20)
        async for event in AsyncStreamChannel(ctx.channel_id).subscribe():
            print(event.event, event.text, flush=True)
    await shutdown_streaming()


if __name__ == "__main__":
    asyncio.run(main())
