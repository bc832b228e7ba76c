"""A Redis Cluster and a Sentinel set-up of real processes, formed by commands only."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import redis

from asgi_stream.redis.embedded import EmbeddedRedis
from tests.redis_server import start_redis

HANG = 40.0


def until(condition: Any) -> None:
    deadline = time.monotonic() + HANG
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < deadline, "the servers did not come together"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _in_sync(replica: Any) -> bool:
    return str(replica.info("replication")["master_link_status"]) == "up"


class Cluster:
    """Three primaries with a replica each."""

    def __init__(self, folder: Path) -> None:
        self.servers: list[EmbeddedRedis] = []
        self.buses: list[int] = []
        for n in range(6):
            options = ["--cluster-enabled", "yes", "--cluster-config-file", str(folder / f"nodes-{n}.conf")]
            # Its own choice, 10,000 above its port, may be no port at all.
            self.buses.append(free_port())
            options += ["--cluster-port", str(self.buses[-1])]
            options += ["--repl-diskless-sync-delay", "0"]
            options += ["--cluster-node-timeout", "1500", "--cluster-allow-replica-migration", "no"]
            self.servers.append(start_redis(*options))
        self.clients: list[Any] = [redis.Redis(port=server.port, protocol=2) for server in self.servers]
        ids = [client.cluster("MYID").decode() for client in self.clients]
        for n, (first, last) in enumerate(((0, 5460), (5461, 10922), (10923, 16383))):
            self.clients[n].execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for n, client in enumerate(self.clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for server, bus in zip(self.servers[1:], self.buses[1:], strict=True):
            self.clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, bus)
        until(lambda: all(client.cluster("INFO")["cluster_known_nodes"] == "6" for client in self.clients))
        for n in range(3):
            until(lambda n=n: self.clients[n + 3].execute_command("CLUSTER", "REPLICATE", ids[n]))
        until(lambda: all(client.cluster("INFO")["cluster_state"] == "ok" for client in self.clients))
        until(lambda: all(_in_sync(self.clients[n]) for n in (3, 4, 5)))
        self.url = f"redis+cluster://127.0.0.1:{self.servers[0].port},127.0.0.1:{self.servers[1].port}"

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.stop()


class Sentinels:
    """A primary, a replica, and three sentinels that watch them."""

    def __init__(self, folder: Path) -> None:
        self.primary = start_redis("--repl-diskless-sync-delay", "0")
        self.replica = start_redis("--replicaof", f"127.0.0.1 {self.primary.port}")
        replica: Any = redis.Redis(port=self.replica.port, protocol=2)
        until(lambda: _in_sync(replica))
        replica.close()
        self.sentinels: list[EmbeddedRedis] = []
        for n in range(3):
            path = folder / f"sentinel-{n}.conf"
            path.write_text(
                f"sentinel monitor main 127.0.0.1 {self.primary.port} 2\n"
                "sentinel down-after-milliseconds main 800\nsentinel failover-timeout main 3000\n"
            )
            self.sentinels.append(EmbeddedRedis(config=path, sentinel=True).start())
        clients: list[Any] = [redis.Redis(port=server.port, protocol=2) for server in self.sentinels]
        for client in clients:
            until(lambda client=client: int(client.info("sentinel")["master0"]["sentinels"]) == 3)
            until(lambda client=client: int(client.info("sentinel")["master0"]["slaves"]) == 1)
            client.close()
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/main/0"

    def close(self) -> None:
        for server in [*self.sentinels, self.replica, self.primary]:
            server.stop()
