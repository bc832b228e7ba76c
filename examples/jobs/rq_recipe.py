"""RQ: a job whose progress is streamed.

    rq worker --url "$REDIS_URL" builds     # the worker
    python rq_recipe.py                      # orders a run and follows it, as a web process would

RQ runs each job in a process forked from the worker; asgi_stream makes its connections anew there.
"""

import os
import time

from redis import Redis
from rq import Queue, Retry

from asgi_stream import StreamContext, SyncStreamChannel


def build(ctx_dict: dict, steps: int) -> None:
    with StreamContext.from_dict(ctx_dict) as ctx:
        ctx.begin_attempt()
        ctx.log(f"pid {os.getpid()}")
        for _ in ctx.track(range(steps), step="building"):
            time.sleep(0.01)
        ctx.complete(artifact="build.whl")


if __name__ == "__main__":
    import rq_recipe  # by the name under which the worker finds it

    queue = Queue("builds", connection=Redis.from_url(os.environ["REDIS_URL"]))
    ctx = StreamContext.create("ann")
    ctx.queued()
    queue.enqueue(rq_recipe.build, ctx.to_dict(), 20, retry=Retry(max=2))
    for event in SyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
