"""Celery: a task whose progress is streamed.

    celery -A celery_recipe worker --concurrency 2     # the worker
    python celery_recipe.py                            # orders a run and follows it, as a web process would

A task that is acknowledged late is delivered again when its worker dies; `begin_attempt` then tells the viewers, and
silences the first attempt if it lives after all.
"""

import os
import time

from celery import Celery

from asgi_stream import StreamContext, SyncStreamChannel

app = Celery("celery_recipe", broker=os.environ["REDIS_URL"])
app.conf.worker_hijack_root_logger = False
app.conf.broker_transport_options = {"visibility_timeout": 60}


@app.task(acks_late=True, reject_on_worker_lost=True)
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
    build.delay(ctx.to_dict(), 20)
    for event in SyncStreamChannel(ctx.channel_id).subscribe():
        print(event.event, event.text, flush=True)
