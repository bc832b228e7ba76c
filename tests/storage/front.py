"""A proxy in front of a search server: passwords, TLS, signatures, and what goes wrong on the way."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Check = Callable[[str, str, dict[str, str], bytes], bool]
"""From method, path, headers and body to whether the request may pass."""


class Front:
    """Passes requests on to a search server, but for what its attributes say."""

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.check: Check | None = None
        self.refuse_with = 401
        self.max_bytes: int | None = None
        self.lose_answers = 0  # so many bulk requests are done, and their answers lost
        self.strange: bytes | None = None  # every request is answered 200 with this, and not done
        self.busy_items = False  # every item of a bulk request is answered 429, and not done
        self.bulks = 0
        self.port = 0
        self._lock = threading.Lock()

    @contextmanager
    def running(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Front]:
        front = self
        connections: list[socket.socket] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ssl.SSLError):
                    self.close_connection = True

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                front._serve(self, body)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, *_: Any) -> None:
                pass  # a client that does not trust us hangs up

        server = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        bulk = "_bulk" in request.path
        if self.check is not None and not self.check(request.command, request.path, headers, body):
            self._answer(request, self.refuse_with, b'{"error": "no"}')
            return
        if self.max_bytes is not None and len(body) > self.max_bytes:
            self._answer(request, 413, b'{"error": "too large"}')
            return
        if self.strange is not None:
            self._answer(request, 200, self.strange, "text/html" if self.strange[:1] == b"<" else "application/json")
            return
        if bulk and self.busy_items:
            item = {"create": {"status": 429, "error": {"type": "cluster_block_exception", "reason": "disk"}}}
            self._answer(
                request, 200, json.dumps({"errors": True, "items": [item] * (body.count(b"\n") // 2)}).encode()
            )
            return
        upstream = http.client.HTTPConnection(*self.target, timeout=30)
        try:
            kept = {name: value for name, value in headers.items() if name in ("content-type", "accept")}
            upstream.request(request.command, request.path, body, kept)
            answer = upstream.getresponse()
            data = answer.read()
        except OSError:
            request.close_connection = True
            return
        finally:
            upstream.close()
        with self._lock:
            self.bulks += bulk
            lost = bulk and self.lose_answers > 0
            self.lose_answers -= lost
        if lost:
            request.close_connection = True
            return
        self._answer(request, answer.status, data, answer.getheader("content-type", "application/json"))

    @staticmethod
    def _answer(
        request: BaseHTTPRequestHandler, status: int, body: bytes, content_type: str = "application/json"
    ) -> None:
        request.send_response(status)
        request.send_header("content-type", content_type)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def password_is(username: str, password: str) -> Check:
    expected = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    return lambda method, path, headers, body: headers.get("authorization") == expected
