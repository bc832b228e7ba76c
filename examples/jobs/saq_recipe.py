"""SAQ: a function whose progress is streamed.

    saq saq_recipe.settings     # the worker
    python saq_recipe.py        # orders a run and follows it, as a web process would

Install SAQ without its extra `redis`, which asks for a redis-py below 8: `pip install saq typing-extensions`.
"""

import asyncio
import os

from saq import Queue

from asgi_stream import AsyncStreamChannel, StreamContext, shutdown_streaming

queue = Queue.from_url(os.environ["REDIS_URL"], name="builds")


async def build(saq_context: dict, *, ctx_dict: dict, steps: int) -> None:
    async with StreamContext.from_dict(ctx_dict) as ctx:
        await ctx.begin_attempt_async()
        await ctx.log_async(f"pid {os.getpid()}")
        for step in range(steps):
            await ctx.progress_async(100 * step / steps, step="building")
            ctx.raise_if_cancelled()
            await asyncio.sleep(0.01)
        await ctx.complete_async(artifact="build.whl")


settings = {"queue": queue, "functions": [build], "concurrency": 2}


async def main() -> None:
    ctx = StreamContext.create("ann")
    await ctx.queued_async()
    await queue.enqueue("build", ctx_dict=ctx.to_dict(), steps=20, retries=3, timeout=600, heartbeat=0)
    async for event in AsyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
    await queue.disconnect()
    await shutdown_streaming()


if __name__ == "__main__":
    asyncio.run(main())
