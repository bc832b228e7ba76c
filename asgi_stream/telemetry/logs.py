"""A library's log records as events of a run, or in the record of events."""

from __future__ import annotations

import logging
import os
import platform
import sys
import traceback
from typing import TYPE_CHECKING, Any

from asgi_stream.context import StreamContext
from asgi_stream.errors import ConfigurationError, StreamError
from asgi_stream.events import json_bytes

if TYPE_CHECKING:
    from asgi_stream.runtime import Streaming

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
_OWN = frozenset({"asgi_stream", "redis", "opensearch", "opensearchpy", "urllib3"})
MAX_TEXT = 32 * 1024
"""Characters of a message, a field or a traceback; what is longer is cut."""

_LEVELS = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
)


class EventLogHandler(logging.Handler):
    """Publishes log records: to a run's viewers, or into the record of events.

    With *context* each record is a `log` event of that run: message, level, logger, and the ``extra`` fields. Without
    one it goes through Redis to `asgi-stream archiver`, and from there into OpenSearch, with ``service``, host,
    process, exception and OpenTelemetry's trace ids; *workspace* says whose it is.

    It never raises and never blocks on Redis. What cannot be published, such as a record after the run's end, or what
    is beyond 10,000 records that wait for a Redis that is away, is dropped (``dropped`` counts the latter). Records of
    this package and of the libraries that it sends with are left out: they would come back for ever.
    """

    def __init__(
        self,
        context: StreamContext | None = None,
        level: int | str = logging.NOTSET,
        *,
        service: str | None = None,
        workspace: str | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(level)
        self._context = context
        self._about = {"service": service, "workspace": workspace}
        self._shipper = None
        if context is None:
            from asgi_stream.runtime import current_streaming
            from asgi_stream.telemetry.shipper import Shipper

            streaming = streaming or current_streaming()
            if streaming.channel_redis is None:
                raise ConfigurationError(
                    "EventLogHandler without a context sends log records through Redis: set REDIS_URL, or call "
                    "init_streaming(redis) before"
                )
            self._shipper = Shipper(streaming.channel_redis, streaming.channel_settings)

    @property
    def dropped(self) -> int:
        """Records that Redis was away for too long for."""
        return 0 if self._shipper is None else self._shipper.dropped

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in _OWN:
            return
        try:
            message, level = record.getMessage()[:MAX_TEXT], _level(record.levelno)
            fields, told = _fields(record), _exception(record)
            if self._context is not None:
                if told:
                    fields["exception"] = told
                self._context.log(message, level, logger=record.name, fields=fields or None)
            elif self._shipper is not None:
                self._shipper.send(json_bytes(self._stored(record, message, level, fields, told)))
        except StreamError:
            pass
        except Exception:
            self.handleError(record)

    def _stored(
        self, record: logging.LogRecord, message: str, level: str, fields: dict[str, Any], told: str | None
    ) -> dict[str, Any]:
        made = {
            "@timestamp": int(record.created * 1000),
            "key": os.urandom(4).hex(),
            "message": message,
            "level": level,
            "logger": record.name,
            "fields": fields,
            "exception": told,
            "host": platform.node(),
            "pid": os.getpid(),
            **self._about,
            **_trace(),
        }
        return {name: value for name, value in made.items() if value}

    def flush(self) -> None:
        """Wait until Redis has what was logged, for at most two seconds."""
        if self._shipper is not None:
            self._shipper.flush(2.0)

    def close(self) -> None:
        if self._shipper is not None:
            self._shipper.close()
        super().close()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in vars(record).items():
        if key not in _STANDARD:
            text = value if isinstance(value, str | int | float | bool | None) else repr(value)
            fields[key] = text[:MAX_TEXT] if isinstance(text, str) else text
    return fields


def _exception(record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[0] is None:
        return None
    return "".join(traceback.format_exception(*record.exc_info))[-MAX_TEXT:]


def _trace() -> dict[str, str]:
    """The ids of the current span, where OpenTelemetry is in use."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return {}
    context = api.get_current_span().get_span_context()
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"} if context.is_valid else {}


def _level(number: int) -> str:
    for least, name in _LEVELS:
        if number >= least:
            return name
    return "debug"
