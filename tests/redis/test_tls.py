"""Redis over TLS: one server, a cluster and Sentinels; certificates are checked, and asked for [C6]."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis as driver

from asgi_stream import (
    AsyncStreamChannel,
    QueueRedisConfig,
    StreamContext,
    Streaming,
    StreamLeaseConfig,
    StreamLeaseLimiter,
    StreamLimitExceeded,
    shutdown_streaming,
    sse_response,
)
from asgi_stream.errors import BackendError
from asgi_stream.job_queue import QueueConfig, QueueManager, QueueWorker
from asgi_stream.redis.embedded import SERVER_VARIABLE, EmbeddedRedis
from tests.asgi_client import Exchange, http_scope
from tests.redis.topologies import free_port, until
from tests.support import need_module, need_program

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

HANG = 60.0


@dataclass(frozen=True)
class Files:
    """What the servers and their clients are given."""

    ca: Path
    other_ca: Path
    certificate: Path
    key: Path

    @property
    def trusting(self) -> str:
        return f"ssl_ca_certs={self.ca}"

    @property
    def known(self) -> str:
        return f"{self.trusting}&ssl_certfile={self.certificate}&ssl_keyfile={self.key}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    trustme = need_module("trustme")
    folder = tmp_path_factory.mktemp("tls")
    ca, other = trustme.CA(), trustme.CA()
    made = Files(*(folder / name for name in ("ca.pem", "other.pem", "certificate.pem", "key.pem")))
    ca.cert_pem.write_to_path(made.ca)
    other.cert_pem.write_to_path(made.other_ca)
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    issued.private_key_pem.write_to_path(made.key)
    return made


@pytest.fixture
def server_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded server is built without."""
    program = need_program("redis-server", "a Redis that is built with TLS: apt install redis-server")
    monkeypatch.setenv(SERVER_VARIABLE, program)


def start(files: Files, *options: str, clients: str = "no", **more: Any) -> tuple[EmbeddedRedis, int]:
    """Start a server, and return it with its port for TLS; the other one is for the test."""
    port = free_port()
    options += ("--tls-port", str(port), "--tls-cert-file", str(files.certificate), "--tls-key-file", str(files.key))
    options += ("--tls-ca-cert-file", str(files.ca), "--tls-auth-clients", clients)
    return EmbeddedRedis(*options, **more).start(), port


@pytest.fixture
def port(files: Files, server_with_tls: None) -> Iterator[int]:
    server, port = start(files)
    yield port
    server.stop()


async def serves(url: str) -> None:
    """Channels, sync and async, and leases."""
    async with Streaming(redis=url) as streaming:
        streaming.broker.patience = 30.0  # type: ignore[attr-defined]
        ctx = StreamContext.create("ann", streaming=streaming)
        viewer = Exchange(await sse_response(ctx.channel_id, streaming=streaming), http_scope())
        await viewer.until_body(b"ready")
        worker = StreamContext.from_dict(ctx.to_dict(), streaming=streaming)
        worker.log("x" * 100_000)  # more than a record of TLS
        await worker.log_async("from async code")
        await asyncio.to_thread(worker.complete)
        async with asyncio.timeout(HANG):
            await viewer.end()
        assert [event.event for event in viewer.events][-3:] == ["log", "log", "complete"]
        history = await AsyncStreamChannel(ctx.channel_id, streaming=streaming).history()
        assert len(history) == 3
    one, two = (StreamLeaseLimiter(StreamLeaseConfig(limit=1), redis=QueueRedisConfig(url)) for _ in range(2))
    try:
        async with asyncio.timeout(HANG):
            for limiter in (one, two):
                while not (limiter._redis and limiter._redis.admits):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        lease = await one.acquire_async("ann")
        with pytest.raises(StreamLimitExceeded):
            await two.acquire_async("ann")
        lease.release()
    finally:
        await one.aclose()
        await two.aclose()


