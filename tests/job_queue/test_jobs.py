"""Jobs, from the order to the ending, with real worker processes [C7]."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asgi_stream import StreamContext
from asgi_stream.context import cancel_run
from asgi_stream.errors import (
    ConfigurationError,
    EnqueueError,
    InvalidEntityError,
    RunEndedError,
    UnknownProcessorError,
)
from asgi_stream.job_queue import Job, JobStatus, QueueConfig, QueueManager
from tests.job_queue import operations
from tests.job_queue.conftest import HANG, Jobs, Viewer, WorkerProcess

pytestmark = pytest.mark.anyio


async def outcome(job: Job) -> JobStatus:
    async with asyncio.timeout(HANG):
        while not (status := await job.status_async()).done:  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.01)
    return status


def order(jobs: Jobs, processor: Any, ctx: StreamContext | None = None, **more: Any) -> tuple[StreamContext, Job]:
    limits = {name: more.pop(name) for name in ("timeout", "retries", "redeliveries") if name in more}
    ctx = ctx or StreamContext.create("ann")
    return ctx, jobs.manager.enqueue(entity={"ctx": ctx.to_dict(), **more}, processor=processor, **limits)


async def test_the_code_of_the_readme(jobs: Jobs) -> None:
    jobs.worker()
    ctx = StreamContext.create(workspace_id="ann", project="web", env="prod", service="api")
    jobs.manager.enqueue(
        entity={"stream_ctx": ctx.to_dict(), "config": {"replicas": 2}}, processor="infra.deploy.service.deploy_task"
    )
    viewer = Viewer(ctx)
    assert await viewer.end() == ["queued", "started", "log", "progress", "complete"]
    assert viewer.data("complete")[0]["deployment_id"] == "abc123"
    assert viewer.data("log")[0]["message"] == "🚀 Starting deployment..."


async def test_the_shorter_form_names_the_function_and_ends_the_run(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.short_task)
    viewer = Viewer(ctx)
    assert await viewer.end() == ["queued", "started", "log", "complete"]
    assert job.processor == "tests.job_queue.operations.short_task"
    assert job.warning is None
    assert (await outcome(job)).state == "completed"


async def test_an_async_function_and_what_it_returned(jobs: Jobs) -> None:
    worker = jobs.worker()
    ctx = StreamContext.create("ann")
    job = await jobs.manager.enqueue_async({"ctx": ctx.to_dict()}, operations.answer)
    assert await Viewer(ctx).end() == ["queued", "started", "log", "complete"]
    status = await outcome(jobs.manager.job(job.id))
    assert status == JobStatus("completed", 1, status.worker, {"answer": 42}, None)
    assert status.worker is not None
    assert status.worker.endswith(f":{worker.pid}")


async def test_a_result_that_cannot_be_kept_is_no_failure(jobs: Jobs) -> None:
    worker = jobs.worker()
    ctx, job = order(jobs, operations.unserialisable)
    assert (await Viewer(ctx).end())[-1] == "complete"
    assert (await outcome(job)).result is None
    assert "what it returned is not kept" in worker.log()


async def test_a_job_without_a_context(jobs: Jobs) -> None:
    jobs.worker()
    assert (await outcome(jobs.manager.enqueue("anything", operations.nothing))).state == "completed"


async def test_a_job_that_raises(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.raises)
    viewer = Viewer(ctx)
    assert await viewer.end() == ["queued", "started", "log", "failed"]
    (failed,) = viewer.data("failed")
    assert (failed["code"], failed["retryable"]) == ("ValueError", False)
    assert "secret" not in str(failed)  # [W5]
    status = await outcome(job)
    assert (status.state, status.error) == ("failed", "ValueError: a secret of the task")


async def test_a_job_that_is_tried_again(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.fails_once, retries=2)
    viewer = Viewer(ctx)
    assert await viewer.end() == [
        *("queued", "started", "log", "log", "queued"),
        *("attempt_lost", "started", "log", "complete"),
    ]
    assert [started["attempt"] for started in viewer.data("started")] == [1, 2]
    assert "ValueError" in viewer.data("log")[1]["message"]
    assert (await outcome(job)).state == "completed"


async def test_a_job_that_always_fails_is_tried_as_often_as_it_may_be(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.raises, retries=2)
    viewer = Viewer(ctx)
    assert (await viewer.end()).count("started") == 3
    assert viewer.told[-1] == "failed"
    assert (await outcome(job)).state == "failed"


async def test_a_job_that_exits_does_not_take_its_worker_along(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.exits)
    assert (await Viewer(ctx).end())[-1] == "failed"
    assert (await outcome(job)).error == "JobExited: SystemExit: 3"
    assert (await outcome(jobs.manager.enqueue(None, operations.nothing))).state == "completed"


@pytest.mark.parametrize("function", [operations.hangs_async, operations.hangs_sync, operations.hangs_in_c])
async def test_a_job_that_hangs_past_its_timeout(jobs: Jobs, function: Any) -> None:
    worker = jobs.worker()
    ctx, job = order(jobs, function, timeout=0.3)
    viewer = Viewer(ctx)
    assert await viewer.end() == ["queued", "started", "log", "failed"]
    assert viewer.data("failed")[0]["code"] == "timeout"
    status = await outcome(job)
    assert (status.state, status.error) == ("failed", "timeout: it ran for longer than 0.3 s")
    assert ("its function does not stop" in worker.log()) == (function is operations.hangs_in_c)
    assert (await outcome(jobs.manager.enqueue(None, operations.nothing))).state == "completed"


async def test_a_worker_whose_slots_are_all_held_by_hanging_functions_ends(jobs: Jobs) -> None:
    worker = jobs.worker(slots=1, cancel_timeout=0.1)
    _, job = order(jobs, operations.hangs_in_c, timeout=0.1)
    assert (await outcome(job)).state == "failed"
    assert await asyncio.to_thread(worker.ended) == 1
    assert "start this worker anew" in worker.log()


@pytest.mark.parametrize("function", [operations.hangs_async, operations.hangs_sync, operations.polite])
async def test_a_viewer_cancels_a_running_job(jobs: Jobs, function: Any) -> None:
    jobs.worker()
    ctx, job = order(jobs, function)
    viewer = Viewer(ctx)
    await viewer.until("log")
    await cancel_run(ctx.streaming, ctx.channel_id, "the user left")  # what DELETE of StreamApp does
    told = await viewer.end()
    assert told[-1] == "cancelled"
    assert viewer.data("cancelled")[0]["reason"] == "the user left"
    if function is operations.polite:
        assert viewer.data("log")[-1]["message"] == "cleaned up"
    assert (await outcome(job)).state == "cancelled"
    assert (await outcome(jobs.manager.enqueue(None, operations.nothing))).state == "completed"


@pytest.mark.parametrize("ending", ["complete", "cancelled", "failed"])
async def test_a_job_that_ends_its_own_run_stands_as_the_run_does(jobs: Jobs, ending: str) -> None:
    jobs.worker()
    ctx, job = order(jobs, operations.ends_its_run, ending=ending)
    assert await Viewer(ctx).end() == ["queued", "started", "log", ending]
    status = await outcome(job)
    assert status.state == {"complete": "completed"}.get(ending, ending)
    assert status.result == (7 if ending == "complete" else None)


@pytest.mark.parametrize("function", [operations.hangs_async, operations.polite])
async def test_the_caller_cancels_a_running_job(jobs: Jobs, function: Any) -> None:
    jobs.worker()
    ctx, job = order(jobs, function)
    viewer = Viewer(ctx)
    await viewer.until("log")
    await jobs.manager.job(job.id).cancel_async("changed my mind")
    assert (await viewer.end())[-1] == "cancelled"
    assert viewer.data("cancelled")[0]["reason"] == "changed my mind"
    assert (await outcome(job)).state == "cancelled"


async def test_a_job_that_waits_is_cancelled_at_once(jobs: Jobs) -> None:
    ctx, job = order(jobs, operations.short_task)
    await job.cancel_async()
    assert (await Viewer(ctx).end())[-1] == "cancelled"
    assert (await job.status_async()).state == "cancelled"
    assert (await jobs.manager.stats_async()).depth == 0
    # By its viewer: the job is still there, and the worker that takes it does not run it.
    ctx, job = order(jobs, operations.short_task)
    await cancel_run(ctx.streaming, ctx.channel_id, "gone")
    jobs.worker()
    assert (await outcome(job)).state == "cancelled"
    assert (await Viewer(ctx).end())[-1] == "cancelled"


async def test_no_worker_is_told_to_the_caller_and_the_viewer(jobs: Jobs) -> None:
    ctx, job = order(jobs, operations.short_task)
    assert job.warning == "no worker is running; the job waits for one"
    viewer = Viewer(ctx)
    assert (await viewer.until("log")).data["message"] == job.warning
    jobs.worker()
    assert await viewer.end() == ["queued", "log", "started", "log", "complete"]


async def test_an_unknown_processor_is_told_to_the_caller_and_the_viewer(jobs: Jobs) -> None:
    jobs.worker()
    ctx, job = order(jobs, "app.typo")
    assert job.warning is not None
    assert "'app.typo'" in job.warning
    viewer = Viewer(ctx)
    assert (await viewer.end())[-1] == "failed"
    assert viewer.data("failed")[0]["code"] == "unknown_processor"
    assert (await outcome(job)).error == "unknown_processor: no worker knows 'app.typo'"
    # Whoever shares the registry learns it at once.
    known = operations.config(jobs.url, jobs.queue, operations_registry=operations.registry)
    with pytest.raises(UnknownProcessorError, match=r"app\.typo"):
        QueueManager(known).enqueue(None, "app.typo")


def test_what_has_no_name_for_a_worker_is_refused(redis_url: str) -> None:
    manager = QueueManager(redis_url)
    for processor, why in [
        (lambda entity: None, "no name by which"),
        (3, "not int"),
        ("", "1 to 256"),
        ("a\nb", "printable"),
    ]:
        with pytest.raises(ConfigurationError, match=why):
            manager.enqueue(None, processor)  # type: ignore[arg-type]


async def test_an_entity_that_cannot_be_sent(jobs: Jobs) -> None:
    with pytest.raises(InvalidEntityError, match="object"):
        jobs.manager.enqueue({"a": object()}, operations.nothing)
    with pytest.raises(InvalidEntityError, match="max_entity_bytes"):
        jobs.manager.enqueue("x" * (1 << 20), operations.nothing)
    assert (await jobs.manager.stats_async()).depth == 0


async def test_a_context_that_lives_in_this_process_only(redis_url: str) -> None:
    from asgi_stream import Streaming

    ctx = StreamContext.create("ann", streaming=Streaming())
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        QueueManager(redis_url).enqueue({"ctx": ctx.to_dict()}, operations.nothing)


async def test_a_run_that_is_over_takes_no_job(jobs: Jobs) -> None:
    ctx = StreamContext.create("ann")
    await ctx.complete_async()
    with pytest.raises(RunEndedError):
        order(jobs, operations.short_task, ctx)


async def test_the_same_job_id_is_the_same_job(jobs: Jobs) -> None:
    for _ in range(3):
        jobs.manager.enqueue(None, operations.nothing, job_id="order-17")
    assert jobs.manager.stats().depth == 1


async def test_redis_that_is_away(tmp_path: Path) -> None:
    from tests.redis_server import start_redis

    server = start_redis(folder=tmp_path)
    manager = QueueManager(QueueConfig(server.url, enqueue_timeout=0.5))
    manager.enqueue(None, operations.nothing)
    server.stop()
    begun = time.monotonic()
    with pytest.raises(EnqueueError) as caught:
        await manager.enqueue_async(None, operations.nothing)
    assert caught.value.job.id in str(caught.value)
    for _ in range(100):  # known to be away: no waiting
        with pytest.raises(EnqueueError, match="is away"):
            manager.enqueue(None, operations.nothing)
    assert time.monotonic() - begun < HANG / 10
    server.start()
    async with asyncio.timeout(HANG):
        while True:
            try:
                await manager.enqueue_async(None, operations.nothing)
                break
            except EnqueueError:
                await asyncio.sleep(0.05)
    assert manager.stats().depth == 2  # the first one was kept on disk
    await manager.aclose()
    server.stop()


async def test_redis_frozen_while_a_job_is_ordered(tmp_path: Path) -> None:
    import os

    from tests.redis_server import start_redis

    server = start_redis()
    manager = QueueManager(QueueConfig(server.url, enqueue_timeout=0.3))
    manager.enqueue(None, operations.nothing)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(EnqueueError, match="is not known") as caught:
        manager.enqueue(None, operations.nothing)
    os.kill(server.pid, signal.SIGCONT)
    job = caught.value.job
    async with asyncio.timeout(HANG):
        while (await job.status_async()).state == "queued":
            await job.cancel_async()
    await manager.aclose()
    server.stop()


# Workers that die, and workers that are told to stop


def by_attempt(viewer: Viewer) -> dict[int, list[int]]:
    """The steps that each attempt told; fails where one speaks after the next has begun."""
    told: dict[int, list[int]] = {}
    current = 0
    for record in viewer.records:
        if record.event == "started":
            current = record.data["attempt"]
        elif record.event == "data":
            assert record.data["value"]["attempt"] == current
            told.setdefault(current, []).append(record.data["value"]["n"])
    return told


@pytest.mark.parametrize("function", [operations.steps, operations.steps_async])
async def test_sigkill_of_a_worker(jobs: Jobs, function: Any) -> None:
    first = jobs.worker()
    ctx, job = order(jobs, function, steps=200)
    viewer = Viewer(ctx)
    await viewer.until("data", 5)
    first.signal(signal.SIGKILL)
    jobs.worker()
    await viewer.end()
    assert [told["attempt"] for told in viewer.data("attempt_lost")] == [1]
    assert [told["attempt"] for told in viewer.data("started")] == [1, 2]
    assert viewer.told.count("complete") == 1
    told = by_attempt(viewer)
    assert told[1] == list(range(len(told[1])))
    assert told[2] == list(range(200))
    assert (await outcome(job)).state == "completed"


async def test_a_job_that_may_not_run_twice_fails_with_worker_lost(jobs: Jobs) -> None:
    first = jobs.worker()
    ctx, job = order(jobs, operations.steps, steps=100_000, redeliveries=0)
    viewer = Viewer(ctx)
    await viewer.until("data", 3)
    first.signal(signal.SIGKILL)
    jobs.worker()
    await viewer.end()
    assert viewer.told[-1] == "failed"
    assert viewer.data("failed")[0]["code"] == "worker_lost"
    assert viewer.told.count("started") == 1
    status = await outcome(job)
    assert status.state == "failed"
    assert "worker_lost" in str(status.error)


async def test_a_worker_that_was_frozen_has_nothing_to_say_any_more(jobs: Jobs) -> None:
    first = jobs.worker()
    ctx, job = order(jobs, operations.steps, steps=150)
    viewer = Viewer(ctx)
    await viewer.until("data", 5)
    first.signal(signal.SIGSTOP)
    jobs.worker()
    await viewer.until("started", 2)
    await viewer.until("data", 10)
    first.signal(signal.SIGCONT)
    await viewer.end()
    assert by_attempt(viewer)[2] == list(range(150))
    assert (await outcome(job)).state == "completed"
    first.signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.ended) == 0
    assert "is run by another worker" in first.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_is_told_to_stop_finishes_its_jobs(jobs: Jobs, number: int) -> None:
    worker = jobs.worker()
    ctx, job = order(jobs, operations.steps, steps=30)
    viewer = Viewer(ctx)
    await viewer.until("data", 3)
    worker.signal(number)
    await viewer.end()
    assert viewer.told.count("started") == 1
    assert viewer.told[-1] == "complete"
    assert await asyncio.to_thread(worker.ended) == 0
    assert (await outcome(job)).state == "completed"


async def test_workers_that_disagree_about_who_is_dead_are_told(jobs: Jobs) -> None:
    for number, (patience, told) in enumerate(((4.0, False), (4.0, False), (5.0, True)), 1):
        worker = jobs.worker(redelivery_timeout=patience)
        async with asyncio.timeout(HANG):
            while len((await jobs.manager.stats_async()).workers) < number:  # noqa: ASYNC110 - other processes do it
                await asyncio.sleep(0.01)
        assert ("has redelivery_timeout=5, another one of queue" in worker.log()) == told


@pytest.mark.parametrize("function", [operations.steps, operations.steps_async, operations.hangs_async])
async def test_a_worker_that_may_not_wait_hands_its_jobs_back(jobs: Jobs, function: Any) -> None:
    """At once, long before the time after which a silent worker is taken for dead."""
    worker = jobs.worker(shutdown_timeout=0.1, redelivery_timeout=600.0)
    ctx, job = order(jobs, function, steps=100)
    viewer = Viewer(ctx)
    await viewer.until("log" if function is operations.hangs_async else "data")
    worker.signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.ended) == 0
    assert "goes back into the queue" in worker.log()
    jobs.worker(redelivery_timeout=4.0)
    await viewer.until("started", 2)
    if function is not operations.hangs_async:
        await viewer.end()
        assert by_attempt(viewer)[2] == list(range(100))
    else:
        await job.cancel_async()
        assert (await viewer.end())[-1] == "cancelled"
    assert viewer.data("attempt_lost") == [{"attempt": 1, "ts": viewer.data("attempt_lost")[0]["ts"]}]


async def test_two_signals_do_not_wait(jobs: Jobs) -> None:
    worker = jobs.worker()
    ctx, _ = order(jobs, operations.steps, steps=100_000)
    await Viewer(ctx).until("data")
    worker.signal(signal.SIGTERM)
    async with asyncio.timeout(HANG):
        # It has said goodbye, and waits for its job.
        while (await jobs.manager.stats_async()).workers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.ended) == 0


async def test_redis_restarted_under_a_running_job(tmp_path: Path) -> None:
    from asgi_stream import init_streaming, shutdown_streaming
    from tests.redis_server import start_redis

    server = start_redis(folder=tmp_path)
    init_streaming(server.url)
    jobs = Jobs(server.url)
    try:
        jobs.worker()
        jobs.worker()  # which must not take what the other one still has
        ctx, job = order(jobs, operations.steps, steps=100, pause=0.05)
        viewer = Viewer(ctx)
        await viewer.until("data", 5)
        server.kill()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)
        await viewer.end()
        assert by_attempt(viewer) == {1: list(range(100))}
        assert viewer.told.count("complete") == 1
        assert (await outcome(job)).state == "completed"
        assert (await outcome(jobs.manager.enqueue(None, operations.nothing))).state == "completed"
        assert "Traceback" not in jobs.workers[0].log()
    finally:
        await asyncio.to_thread(jobs.close)
        await shutdown_streaming()
        server.stop()


async def test_a_worker_stops_without_redis_too(tmp_path: Path) -> None:
    from asgi_stream import init_streaming, shutdown_streaming
    from tests.redis_server import start_redis

    server = start_redis()
    init_streaming(server.url)
    jobs = Jobs(server.url)
    try:
        worker = jobs.worker(shutdown_timeout=0.2)
        ctx, _ = order(jobs, operations.steps, steps=100_000)
        await Viewer(ctx).until("data", 3)
        server.stop()
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.ended) == 0
        assert "Redis is away" in worker.log()
    finally:
        await asyncio.to_thread(jobs.close)
        await shutdown_streaming()


# Many


async def test_ten_thousand_small_jobs(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "done"
    file.touch()
    for begin in range(0, 10_000, 500):
        await asyncio.gather(
            *(
                jobs.manager.enqueue_async({"file": str(file), "n": n}, operations.count)
                for n in range(begin, begin + 500)
            )
        )
    stats = await jobs.manager.stats_async()
    assert (stats.depth, stats.running) == (10_000, 0)
    assert stats.oldest_seconds > 0
    jobs.worker(slots=16)
    jobs.worker(slots=16)
    depths = []
    async with asyncio.timeout(110):
        while (stats := await jobs.manager.stats_async()).depth or stats.running:
            depths.append(stats.depth)
            await asyncio.sleep(0.1)
    assert len(stats.workers) == 2
    assert any(0 < depth < 10_000 for depth in depths)
    assert all(b <= a for a, b in itertools.pairwise(depths))
    assert sorted(int(line) for line in file.read_text().split()) == list(range(10_000))


# The command line


async def test_the_worker_of_the_command_line(jobs: Jobs) -> None:
    command = [sys.executable, "-m", "asgi_stream", "worker", "tests.job_queue.operations:registry"]
    worker = WorkerProcess(jobs.url, jobs.queue, [*command, "--queue", jobs.queue])
    jobs.workers.append(worker)
    ctx, _ = order(jobs, operations.short_task)
    assert (await Viewer(ctx).end())[-1] == "complete"
    worker.signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.ended) == 0
    assert "takes jobs of queue" in worker.log()
    assert "Traceback" not in worker.log()


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("tests.job_queue.operations", "name a module and what is in it"),
        ("no.such.module:registry", "there is no module"),
        ("tests.job_queue.operations:nothing_here", "has no 'nothing_here'"),
        ("tests.job_queue.operations:short_task", "is a function; a worker takes"),
    ],
)
def test_the_command_line_says_what_is_wrong(redis_url: str, named: str, why: str) -> None:
    import subprocess

    command = [sys.executable, "-m", "asgi_stream", "worker", named, "--redis-url", redis_url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 1
    assert why in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_queue_needs_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        QueueManager()
