"""A library's log records as events of a run."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from asgi_stream.context import StreamContext
from asgi_stream.errors import StreamError

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}

_LEVELS = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
)


class EventLogHandler(logging.Handler):
    """Publishes each record as a `log` event of *context*: message, level, logger, and the ``extra`` fields.

    ``logging.getLogger("library").addHandler(EventLogHandler(ctx))``. It never raises and never blocks on Redis; what
    cannot be published, such as a record after the run's end, is dropped. Records of this package and of redis-py are
    left out: they would come back for ever.
    """

    def __init__(self, context: StreamContext, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in ("asgi_stream", "redis"):
            return
        try:
            fields: dict[str, Any] = {
                key: value if isinstance(value, str | int | float | bool | None) else repr(value)
                for key, value in vars(record).items()
                if key not in _STANDARD
            }
            if record.exc_info and record.exc_info[0] is not None:
                fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
            message = record.getMessage()
            self._context.log(message, _level(record.levelno), logger=record.name, fields=fields or None)
        except StreamError:
            pass
        except Exception:
            self.handleError(record)


def _level(number: int) -> str:
    for least, name in _LEVELS:
        if number >= least:
            return name
    return "debug"
