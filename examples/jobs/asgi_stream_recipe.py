"""The queue of asgi_stream itself (extra `queue`).

    asgi-stream worker asgi_stream_recipe:registry     # the worker
    python asgi_stream_recipe.py                       # orders a run and follows it, as a web process would

Attempts, retries, timeouts and endings are the queue's matter; the task only tells how it goes.
"""

import os
import time

from asgi_stream import StreamContext, SyncStreamChannel
from asgi_stream.job_queue import QueueManager


def build(entity: dict) -> None:
    ctx = StreamContext.from_dict(entity["ctx"])
    ctx.log(f"pid {os.getpid()}")
    for _ in ctx.track(range(entity["steps"]), step="building"):
        time.sleep(0.01)
    ctx.complete(artifact="build.whl")


registry = {"build": build}

if __name__ == "__main__":
    ctx = StreamContext.create("ann")
    QueueManager().enqueue(entity={"ctx": ctx.to_dict(), "steps": 20}, processor="build")
    for event in SyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
