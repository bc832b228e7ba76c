"""Dramatiq: an actor whose progress is streamed.

    dramatiq dramatiq_recipe --processes 1 --threads 2     # the worker
    python dramatiq_recipe.py                              # orders a run and follows it, as a web process would

Dramatiq delivers a message again when its worker died, and retries an actor that raised: leave the `with` block to end
the run only where it shall not be retried.
"""

import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from asgi_stream import StreamContext, SyncStreamChannel

dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))


@dramatiq.actor(max_retries=0)
def build(ctx_dict: dict, steps: int) -> None:
    with StreamContext.from_dict(ctx_dict) as ctx:
        ctx.begin_attempt()
        ctx.log(f"pid {os.getpid()}")
        for _ in ctx.track(range(steps), step="building"):
            time.sleep(0.01)
        ctx.complete(artifact="build.whl")


if __name__ == "__main__":
    ctx = StreamContext.create("ann")
    ctx.queued()
    build.send(ctx.to_dict(), 20)
    for event in SyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
