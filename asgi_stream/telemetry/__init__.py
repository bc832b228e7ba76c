"""What others can see: log records as events."""

from asgi_stream.telemetry.logs import EventLogHandler

__all__ = ["EventLogHandler"]