async def refused(url: str, match: str) -> None:
    async with Streaming(redis=url) as streaming:
        streaming.broker.patience = 0.2  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match=match):
            await AsyncStreamChannel("tls", streaming=streaming).publish(1)
        with pytest.raises(BackendError, match=match):
            await asyncio.to_thread(StreamContext.create("ann", streaming=streaming).complete)


async def test_a_server(files: Files, port: int) -> None:
    await serves(f"rediss://localhost:{port}/0?{files.trusting}")


async def test_a_server_whose_certificate_is_not_trusted(files: Files, port: int) -> None:
    await refused(f"rediss://localhost:{port}/0?ssl_ca_certs={files.other_ca}", "certificate verify failed")
    await refused(f"rediss://localhost:{port}/0", "certificate verify failed")


async def test_a_server_that_asks_for_a_certificate(files: Files, server_with_tls: None) -> None:
    server, port = start(files, clients="yes")
    try:
        await serves(f"rediss://localhost:{port}/0?{files.known}")
        await refused(f"rediss://localhost:{port}/0?{files.trusting}", "certificate required|closed|reset|EOF")
    finally:
        server.stop()


async def test_the_wrong_one_of_two_ports(files: Files, server_with_tls: None) -> None:
    server, port = start(files)
    try:
        await refused(f"rediss://localhost:{server.port}/0?{files.trusting}", "SSL|closed|reset|Timeout")
        await refused(f"redis://localhost:{port}/0", "closed|reset")
    finally:
        server.stop()


async def test_a_cluster(files: Files, server_with_tls: None) -> None:
    buses = [free_port() for _ in range(3)]
    options = ("--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-port")
    started = [start(files, *options, str(bus)) for bus in buses]
    clients: list[Any] = [driver.Redis(port=server.port, protocol=2) for server, _ in started]
    try:
        for client, (first, last) in zip(clients, ((0, 5460), (5461, 10922), (10923, 16383)), strict=True):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for (_, port), bus in zip(started[1:], buses[1:], strict=True):
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        until(lambda: all(client.cluster("INFO")["cluster_state"] == "ok" for client in clients))
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in started)
        for _ in range(3):  # a channel's id chooses its node
            await serves(f"rediss+cluster://{hosts}?{files.trusting}")
        await serves(f"rediss+cluster://{hosts}?ssl_cert_reqs=none&ssl_check_hostname=false")
    finally:
        for client in clients:
            client.close()
        for server, _ in started:
            server.stop()


async def test_sentinels(files: Files, server_with_tls: None, tmp_path: Path) -> None:
    server, port = start(files)
    path = tmp_path / "sentinel.conf"
    path.write_text(f"sentinel monitor main 127.0.0.1 {port} 1\n")
    sentinel, asked = start(files, "--tls-replication", "yes", config=path, sentinel=True)
    client: Any = driver.Redis(port=sentinel.port, protocol=2)
    try:
        until(lambda: client.info("sentinel")["master0"]["status"] == "ok")
        await serves(f"rediss+sentinel://127.0.0.1:{asked}/main/0?{files.trusting}")
    finally:
        client.close()
        sentinel.stop()
        server.stop()


async def test_jobs(files: Files, port: int) -> None:
    url = f"rediss://localhost:{port}/0?{files.trusting}"
    registry = {"double": lambda entity: entity["n"] * 2}
    manager = QueueManager(QueueConfig(url, operations_registry=registry))
    worker = asyncio.create_task(QueueWorker(QueueConfig(url, operations_registry=registry)).start())
    try:
        job = await manager.enqueue_async({"n": 21}, "double")
        async with asyncio.timeout(HANG):
            while not (status := await job.status_async()).done:  # noqa: ASYNC110 - docket tells nobody
                await asyncio.sleep(0.01)
        assert status.result == 42
    finally:
        worker.cancel()
        await asyncio.wait([worker])
        await manager.aclose()
        await shutdown_streaming()  # the worker gave the process its Redis
