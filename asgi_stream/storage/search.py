"""Searches of the record: the request, its pages, and from where to go on live. Pure.

The answer to a search of one channel says how far the record goes without a gap (`SearchPage.cursor`): the events up to
there were searched, and a live stream that begins after it gets all that come later. What the record has beyond that
point is left out of every page, so that nothing is missing and nothing comes twice.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from asgi_stream.channels.model import Position, check_channel
from asgi_stream.errors import ConfigurationError
from asgi_stream.storage.document import LEVELS

MAX_LIMIT = 1000
MAX_TEXT = 1000
MAX_EPOCHS = 10

Moment = datetime | float | int | str


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event of the record. ``time`` is in Unix seconds; ``id`` is its position in its channel's log."""

    channel: str | None
    id: str | None
    event: str
    data: Any
    time: float
    workspace: str | None = None
    project: str | None = None
    env: str | None = None
    service: str | None = None
    labels: tuple[str, ...] = ()
    level: str | None = None
    message: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)  # of log records: logger, fields, host, exception, trace ids


@dataclass(frozen=True, slots=True)
class SearchPage:
    """One page of what was found, the oldest first.

    ``after`` asks for the next page; None: there is none. ``cursor`` is the ``last_event_id`` to follow the channel
    from, live: everything up to it was searched. None for searches of more than one channel, and where the record has
    nothing of the channel yet: then follow it from its beginning.
    """

    events: tuple[StoredEvent, ...]
    after: str | None
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for. Raises `ConfigurationError` for what makes no sense."""

    channel: str | None = None
    workspace: str | None = None
    kinds: tuple[str, ...] = ()
    level: str | None = None
    text: str | None = None
    since: int | None = None  # Unix ms
    until: int | None = None
    limit: int = 100
    after: str | None = None

    @classmethod
    def of(
        cls,
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
    ) -> Search:
        if channel is None and workspace is None and not everything:
            raise ConfigurationError(
                "search() takes channel=, workspace=, or everything=True: nobody's events by mistake"
            )
        if channel is not None:
            check_channel(channel)
        if workspace is not None and (not workspace):
            raise ConfigurationError(f"workspace must be text that is not empty, not {workspace!r}")
        if level is not None and level not in LEVELS:
            raise ConfigurationError(f"level must be one of {', '.join(LEVELS)}, not {level!r:.80}")
        if text is not None and len(text) > MAX_TEXT:
            raise ConfigurationError(f"text must be a string of at most {MAX_TEXT} characters")
        if type(limit) is not int or not 1 <= limit <= MAX_LIMIT:
            raise ConfigurationError(f"limit must be a whole number from 1 to {MAX_LIMIT}, not {limit!r:.80}")
        page = _Page.parse(after)
        if page is not None and page.sort and len(page.sort) != len(_order(channel)):
            raise ConfigurationError("after is a page of another kind of search")
        named = (kinds,) if isinstance(kinds, str) else tuple(kinds or ())
        if len(named) > 50 or not all(isinstance(kind, str) for kind in named):
            raise ConfigurationError("kinds must be at most 50 names of events")
        return cls(
            channel,
            workspace,
            named,
            level,
            text.strip() if text else None,
            _milliseconds("since", since),
            _milliseconds("until", until),
            limit,
            after,
        )

    def body(self) -> dict[str, Any]:
        """The request."""
        page = _Page.parse(self.after)
        whose: list[dict[str, Any]] = []
        if self.channel is not None:
            whose.append({"term": {"channel": self.channel}})
        if self.workspace is not None:
            whose.append({"term": {"workspace": self.workspace}})
        wanted: list[dict[str, Any]] = []
        if self.kinds:
            wanted.append({"terms": {"kind": list(self.kinds)}})
        if self.level is not None:
            wanted.append({"terms": {"level": list(LEVELS[LEVELS.index(self.level) :])}})
        if self.since is not None or self.until is not None:
            bounds = {"gte": self.since, "lt": self.until, "format": "epoch_millis"}
            wanted.append({"range": {"@timestamp": {key: bound for key, bound in bounds.items() if bound is not None}}})
        if self.text:
            wanted.append({"match": {"message": {"query": self.text, "operator": "and"}}})
        if page is not None and page.position is not None:
            wanted.append(_not_beyond(page.position))
        if page is not None and page.epochs:
            wanted.append({"term": {"epoch": page.epochs[0]}})
        body: dict[str, Any] = {
            "query": {"bool": {"filter": whose}} if whose else {"match_all": {}},
            "size": self.limit,
            "sort": [{name: {"order": "asc", "missing": "_first"}} for name in _order(self.channel)],
            "track_total_hits": False,
        }
        if wanted:
            # Beside the query, so that the aggregation sees the whole channel at the same moment.
            body["post_filter"] = {"bool": {"filter": wanted}}
        if page is not None and page.sort:
            body["search_after"] = page.sort
        if page is None and self.channel is not None:
            body["aggs"] = {
                "epochs": {
                    "terms": {"field": "epoch", "size": MAX_EPOCHS, "order": {"latest": "desc"}},
                    "aggs": {
                        "latest": {"max": {"field": "@timestamp"}},
                        "first": {"min": {"field": "offset"}},
                        "last": {"max": {"field": "offset"}},
                        "ended": {"filter": {"term": {"ending": True}}},
                    },
                }
            }
        return body

    def page(self, answer: Mapping[str, Any]) -> tuple[SearchPage, Search | None]:
        """Read the answer; return a page, and what else is to be asked for if it is not full."""
        asked = _Page.parse(self.after)
        hits = answer["hits"]["hits"]
        if asked is not None:
            position, epochs = asked.position, asked.epochs
        else:
            position, epochs = _reached(answer.get("aggregations"))
            if len(epochs) > 1:
                # Its log was lost and began anew: one after the other, the oldest first.
                begin = _Page([], position, epochs).text()
                return SearchPage((), None, _text(position)), replace(self, after=begin)
            if position is not None:
                hits = [hit for hit in hits if not _is_beyond(hit["_source"], position)]
        events = tuple(_event(hit["_source"]) for hit in hits)
        if hits and len(answer["hits"]["hits"]) == self.limit:
            return SearchPage(events, _Page(hits[-1]["sort"], position, epochs).text(), _text(position)), None
        if len(epochs) > 1:
            following = replace(self, after=_Page([], position, epochs[1:]).text(), limit=self.limit - len(hits))
            return SearchPage(events, None, _text(position)), following
        return SearchPage(events, None, _text(position)), None


def _order(channel: str | None) -> tuple[str, ...]:
    # In one channel offsets count, not the clocks of those who published.
    return ("@timestamp", "channel", "epoch", "offset") if channel is None else ("offset",)


class _Page:
    """Where a page ends: the sort values of its last hit (none: nothing was read yet).

    ``position``: how far the record went when the first page was asked for; ``epochs``: which ones are to be
    read, this one first.
    """

    def __init__(self, sort: list[Any], position: Position | None, epochs: list[str]) -> None:
        self.sort = sort
        self.position = position
        self.epochs = epochs

    def text(self) -> str:
        made = json.dumps([self.sort, _text(self.position), self.epochs], separators=(",", ":"))
        return base64.urlsafe_b64encode(made.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str | None) -> _Page | None:
        if text is None:
            return None
        try:
            if len(text) > 2000:
                raise ValueError
            sort, position, epochs = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
            if not all(isinstance(value, str | int | None) for value in sort) or len(sort) > 4:
                raise ValueError
            if not all(isinstance(epoch, str) for epoch in epochs) or len(epochs) > MAX_EPOCHS:
                raise ValueError
            return cls(list(sort), None if position is None else Position.parse(position), list(epochs))
        except (ValueError, TypeError):
            raise ConfigurationError("after is not what an earlier page said") from None


def _text(position: Position | None) -> str | None:
    return None if position is None else str(position)


def _reached(aggregations: Any) -> tuple[Position | None, list[str]]:
    """How far the record of a channel goes without a gap in its latest epoch; and all epochs, the oldest first."""
    buckets = aggregations["epochs"]["buckets"] if aggregations else []
    if not buckets:
        return None, []
    latest = buckets[0]
    epochs = [bucket["key"] for bucket in reversed(buckets)]
    first, last = int(latest["first"]["value"]), int(latest["last"]["value"])
    if latest["doc_count"] != last - first + 1:
        return Position(latest["key"], first - 1), epochs  # some are still on their way
    return Position(latest["key"], last, latest["ended"]["doc_count"] > 0), epochs


def _not_beyond(position: Position) -> dict[str, Any]:
    """The filter for what a live stream from *position* on does not tell."""
    beyond = [{"term": {"epoch": position.epoch}}, {"range": {"offset": {"gt": position.offset}}}]
    return {"bool": {"must_not": [{"bool": {"filter": beyond}}]}}


def _is_beyond(source: Mapping[str, Any], position: Position) -> bool:
    return bool(source.get("epoch") == position.epoch and source.get("offset", 0) > position.offset)


_SHOWN = ("logger", "fields", "host", "pid", "exception", "trace_id", "span_id")


def _event(source: Mapping[str, Any]) -> StoredEvent:
    position = None
    if source.get("epoch"):
        position = str(Position(source["epoch"], source["offset"], bool(source.get("ending"))))
    return StoredEvent(
        source.get("channel"),
        position,
        source.get("kind", "message"),
        source.get("data"),
        source["@timestamp"] / 1000,
        source.get("workspace"),
        source.get("project"),
        source.get("env"),
        source.get("service"),
        tuple(source.get("labels") or ()),
        source.get("level"),
        source.get("message"),
        {name: source[name] for name in _SHOWN if name in source},
    )


def _milliseconds(name: str, moment: Moment | None) -> int | None:
    if moment is None:
        return None
    try:
        if isinstance(moment, str):
            moment = _read_moment(moment)
        if isinstance(moment, datetime):
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            moment = moment.timestamp()
        made = round(moment * 1000)
        if not 0 <= made < 2**53:
            raise ValueError
        return made
    except (ValueError, TypeError, OverflowError):
        raise ConfigurationError(
            f"{name} must be a datetime, ISO 8601 text or Unix seconds, not {moment!r:.80}"
        ) from None


def _read_moment(text: str) -> datetime | float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text)
