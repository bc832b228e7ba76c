"""An event as a document of OpenSearch, and the index that it belongs to. Pure.

Written again, a document has the same index and the same id: the index is dated by the event's own time, never by now,
and the id is its channel and position. So a retry, even after midnight, is the same document [S4].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from asgi_stream.channels.model import Position
from asgi_stream.config import StorageConfig
from asgi_stream.events import ENDINGS, json_bytes

LEVELS = ("debug", "info", "warning", "error", "critical")
VERSION = 1
"""Of the mapping below."""

YIELD_EVERY = 8
"""After so many documents a thread that handles many lets others run: it must not hold up an event loop."""

_DAY = 24 * 3600 * 1000
_KEYWORD = {"type": "keyword", "ignore_above": 512}


@dataclass(frozen=True, slots=True)
class Document:
    """What is written: where, under which name, and its JSON."""

    index: str
    id: str
    source: bytes

    @property
    def weight(self) -> int:
        """About how many bytes it takes in a request."""
        return len(self.source) + 256


def documents(
    config: StorageConfig, channel: str, about: bytes, epoch: str, first: int, frames: tuple[bytes, ...], at: int
) -> Iterator[Document]:
    """Make the documents of what was appended to *channel* at the time *at* (Unix ms), from offset *first* on.

    *frames* may have their ids or not; *about* is the JSON of whose run it is.
    """
    whose = _whose(about)
    for offset, frame in enumerate(frames, first):
        event, data = _read(frame)
        position = str(Position(epoch, offset))
        made: dict[str, Any] = {"channel": channel, **whose, "kind": event, "epoch": epoch, "offset": offset}
        if event in ENDINGS:
            made["ending"] = True
        moment = at
        try:
            value = msgspec.json.decode(data)
            made["data"] = msgspec.Raw(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = made["data"] = data.decode("utf-8", "replace")
        if isinstance(value, dict):
            told = value.get("ts")
            # A time that is far from the publishing is no time: it would make an index of its own.
            if isinstance(told, int) and not isinstance(told, bool) and abs(told - at) < _DAY:
                moment = told
            made["message"] = next(
                (value[name] for name in ("message", "text", "step", "name") if isinstance(value.get(name), str)), None
            )
            for name in ("level", "logger"):
                if isinstance(value.get(name), str):
                    made[name] = value[name]
        elif isinstance(value, str):
            made["message"] = value
        made["@timestamp"] = moment
        yield Document(index_of(config, moment), f"{channel}:{position}", json_bytes(made))


def log_document(config: StorageConfig, entry: str, record: bytes) -> Document:
    """Make the document of a log record that came by the Redis stream as *entry* (``<Unix ms>-<n>``)."""
    made: dict[str, Any] = msgspec.json.decode(record)
    moment = made.get("@timestamp")
    if not isinstance(moment, int):
        moment = made["@timestamp"] = int(entry.partition("-")[0])
    made["kind"] = "log"
    return Document(index_of(config, moment), f"log:{entry}:{made.pop('key', '')}", json_bytes(made))


def index_of(config: StorageConfig, moment: int) -> str:
    """The index of an event of that time (Unix ms)."""
    if config.data_stream:
        return config.index_prefix
    return f"{config.index_prefix}-{datetime.fromtimestamp(moment / 1000, UTC):%Y.%m.%d}"


def is_expired(config: StorageConfig, index: str, now: datetime, days: int) -> bool:
    """Whether all events of a dated index are older than so many days."""
    try:
        day = datetime.strptime(index.removeprefix(config.index_prefix), "-%Y.%m.%d").replace(tzinfo=UTC)
    except ValueError:
        return False
    return day + timedelta(days=days + 1) <= now


def template(config: StorageConfig) -> dict[str, Any]:
    """The index template: what the fields are. What events carry is stored whole, and not indexed."""
    keywords = ("channel", "workspace", "project", "env", "service", "labels", "kind", "level", "logger", "epoch")
    mappings = {
        "dynamic": False,
        "properties": {
            "@timestamp": {"type": "date", "format": "epoch_millis||strict_date_optional_time"},
            **dict.fromkeys((*keywords, "host", "trace_id", "span_id"), _KEYWORD),
            "offset": {"type": "long"},
            "ending": {"type": "boolean"},
            "message": {"type": "text"},
            "exception": {"type": "text"},
            "data": {"type": "object", "enabled": False},
            "fields": {"type": "object", "enabled": False},
        },
    }
    made: dict[str, Any] = {
        "index_patterns": [config.index_prefix if config.data_stream else f"{config.index_prefix}-*"],
        "priority": 200,
        "version": VERSION,
        "template": {"settings": {"index": {"number_of_shards": 1}}, "mappings": mappings},
    }
    if config.data_stream:
        made["data_stream"] = {}
    else:
        made["template"]["aliases"] = {config.index_prefix: {}}
    return made


def retention_policy(config: StorageConfig, days: int) -> dict[str, Any]:
    """The policy for OpenSearch's index state management: roll over daily, delete after so many days."""
    delete = {"state_name": "delete", "conditions": {"min_index_age": f"{days}d"}}
    return {
        "policy": {
            "description": f"asgi_stream: events are kept for {days} days",
            "default_state": "hot",
            "states": [
                {
                    "name": "hot",
                    "actions": [{"rollover": {"min_index_age": "1d", "min_primary_shard_size": "30gb"}}],
                    "transitions": [delete],
                },
                {"name": "delete", "actions": [{"delete": {}}], "transitions": []},
            ],
            "ism_template": [{"index_patterns": [config.index_prefix], "priority": 200}],
        }
    }


def _whose(about: bytes) -> dict[str, Any]:
    made = msgspec.json.decode(about) if about else {}
    return made if isinstance(made, dict) else {}


def _read(frame: bytes) -> tuple[str, bytes]:
    """The name and the data of a block that this package made."""
    event = "message"
    data: list[bytes] = []
    for line in frame.split(b"\n"):
        if line.startswith(b"data: "):
            data.append(line[6:])
        elif line.startswith(b"event: "):
            event = line[7:].decode()
        elif line == b"data:":
            data.append(b"")
    return event, b"\n".join(data)
