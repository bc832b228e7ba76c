"""What the record promises, on every server: osmem-server, and OpenSearch nodes in CI."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_stream import AsyncStreamChannel, StreamContext, Streaming
from asgi_stream.channels.model import base36, new_epoch
from asgi_stream.errors import ConfigurationError
from asgi_stream.storage import OpenSearchEventStorage, StoredEvent
from asgi_stream.storage.sink import Entry
from tests.storage.conftest import MakeStorage
from tests.storage.server import SearchServer

pytestmark = pytest.mark.anyio

HANG = 30.0
_names = itertools.count(1)


def now() -> int:
    return time.time_ns() // 1_000_000


def entry(channel: str, *data: Any, first: int = 1, epoch: str = "aaaaaa", about: str = "", at: int = 0) -> Entry:
    """What is handed over when *data*, a (name, value) each, was appended to *channel*."""
    frames = tuple(b"event: %b\ndata: %b\n" % (name.encode(), json.dumps(value).encode()) for name, value in data)
    whose = json.dumps({"workspace": about}).encode() if about else b""
    return Entry(channel, whose, epoch, first, frames, at or now())


def write(storage: OpenSearchEventStorage, *entries: Entry) -> None:
    """Hand over, and wait until it can be found."""
    for one in entries:
        storage.offer(one)
    assert storage.flush(HANG)
    refresh(storage)


def refresh(storage: OpenSearchEventStorage) -> None:
    storage.client.indices.refresh(index=storage.config.index_prefix, params={"ignore_unavailable": "true"})


def every_page(storage: OpenSearchEventStorage, limit: int, **asked: Any) -> list[StoredEvent]:
    found: list[StoredEvent] = []
    after = None
    while True:
        page = storage.search(after=after, limit=limit, **asked)
        found += page.events
        after = page.after
        if after is None:
            return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_is_recorded_whole(storage: OpenSearchEventStorage) -> None:
    streaming = Streaming(storage=storage.config)
    ctx = StreamContext.create("ann", "shop", "prod", "api", streaming=streaming, team="core")
    ctx.log("disk is nearly full", level="warning", logger="monitor", fields={"free": 0.03})
    ctx.progress(10, step="building")
    ctx.token("Hello")
    ctx.emit("list", [1, {"a": None}])
    ctx.emit("text", "two\nlines")
    ctx.complete(success=True, url="https://x")
    assert streaming.storage.flush(HANG)
    refresh(storage)

    page = storage.search(channel=ctx.channel_id)
    assert [one.event for one in page.events] == ["log", "progress", "token", "list", "text", "complete"]
    first = page.events[0]
    assert (first.workspace, first.project, first.env, first.service) == ("ann", "shop", "prod", "api")
    assert (first.labels, first.level, first.message) == (("team=core",), "warning", "disk is nearly full")
    assert first.more["logger"] == "monitor"
    assert first.data["fields"] == {"free": 0.03}
    assert abs(first.time - time.time()) < HANG
    assert [one.data for one in page.events[3:5]] == [[1, {"a": None}], "two\nlines"]
    kept = [record.id for record in asyncio.run(history(ctx.channel_id, streaming))]
    assert [one.id for one in page.events] == kept
    assert (page.after, page.cursor) == (None, kept[-1])
    asyncio.run(streaming.aclose())


async def history(channel: str, streaming: Streaming) -> list[Any]:
    return await AsyncStreamChannel(channel, streaming=streaming).history()


def test_what_is_asked_for(storage: OpenSearchEventStorage) -> None:
    begin = now() - 10_000
    said = [
        ("log", {"message": "Disk /dev/sda is full", "level": "error", "ts": begin}),
        ("log", {"message": "all is well", "level": "info", "ts": begin + 1000}),
        ("log", {"message": "the disk is slow", "level": "warning", "ts": begin + 2000}),
        ("progress", {"percent": 5, "step": "disk", "ts": begin + 3000}),
    ]
    write(storage, entry("c", *said, about="ann"))

    def offsets(**asked: Any) -> list[int]:
        return [int(str(one.id).split(".")[1]) for one in storage.search(channel="c", **asked).events]

    assert offsets(kinds="log") == [1, 2, 3]
    assert offsets(kinds=["progress", "nothing"]) == [4]
    assert offsets(level="warning") == [1, 3]
    assert offsets(text="disk") == [1, 3, 4]
    assert offsets(text="DISK full") == [1]
    assert offsets(text='"disk" OR (well') == []
    assert offsets(since=(begin + 1000) / 1000, until=(begin + 3000) / 1000) == [2, 3]
    assert offsets(since=datetime.fromtimestamp((begin + 2000) / 1000, UTC).isoformat()) == [3, 4]
    assert offsets(workspace="ann") == [1, 2, 3, 4]
    assert offsets(workspace="bob") == []
    assert [one.channel for one in storage.search(workspace="ann", text="well").events] == ["c"]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"channel": "a b"},
        {"workspace": ""},
        {"channel": "c", "limit": 0},
        {"channel": "c", "limit": 100_000},
        {"channel": "c", "level": "loud"},
        {"channel": "c", "since": "yesterday"},
        {"channel": "c", "since": float("nan")},
        {"channel": "c", "text": "x" * 2000},
        {"channel": "c", "after": "nonsense"},
        {"channel": "c", "after": "W10"},
        {"channel": "c", "kinds": ["x"] * 100},
    ],
)
def test_what_makes_no_sense_is_refused(storage: OpenSearchEventStorage, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        storage.search(**asked)


def test_nothing_was_written_yet(storage: OpenSearchEventStorage) -> None:
    page = storage.search(channel="c")
    assert (page.events, page.after, page.cursor) == ((), None, None)
    assert storage.prune(1) == []
    assert storage.status()["events"] == 0


@pytest.mark.parametrize("data_stream", [False, True])
def test_written_twice_is_there_once(search_server: SearchServer, make_storage: MakeStorage, data_stream: bool) -> None:
    if data_stream and not search_server.is_node:
        pytest.skip("osmem-server has no data streams")
    prefix = f"test-twice-{now()}"
    first, second = (make_storage(search_server, index_prefix=prefix, data_stream=data_stream) for _ in range(2))
    one = entry("c", *(("log", {"message": str(n)}) for n in range(200)))
    write(first, one)
    write(second, one)
    assert first.stats().repeated == 0
    assert second.stats().repeated == 200
    assert len(every_page(first, 77, channel="c")) == 200


def test_pages_while_others_write(storage: OpenSearchEventStorage) -> None:
    """Stable: no event twice, none left out, whatever is written meanwhile; and the cursor says where live begins."""
    for n in range(0, 60, 10):
        storage.offer(entry("c", *(("log", {"message": str(n + k)}) for k in range(10)), first=n + 1))
    assert storage.flush(HANG)
    refresh(storage)
    page = storage.search(channel="c", limit=7)
    cursor = page.cursor
    assert cursor == f"aaaaaa.{base36(60)}"
    found = [one.message for one in page.events]
    n = 60
    while page.after is not None:
        write(storage, entry("c", ("log", {"message": str(n)}), first=n + 1))
        n += 1
        page = storage.search(channel="c", limit=7, after=page.after)
        assert page.cursor == cursor
        found += [one.message for one in page.events]
    assert found == [str(k) for k in range(60)]


def test_from_search_to_live_without_a_hole(storage: OpenSearchEventStorage) -> None:
    """Search, then follow from the cursor, while a publisher goes on: every event once."""
    streaming = Streaming(storage=storage.config)
    ctx = StreamContext.create("ann", streaming=streaming)
    total = 600

    def publish() -> None:
        for n in range(total):
            ctx.log(str(n))
            time.sleep(0.001)
        ctx.complete()

    async def search_and_follow() -> list[str]:
        await asyncio.sleep(0.4)
        seen: list[str] = []
        after = None
        while True:
            page = await storage.search_async(channel=ctx.channel_id, limit=50, after=after)
            seen += [str(one.message) for one in page.events]
            after = page.after
            if after is None:
                break
        channel = AsyncStreamChannel(ctx.channel_id, streaming=streaming)
        async with asyncio.timeout(HANG):
            async for record in channel.subscribe(after=page.cursor):
                assert record.event != "reset"
                if record.event == "log":
                    seen.append(record.data["message"])
        await streaming.aclose()
        return seen

    publisher = threading.Thread(target=publish)
    publisher.start()
    seen = asyncio.run(search_and_follow())
    publisher.join()
    assert seen == [str(n) for n in range(total)]


def test_what_is_still_on_its_way_is_left_to_the_live_stream(storage: OpenSearchEventStorage) -> None:
    write(storage, entry("c", ("log", {"message": "1"}), ("log", {"message": "2"})))
    write(storage, entry("c", ("log", {"message": "4"}), first=4))
    page = storage.search(channel="c")
    assert (page.events, page.cursor) == ((), "aaaaaa.0")
    write(storage, entry("c", ("log", {"message": "3"}), first=3))
    page = storage.search(channel="c")
    assert ([one.message for one in page.events], page.cursor) == (["1", "2", "3", "4"], "aaaaaa.4")


def test_a_log_that_began_anew_is_read_in_order(storage: OpenSearchEventStorage) -> None:
    begin = now() - 60_000
    epochs = [new_epoch() for _ in range(3)]
    for number, epoch in enumerate(epochs):
        said = [("log", {"message": f"{number}.{n}", "ts": begin + number * 1000 + n}) for n in range(5)]
        storage.offer(entry("c", *said, epoch=epoch))
    write(storage)
    expected = [f"{number}.{n}" for number in range(3) for n in range(5)]
    for limit in (2, 5, 7, 100):
        assert [one.message for one in every_page(storage, limit, channel="c")] == expected
    assert storage.search(channel="c", limit=2).cursor == f"{epochs[2]}.5"


def test_dated_by_the_events_own_time(storage: OpenSearchEventStorage) -> None:
    """A retry after midnight finds the same index; a time that cannot be is not believed."""
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    at = int(midnight.timestamp() * 1000)
    write(
        storage,
        entry("c", ("log", {"message": "before", "ts": at - 5}), ("log", {"message": "after", "ts": at + 5}), at=at),
        entry("c", ("log", {"message": "never", "ts": 99}), ("log", {"message": "when", "ts": True}), first=3, at=at),
    )
    prefix = storage.config.index_prefix
    assert storage.status()["indices"] == [f"{prefix}-2026.02.28", f"{prefix}-2026.03.01"]
    later = midnight + timedelta(days=7)
    assert storage.prune(7, now=later) == [f"{prefix}-2026.02.28"]
    assert [one.message for one in storage.search(channel="c").events] == ["after", "never", "when"]
    assert storage.prune(7, now=later) == []
    assert storage.prune(7, now=later + timedelta(days=1)) == [f"{prefix}-2026.03.01"]


def test_a_data_stream(search_server: SearchServer, make_storage: MakeStorage) -> None:
    if not search_server.is_node:
        pytest.skip("osmem-server has no data streams")
    storage = make_storage(search_server, data_stream=True)
    old = now() - 10 * 24 * 3600 * 1000
    one = entry("c", *(("log", {"message": str(n), "ts": old}) for n in range(50)), at=old)
    write(storage, one)
    storage.client.indices.rollover(alias=storage.config.index_prefix)
    # Its answer was lost, so it is sent again: an id is known in the newest index only.
    written = storage.sink._writer.write(list(documents_of(storage, one)), again=True)
    assert (written.done, written.repeated) == (50, 50)
    write(storage, entry("c", ("log", {"message": "new"}), first=51))
    assert len(every_page(storage, 20, channel="c")) == 51
    assert storage.prune(7) == ["50 events"]
    refresh(storage)
    assert [one.message for one in storage.search(channel="c").events] == ["new"]


def documents_of(storage: OpenSearchEventStorage, one: Entry) -> Any:
    from asgi_stream.storage.document import documents

    return documents(storage.config, *one)


def test_setup_and_status(search_server: SearchServer, make_storage: MakeStorage) -> None:
    storage = make_storage(search_server)
    assert storage.status()["template"] is False
    assert storage.setup() == [f"index template {storage.config.index_prefix}"]
    assert storage.setup() == storage.setup()
    write(storage, entry("c", ("log", {"message": "x"})))
    told = storage.status()
    assert (told["template"], told["events"], len(told["indices"])) == (True, 1, 1)
    assert abs(told["newest"] - time.time()) < HANG
    mapping = storage.client.indices.get_mapping(index=told["indices"][0])[told["indices"][0]]["mappings"]
    assert mapping["properties"]["data"]["enabled"] is False
    assert mapping["dynamic"] in (False, "false")


WORDS = ("alpha", "beta", "gamma")


def test_nobody_finds_what_is_anothers(storage: OpenSearchEventStorage) -> None:
    """Whatever is asked, with pages of other searches too, a workspace's search has its own events only [S1]."""
    entries: list[Entry] = []
    for whose in ("ann", "bob", "ann*", "a", "ann OR bob", ""):
        for n in range(3):
            said = [("log", {"message": " ".join(WORDS), "level": "info"}), (whose or "none", {"text": WORDS[n]})]
            entries.append(entry(f"c-{len(entries)}", *said, about=whose))
    write(storage, *entries)
    others: list[dict[str, Any]] = [{"workspace": "bob"}, {"everything": True}, {"channel": "c-3"}]
    pages = [None, *(storage.search(**asked, limit=1).after for asked in others)]
    assert len(set(pages)) == 4

    text = st.none() | st.sampled_from([*WORDS, "*", "ann", "bob", '{"match_all":{}}', "alpha OR beta", '" : ( ~ \\'])

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        channel=st.none() | st.sampled_from([f"c-{n}" for n in range(18)]),
        kinds=st.none() | st.lists(st.sampled_from(["log", "ann", "bob", "*"]), max_size=3),
        level=st.none() | st.sampled_from(["debug", "info"]),
        text=text,
        since=st.none() | st.sampled_from([0, "2026-01-01"]),
        after=st.sampled_from(pages),
        limit=st.integers(1, 20),
    )
    def check(**asked: Any) -> None:
        try:
            page = storage.search(workspace="ann", **asked)
        except ConfigurationError:  # a page of another kind of search does not fit
            return
        assert {one.workspace for one in page.events} <= {"ann"}

    check()
