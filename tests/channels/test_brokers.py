"""What every broker promises: one suite for memory and Redis [C1] [C2] [C3] [C7]."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis as driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_stream.channels.broker import Broker
from asgi_stream.channels.commands import Append, BeginAttempt, Cancel, Command, Read, Revoke, RevokedAt, Touch
from asgi_stream.channels.memory import MemoryBroker
from asgi_stream.channels.model import Position
from asgi_stream.channels.redis import RedisBroker
from asgi_stream.config import ChannelConfig, QueueRedisConfig
from asgi_stream.errors import AttemptSupersededError, BackendError, RunEndedError
from asgi_stream.redis.embedded import EmbeddedRedis
from tests.redis_server import REFUSALS, Refusal, start_redis

pytestmark = pytest.mark.anyio

HANG = 20.0
_names = itertools.count(1)


def new_name() -> str:
    return f"test-{os.getpid()}-{next(_names)}"


@pytest.fixture
def name() -> str:
    return new_name()


Make = Callable[..., Broker]


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    made: list[Broker] = []

    def make(**settings: Any) -> Broker:
        config = ChannelConfig(**settings)
        broker: Broker
        if request.param == "memory":
            broker = MemoryBroker(config)
        else:
            broker = RedisBroker(QueueRedisConfig(request.getfixturevalue("redis_url")), config)
        made.append(broker)
        return broker

    yield make
    for broker in made:
        await broker.aclose()


@pytest.fixture
def broker(make: Make) -> Broker:
    return make()


def block(text: str) -> bytes:
    return f"data: {text}\n".encode()


def texts(records: Any) -> list[str]:
    return [record.text for record in records]


async def do(broker: Broker, command: Command[Any]) -> Any:
    return await broker.run_async(command)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, bytes]] = []
        self.subscribed: list[str] = []
        self.lost = 0
        self.announced: list[bytes] = []
        self.changed = asyncio.Event()

    async def on_frames(self, frames: list[tuple[str, bytes]]) -> None:
        self.frames += frames
        self.changed.set()

    def on_subscribed(self, channel: str) -> None:
        self.subscribed.append(channel)
        self.changed.set()

    def on_announcement(self, message: bytes) -> None:
        self.announced.append(message)
        self.changed.set()

    def on_lost(self, channels: list[str]) -> None:
        self.lost += 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def test_offsets_count_from_one_and_the_log_is_read_back(broker: Broker, name: str) -> None:
    first = await broker.run_async(Append(name, (block("a"), block("b"))))
    second = broker.run(Append(name, (block("c"),)))
    assert (first.first, first.last, second.first) == (1, 2, 3)
    page = await broker.run_async(Read(name))
    assert texts(page.records) == ["a", "b", "c"]
    assert [record.position for record in page.records] == [Position(first.epoch, n) for n in (1, 2, 3)]
    assert (page.start, page.more, page.reset) == (0, False, None)
    assert (page.info.top, page.info.first, page.info.state) == (3, 1, "running")
    assert page.info.bytes == sum(len(record.frame) for record in page.records)
    after = await broker.run_async(Read(name, after=page.records[1].position))
    assert texts(after.records) == ["c"]


async def test_reading_creates_the_epoch(broker: Broker, name: str) -> None:
    page = await broker.run_async(Read(name))
    assert (page.info.state, page.info.top, page.records) == ("waiting", 0, ())
    appended = await broker.run_async(Append(name, (block("a"),)))
    assert appended.epoch == page.info.epoch


async def test_a_long_log_is_read_in_pages(broker: Broker, name: str) -> None:
    await broker.run_async(Append(name, tuple(block(str(n)) for n in range(150))))
    page = await broker.run_async(Read(name, max_events=100))
    assert (len(page.records), page.more) == (100, True)
    page = await broker.run_async(Read(name, after=page.records[-1].position, max_bytes=100))
    assert page.more
    assert 0 < sum(len(record.frame) for record in page.records) <= 100
    one = await broker.run_async(Read(name, max_bytes=1))
    assert len(one.records) == 1  # at least one, or nobody would get on


async def test_an_ending_ends_and_its_retry_does_not_fail(broker: Broker, name: str) -> None:
    """[W4] [C3]"""
    ending = Append(name, (block("x"), block("over")), ending="complete", producer="p", sequence=1)
    first = await broker.run_async(ending)
    again = await broker.run_async(ending)
    assert (again.first, again.last, again.repeated) == (first.first, first.last, True)
    for ending_name in ("complete", None):
        with pytest.raises(RunEndedError, match="complete") as caught:
            await broker.run_async(Append(name, (block("late"),), ending=ending_name))
        assert caught.value.ending == "complete"
    page = await broker.run_async(Read(name))
    assert [record.position.ending for record in page.records] == [False, True]
    assert page.records[-1].id.endswith(".e")
    assert page.info.ended
    assert page.info.state == "complete"


async def test_a_retry_returns_the_first_offset(broker: Broker, name: str) -> None:
    """[C2]"""
    one = Append(name, (block("1"),), producer="p", sequence=1)
    two = Append(name, (block("2"), block("3")), producer="p", sequence=2)
    for command in (one, one, two):
        await broker.run_async(command)
    await broker.run_async(Append(name, (block("other"),), producer="q", sequence=1))
    again = await broker.run_async(two)
    assert (again.first, again.last, again.repeated) == (2, 3, True)
    assert texts((await broker.run_async(Read(name))).records) == ["1", "2", "3", "other"]


async def test_history_is_bounded_by_count(make: Make, name: str) -> None:
    """[C3]"""
    broker = make(max_events=10)
    start = await broker.run_async(Append(name, tuple(block(str(n)) for n in range(3))))
    for n in range(3, 25):
        await broker.run_async(Append(name, (block(str(n)),)))
    page = await broker.run_async(Read(name))
    assert texts(page.records) == [str(n) for n in range(15, 25)]
    assert (page.start, page.info.first) == (15, 16)
    behind = await broker.run_async(Read(name, after=Position(start.epoch, 3)))
    assert (behind.reset, behind.missed) == ("trimmed", 12)
    assert texts(behind.records) == [str(n) for n in range(15, 25)]
    exact = await broker.run_async(Read(name, after=Position(start.epoch, 15)))
    assert exact.reset is None


async def test_history_is_bounded_by_bytes_and_keeps_the_last(make: Make, name: str) -> None:
    broker = make(max_bytes=1000)
    for n in range(20):
        await broker.run_async(Append(name, (block(str(n) * 100),)))
    page = await broker.run_async(Read(name))
    assert page.info.bytes == sum(len(record.frame) for record in page.records) <= 1000
    assert page.info.top == 20
    await broker.run_async(Append(name, (block("big" * 1000),)))
    page = await broker.run_async(Read(name))
    assert texts(page.records) == ["big" * 1000]
    assert page.info.first == 21


async def test_a_cursor_of_another_epoch_is_told(broker: Broker, name: str) -> None:
    await broker.run_async(Append(name, (block("a"),)))
    page = await broker.run_async(Read(name, after=Position("AAAAAA", 1)))
    assert (page.reset, page.missed) == ("epoch", None)
    assert texts(page.records) == ["a"]
    beyond = await broker.run_async(Read(name, after=Position(page.info.epoch, 9)))
    assert beyond.reset == "epoch"


async def test_a_log_older_than_what_a_caller_knows_begins_a_new_epoch(broker: Broker, name: str) -> None:
    """A replica with older data was promoted [C2]."""
    for command in (
        Append(name, (block("new"),), known=None),
        Read(name),
    ):
        old = (await broker.run_async(Append(name, (block("a"),)))).epoch
        known = Position(old, 1000)
        named = Append(name, (block("new"),), known=known) if isinstance(command, Append) else Read(name, known=known)
        await do(broker, named)
        page = await broker.run_async(Read(name, after=Position(old, 1)))
        assert page.info.epoch != old
        assert page.reset == "epoch"
        assert texts(page.records) == (["new"] if isinstance(command, Append) else [])
    same = await broker.run_async(Append(name, (block("b"),), known=Position("other1", 1000)))
    assert same.epoch == page.info.epoch


async def test_an_attempt_that_was_replaced_is_refused(broker: Broker, name: str) -> None:
    """[C7]"""
    assert (await broker.run_async(BeginAttempt(name))).attempt == 1
    await broker.run_async(Append(name, (block("one"),), attempt=1))
    await broker.run_async(Append(name, (block("beside"),)))  # without an attempt: unfenced
    assert (await broker.run_async(BeginAttempt(name))).attempt == 2
    for command in (Append(name, (block("late"),), attempt=1), Touch(name, 5.0, attempt=1)):
        with pytest.raises(AttemptSupersededError) as caught:
            await do(broker, command)
        assert (caught.value.attempt, caught.value.current) == (1, 2)
    await broker.run_async(Append(name, (block("two"),), attempt=2))
    page = await broker.run_async(Read(name))
    assert texts(page.records) == ["one", "beside", "two"]
    assert page.info.attempt == 2


async def test_a_producer_that_stops_to_show_life_is_lost(broker: Broker, name: str) -> None:
    """[C7]"""
    await broker.run_async(Append(name, (block("a"),)))
    assert not (await broker.run_async(Read(name))).info.lost  # it never promised
    lost = Append(name, (block("lost"),), ending="failed", state="", only_if_lost=True)
    assert (await broker.run_async(lost)).last == 0
    await broker.run_async(Touch(name, 60.0))
    assert (await broker.run_async(lost)).last == 0
    assert not (await broker.run_async(Read(name))).info.lost
    await broker.run_async(Touch(name, 0.001))
    async with asyncio.timeout(HANG):
        while not (await broker.run_async(Read(name))).info.lost:  # noqa: ASYNC110 - nobody tells when time has passed
            await asyncio.sleep(0.001)
    assert (await broker.run_async(lost)).last == 2
    assert (await broker.run_async(Read(name))).info.state == "failed"
    with pytest.raises(RunEndedError):
        await broker.run_async(lost)


async def test_cancelling_is_told_to_the_producer(broker: Broker, name: str) -> None:
    await broker.run_async(Append(name, (block("q"),), state="queued"))
    status = await broker.run_async(Cancel(name, "user"))
    assert (status.state, status.cancelling) == ("queued", "user")
    assert (await broker.run_async(Append(name, (block("a"),)))).cancelling == "user"
    assert (await broker.run_async(Touch(name, 5.0))).cancelling == "user"
    assert (await broker.run_async(Read(name))).info.cancelling
    assert (await broker.run_async(Cancel(name, "again"))).cancelling == "user"


async def test_subscribers_hear_everything_in_order(broker: Broker, name: str) -> None:
    heard = Heard()
    subscriber = broker.subscriber(heard)
    try:
        subscriber.subscribe(name)
        await heard.until(lambda: name in heard.subscribed)
        await broker.run_async(Append(name, (block("1"), block("2"))))
        await asyncio.to_thread(broker.run, Append(name, (block("3"),), ending="complete"))
        await heard.until(lambda: len(heard.frames) == 3)
        page = await broker.run_async(Read(name))
        assert heard.frames == [(name, record.frame) for record in page.records]
        subscriber.unsubscribe(name)
        other = new_name()
        subscriber.subscribe(other)
        subscriber.unsubscribe(other)
        subscriber.subscribe(other)
        await heard.until(lambda: other in heard.subscribed)
        await broker.run_async(Append(other, (block("x"),)))
        await heard.until(lambda: len(heard.frames) == 4)
        assert heard.frames[3][0] == other
    finally:
        await subscriber.aclose()


async def test_announcements_reach_every_subscriber(broker: Broker, name: str) -> None:
    heard = [Heard(), Heard()]
    subscribers = [broker.subscriber(one) for one in heard]
    for one, subscriber in zip(heard, subscribers, strict=True):
        subscriber.subscribe(name)
        await one.until(lambda one=one: name in one.subscribed)  # type: ignore[misc]
    await broker.announce(b"hear")
    for one in heard:
        await one.until(lambda one=one: one.announced == [b"hear"])  # type: ignore[misc]
    for subscriber in subscribers:
        await subscriber.aclose()


async def test_revoking_is_remembered(broker: Broker, name: str) -> None:
    """[S3]"""
    assert await broker.run_async(RevokedAt(name)) == 0.0
    begun = time.time()
    await broker.run_async(Revoke(name))
    assert begun - 0.01 <= await broker.run_async(RevokedAt(name)) <= time.time() + 0.01
    await broker.run_async(Append(name, (block("a"),), known=Position("AAAAAA", 1)))
    assert await broker.run_async(RevokedAt(name)) > 0


async def test_many_at_once(broker: Broker, name: str) -> None:
    async def publish(n: int) -> None:
        for m in range(20):
            await broker.run_async(Append(name, (block(f"{n}.{m}"),)))

    await asyncio.gather(*(publish(n) for n in range(20)))
    page = await broker.run_async(Read(name))
    seen = texts(page.records)
    assert len(seen) == len(set(seen)) == 400
    for n in range(20):
        assert [text for text in seen if text.startswith(f"{n}.")] == [f"{n}.{m}" for m in range(20)]


async def test_memory_forgets_after_the_time_of_history(name: str) -> None:
    now = 0.0
    broker = MemoryBroker(ChannelConfig(history_seconds=10), clock=lambda: now)
    first = broker.run(Append(name, (block("a"),)))
    now = 9.0
    broker.run(Append(name, (block("b"),)))
    now = 18.0
    assert broker.run(Read(name)).info.top == 2
    now = 19.1
    page = broker.run(Read(name, after=Position(first.epoch, 2)))
    assert (page.info.top, page.reset) == (0, "epoch")
    now = 100.0
    for n in range(2000):
        broker.run(Append(f"{name}-{n % 3}", (block("x"),)))
    assert len(broker._logs) == 3


async def test_every_key_in_redis_expires(redis_url: str, name: str) -> None:
    """[C3]"""
    broker = RedisBroker(QueueRedisConfig(redis_url), ChannelConfig(key_prefix=f"{name}:", history_seconds=60))
    client: Any = driver.Redis.from_url(redis_url)
    for command in (
        Read("a"),
        Append("b", (block("x"),), producer="p", sequence=1),
        Touch("c", 5.0),
        BeginAttempt("d"),
        Cancel("e", "r"),
        Append("b", (block("x"),), ending="failed"),
        Touch("b", 5.0),
    ):
        await do(broker, command)
        keys = client.keys(f"{name}:*")
        assert keys
        assert all(55_000 < client.pttl(key) <= 60_000 for key in keys)
    client.close()
    await broker.aclose()


async def test_a_script_that_redis_forgot_is_sent_again(redis_url: str, name: str) -> None:
    broker = RedisBroker(QueueRedisConfig(redis_url))
    client: Any = driver.Redis.from_url(redis_url)
    await broker.run_async(Append(name, (block("a"),)))
    broker.run(Append(name, (block("b"),)))
    client.script_flush()
    await broker.run_async(Append(name, (block("c"),)))
    client.script_flush()
    broker.run(Append(name, (block("d"),)))
    assert texts((await broker.run_async(Read(name))).records) == ["a", "b", "c", "d"]
    client.close()
    await broker.aclose()


async def test_a_redis_that_still_loads_its_data_is_waited_for(tmp_path: Path, name: str) -> None:
    server = start_redis(folder=tmp_path)
    await asyncio.to_thread(_fill, server.url)
    server.stop()
    slow = ("--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024")
    again = EmbeddedRedis(*slow, port=server.port, folder=tmp_path)
    starting = asyncio.create_task(asyncio.to_thread(again.start))
    try:
        async with asyncio.timeout(HANG):
            while not await _is_loading(server.port):
                assert not starting.done(), "it loaded its data too fast for this test"
                await asyncio.sleep(0.005)
        broker = RedisBroker(QueueRedisConfig(server.url))  # its first connection meets a server that refuses commands
        await broker.run_async(Append(name, (block("a"),)))
        assert texts(broker.run(Read(name)).records) == ["a"]
        await broker.aclose()
    finally:
        await starting
        again.stop()


@pytest.mark.parametrize("kind", REFUSALS)
async def test_a_redis_that_takes_no_writes_is_waited_for(name: str, kind: str) -> None:
    """Full, cut off from its replicas after a failover, or without a disk: nothing is lost meanwhile."""
    server = await asyncio.to_thread(start_redis)
    refusal = Refusal(server, kind)
    broker = RedisBroker(QueueRedisConfig(server.url), patience=HANG)
    hurried = RedisBroker(QueueRedisConfig(server.url), patience=0.1)
    try:
        await broker.run_async(Append(name, (block("a"),)))
        await asyncio.to_thread(refusal.begin)
        with pytest.raises(BackendError, match=kind):
            await hurried.run_async(Append(name, (block("x"),)))
        with pytest.raises(BackendError, match=f"{kind}|OutOfMemory"):
            await asyncio.to_thread(hurried.run, Append(name, (block("x"),)))
        # What is there can be read.
        assert texts((await broker.run_async(Read(name))).records) == ["a"]
        first = asyncio.create_task(broker.run_async(Append(name, (block("b"),))))
        second = asyncio.create_task(asyncio.to_thread(broker.run, Append(name, (block("c"),))))
        done, _ = await asyncio.wait([first, second], timeout=0.2)
        assert not done
        await asyncio.to_thread(refusal.end)
        async with asyncio.timeout(HANG):
            await first
            await second
        assert sorted(texts((await broker.run_async(Read(name))).records)) == ["a", "b", "c"]
    finally:
        await broker.aclose()
        await hurried.aclose()
        await asyncio.to_thread(server.stop)


def _fill(url: str) -> None:
    client: Any = driver.Redis.from_url(url)
    client.mset({f"key-{n}": "x" * 100 for n in range(500)})
    client.execute_command("BGREWRITEAOF")  # the delay below is for the keys of a snapshot
    while (state := client.info("persistence"))["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]:
        time.sleep(0.01)
    client.close()


async def _is_loading(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET x\r\n")
    reply = await reader.readline()
    writer.close()
    return reply.startswith(b"-LOADING")


async def test_a_log_that_redis_evicted_is_a_gap_that_is_told(redis_url: str, name: str) -> None:
    broker = RedisBroker(QueueRedisConfig(redis_url))
    client: Any = driver.Redis.from_url(redis_url)
    appended = await broker.run_async(Append(name, (block("a"), block("b"))))
    client.delete(f"stream:{{{name}}}")
    page = await broker.run_async(Read(name, after=Position(appended.epoch, 1)))
    assert (page.reset, page.missed, page.records, page.start) == ("trimmed", 1, (), 2)
    await broker.run_async(Append(name, (block("c"),)))
    assert texts((await broker.run_async(Read(name, after=Position(appended.epoch, 2)))).records) == ["c"]
    client.close()
    await broker.aclose()


async def test_no_redis_is_an_error_that_says_where_and_hides_the_password() -> None:
    broker = RedisBroker(QueueRedisConfig("redis://ann:secret@127.0.0.1:1/0"), patience=0.1)
    with pytest.raises(BackendError, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await broker.run_async(Read("x"))
    assert "secret" not in str(caught.value)
    with pytest.raises(BackendError, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await asyncio.to_thread(broker.run, Read("x"))
    assert "secret" not in str(caught.value)
    await broker.aclose()


# The same program of commands does the same on both.

_channels = st.sampled_from(["a", "b"])
_programs = st.lists(
    st.one_of(
        st.builds(
            Append,
            _channels,
            st.lists(st.sampled_from([block("x"), block("yy" * 20)]), min_size=1, max_size=3).map(tuple),
            ending=st.sampled_from([None, None, None, "complete", "failed"]),
            state=st.sampled_from(["running", "queued", ""]),
            attempt=st.integers(0, 3),
            producer=st.sampled_from(["", "p", "q"]),
            sequence=st.integers(1, 4),
            only_if_lost=st.sampled_from([False, False, True]),
        ),
        st.builds(Read, _channels, max_events=st.integers(1, 5), max_bytes=st.integers(1, 200)),
        st.builds(Touch, _channels, st.just(1000.0), st.integers(0, 3)),
        st.builds(BeginAttempt, _channels),
        st.builds(Cancel, _channels, st.sampled_from(["user", "admin"])),
    ),
    max_size=30,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=_programs)
def test_memory_and_redis_do_the_same(program: list[Command[Any]], redis_url: str) -> None:
    config = ChannelConfig(max_events=6, max_bytes=300)
    brokers: list[Broker] = [MemoryBroker(config), RedisBroker(QueueRedisConfig(redis_url), config)]
    prefix = new_name()
    results = []
    for broker in brokers:
        seen: list[Any] = []
        epochs: dict[str, str] = {}
        for command in program:
            fields = {field: getattr(command, field) for field in command.__dataclass_fields__}  # type: ignore[attr-defined]
            fields["channel"] = f"{prefix}-{fields['channel']}"
            try:
                result = broker.run(type(command)(**fields))
            except (RunEndedError, AttemptSupersededError) as exc:
                seen.append(repr(exc))
                continue
            epoch = getattr(result, "epoch", None) or getattr(getattr(result, "info", None), "epoch", "")
            assert not epoch or epochs.setdefault(fields["channel"], epoch) == epoch
            text = repr(result).replace(epoch, "E") if epoch else repr(result)
            seen.append(_without_times(text))
        results.append(seen)
        broker.close()
    assert results[0] == results[1]


def _without_times(text: str) -> str:
    begin = text.find("idle=")
    return text if begin < 0 else text[:begin] + text[text.index(",", begin) :]
