"""How items become bytes. A format is chosen by name or given as an object of your own.

`sse`, `ndjson` and `text` are the plain ones; `resolve()` finds them.
"""

from __future__ import annotations

from asgi_stream.errors import ConfigurationError
from asgi_stream.formats.base import Format
from asgi_stream.formats.ndjson import NDJSON
from asgi_stream.formats.sse import SSE
from asgi_stream.formats.text import Text

__all__ = ["NDJSON", "SSE", "Format", "Text", "resolve"]

_BY_NAME: dict[str, Format] = {"sse": SSE(), "ndjson": NDJSON(), "text": Text()}


def resolve(format: str | Format) -> Format:
    """Return the format of that name, or *format* itself if it is one already."""
    if not isinstance(format, str):
        return format
    try:
        return _BY_NAME[format]
    except KeyError:
        names = ", ".join(repr(name) for name in _BY_NAME)
        raise ConfigurationError(
            f"format={format!r}: there are {names}, or give an object with a Format's methods"
        ) from None
