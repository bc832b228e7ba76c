"""`OpenSearchEventStorage`: the record of events, to write, to search and to look after."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Self, TypeVar

from asgi_stream.config import StorageConfig, check_whole
from asgi_stream.errors import BackendError, ConfigurationError
from asgi_stream.storage.bulk import put_template
from asgi_stream.storage.client import CONNECTIONS, NOT_OPENSEARCH, explain, make_client, status_of
from asgi_stream.storage.document import is_expired, retention_policy
from asgi_stream.storage.search import Moment, Search, SearchPage, StoredEvent
from asgi_stream.storage.sink import Entry, Sink, SinkStats

T = TypeVar("T")


class OpenSearchEventStorage:
    """The long-term record of events in OpenSearch (extra ``opensearch``).

    Settings are those of `StorageConfig`, as an object or by name; what is not given comes from the environment.
    Nothing is opened before the first use. Raises `BackendError` when OpenSearch does not do what is asked; writing
    never does.
    """

    def __init__(self, config: StorageConfig | None = None, **settings: Any) -> None:
        if config is None:
            config = StorageConfig.from_env()
        try:
            self.config = replace(config, **settings) if settings else config
        except TypeError as exc:
            raise ConfigurationError(f"storage: {exc}") from None
        self.config.check()
        self._client: Any = None
        self._sink: Sink | None = None
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    # Writing

    @property
    def sink(self) -> Sink:
        """What writes in this process, made on first use."""
        if self._sink is None:
            with self._lock:
                if self._sink is None:
                    self._sink = Sink(self.config)
        return self._sink

    def offer(self, entry: Entry) -> None:
        """Hand over what was appended to a channel. Never blocks, never raises."""
        self.sink.offer(entry)

    def flush(self, seconds: float = 5.0) -> bool:
        """Wait until OpenSearch has what was handed over in this process; False if that takes longer."""
        return self._sink is None or self._sink.flush(seconds)

    async def flush_async(self, seconds: float = 5.0) -> bool:
        return await asyncio.to_thread(self.flush, seconds)

    def stats(self) -> SinkStats:
        """What became of the events that this process wrote."""
        return self.sink.stats()

    # Searching

    def search(
        self,
        *,
        channel: str | None = None,
        workspace: str | None = None,
        everything: bool = False,
        kinds: Iterable[str] | str | None = None,
        level: str | None = None,
        text: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> SearchPage:
        """Return a page of events, the oldest first.

        Of one ``channel``, of one ``workspace``, of both, or of ``everything``. ``kinds``: names of events; ``level``:
        at least this one; ``text``: every word of it is in the message; ``since`` (inclusive) and ``until``
        (exclusive): a datetime, ISO 8601 text or Unix seconds. ``after`` is an earlier page's; ``limit`` at most 1,000.

        What was just published is found about two seconds later; `SearchPage.cursor` says how far it went.
        """
        return self._search(
            Search.of(
                channel=channel,
                workspace=workspace,
                everything=everything,
                kinds=kinds,
                level=level,
                text=text,
                since=since,
                until=until,
                after=after,
                limit=limit,
            )
        )

    async def search_async(
        self,
        *,
        channel: str | None = None,
        workspace: str | None = None,
        everything: bool = False,
        kinds: Iterable[str] | str | None = None,
        level: str | None = None,
        text: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> SearchPage:
        """`search()` for async code."""
        search = Search.of(
            channel=channel,
            workspace=workspace,
            everything=everything,
            kinds=kinds,
            level=level,
            text=text,
            since=since,
            until=until,
            after=after,
            limit=limit,
        )
        return await self._in_thread(partial(self._search, search))

    def _search(self, search: Search) -> SearchPage:
        events: tuple[StoredEvent, ...] = ()
        following: Search | None = search
        page = SearchPage((), None, None)
        while following is not None:
            try:
                answer = self.client.search(
                    index=self.config.index_prefix,
                    body=following.body(),
                    params={"ignore_unavailable": "true", "allow_no_indices": "true"},
                )
            except Exception as exc:
                if status_of(exc) == 404:
                    break  # nothing was written yet
                if status_of(exc) == 400:
                    raise ConfigurationError(f"OpenSearch cannot search for this; whose is after=? {exc}") from exc
                raise explain(self.config, exc) from exc
            try:
                page, following = following.page(answer)
            except NOT_OPENSEARCH as exc:
                raise explain(self.config, exc) from exc
            events += page.events
        return SearchPage(events, page.after, page.cursor)

    # Looking after it

    def setup(self) -> list[str]:
        """Install the index template and, for a data stream with ``retention_days``, its policy; say what was done."""
        config = self.config
        done = []
        try:
            put_template(self.client, config, always=True)
            done.append(f"index template {config.index_prefix}")
            if config.data_stream and config.retention_days is not None:
                path = f"/_plugins/_ism/policies/{config.index_prefix}"
                policy = retention_policy(config, config.retention_days)
                try:
                    self.client.transport.perform_request("PUT", path, body=policy)
                except Exception as exc:
                    if status_of(exc) == 400 and "no handler" in str(exc):
                        raise BackendError(
                            "this server has no index state management: run `asgi-stream storage prune` every day"
                        ) from exc
                    if status_of(exc) != 409:  # it is there
                        raise
                done.append(f"retention policy of {config.retention_days} days")
        except BackendError:
            raise
        except Exception as exc:
            raise explain(config, exc) from exc
        return done

    async def setup_async(self) -> list[str]:
        return await self._in_thread(self.setup)

    def prune(self, days: int | None = None, *, now: datetime | None = None) -> list[str]:
        """Delete what is older than so many days (default: ``retention_days``); say what was deleted.

        Of dated indices only whole ones are deleted; from a data stream single events, which takes longer.
        """
        config = self.config
        days = config.retention_days if days is None else days
        if days is None:
            raise ConfigurationError("prune() takes days=, or retention_days= (OPENSEARCH_RETENTION_DAYS)")
        check_whole("days", days, least=1)
        now = now or datetime.now(UTC)
        try:
            if config.data_stream:
                body = {
                    "query": {"range": {"@timestamp": {"lt": int((now - timedelta(days=days)).timestamp() * 1000)}}}
                }
                found = self.client.delete_by_query(
                    index=config.index_prefix,
                    body=body,
                    params={"conflicts": "proceed", "ignore_unavailable": "true", "refresh": "true"},
                )
                return [f"{found['deleted']} events"] if found["deleted"] else []
            names = self.client.indices.get(index=f"{config.index_prefix}-*", params={"ignore_unavailable": "true"})
            expired = sorted(name for name in names if is_expired(config, name, now, days))
            for name in expired:
                self.client.indices.delete(index=name, params={"ignore_unavailable": "true"})
            return expired
        except Exception as exc:
            if status_of(exc) == 404:
                return []
            raise explain(config, exc) from exc

    async def prune_async(self, days: int | None = None) -> list[str]:
        return await self._in_thread(partial(self.prune, days))

    def status(self) -> dict[str, Any]:
        """Say what the server is and what it holds: version, events, oldest and newest (Unix seconds), indices."""
        config = self.config
        try:
            version = self.client.info()["version"]["number"]
            installed = bool(self.client.indices.exists_index_template(name=config.index_prefix))
            body = {
                "size": 0,
                "track_total_hits": True,
                "aggs": {"oldest": {"min": {"field": "@timestamp"}}, "newest": {"max": {"field": "@timestamp"}}},
            }
            try:
                found = self.client.search(index=config.index_prefix, body=body)
                indices = sorted(self.client.indices.get(index=config.index_prefix))
            except Exception as exc:
                if status_of(exc) != 404:
                    raise
                found, indices = None, []
            events = 0 if found is None else found["hits"]["total"]["value"]
            oldest, newest = (
                None if found is None or not events else found["aggregations"][name]["value"] / 1000
                for name in ("oldest", "newest")
            )
        except Exception as exc:
            raise explain(config, exc) from exc
        return {
            "version": version,
            "template": installed,
            "events": events,
            "oldest": oldest,
            "newest": newest,
            "indices": indices,
        }

    async def status_async(self) -> dict[str, Any]:
        return await self._in_thread(self.status)

    @property
    def client(self) -> Any:
        """opensearch-py's client, for what this class does not do."""
        if self._client is None:
            with self._lock:
                if self._client is None:
                    self._client = make_client(self.config)
        return self._client

    async def _in_thread(self, act: Callable[[], T]) -> T:
        # Threads of its own: a server that hangs must not use up those that everything else runs in.
        with self._lock:
            if self._threads is None:
                self._threads = concurrent.futures.ThreadPoolExecutor(CONNECTIONS, "asgi_stream search")
            threads = self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, act)

    # The end

    def close(self) -> None:
        """Write what waits, for at most ``shutdown_seconds``, and let go. The next use begins anew."""
        with self._lock:
            sink, self._sink = self._sink, None
            client, self._client = self._client, None
            threads, self._threads = self._threads, None
        if sink is not None:
            sink.close()
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
