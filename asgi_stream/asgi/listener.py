"""The socket that a command's own web server listens on."""

from __future__ import annotations

import socket

from asgi_stream.errors import StreamError


class PortTakenError(StreamError):
    """Something else listens on the port that was asked for."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any. Raises `PortTakenError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise PortTakenError(
            f"port {port} of {host} is not free ({exc.strerror}): stop what uses it, or choose another with --port "
            "(--port 0 takes any)"
        ) from exc
    return listener
