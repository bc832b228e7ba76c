"""``asgi-stream leases`` as operators use it, beside a process that holds some."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.leases.test_redis import HolderProcess
from tests.leases.test_stores import until_old

HANG = 60.0


@pytest.fixture
def holder(redis_url: str) -> Iterator[HolderProcess]:
    asyncio.run(until_old(redis_url))
    process = HolderProcess(redis_url, f"command-{os.getpid()}", "ann\x1b[2J", 2, 30.0)
    yield process
    process.stop()


def leases(redis_url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environ = dict(os.environ, REDIS_URL=redis_url, ASGI_STREAM_LEASE_KEY_NAMESPACE=f"command-{os.getpid()}")
    return subprocess.run(
        [sys.executable, "-m", "asgi_stream", "leases", *words],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=environ,
        check=False,
    )


def test_list_and_revoke(redis_url: str, holder: HolderProcess) -> None:
    table = leases(redis_url, "list").stdout.splitlines()
    assert table[0].split() == ["USER", "OPEN", "FOR", "PROCESS", "LEASE"]
    assert len(table) == 3
    assert table[1].startswith("ann?[2J ")
    assert f"/{holder.process.pid}" in table[1]

    found = [json.loads(line) for line in leases(redis_url, "list", "ann\x1b[2J", "--json").stdout.splitlines()]
    assert [one["key"] for one in found] == ["user:ann\x1b[2J"] * 2
    first = found[0]["lease"]

    answer = leases(redis_url, "revoke", "--lease", first)
    assert (answer.stdout, answer.returncode) == ("1 revoked\n", 0)
    assert holder.line() == "lost revoked"
    assert leases(redis_url, "revoke", "--user", "ann\x1b[2J").stdout == "1 revoked\n"
    assert holder.line() == "lost revoked"
    answer = leases(redis_url, "revoke", "--user", "ann\x1b[2J")
    assert (answer.stdout, answer.returncode) == ("0 revoked\n", 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("revoke",), "revoke() takes user=, lease= or both"),
        (("list", "--redis-url", "redis://127.0.0.1:1"), "Redis at "),
        (("list", "--redis-url", "http://x"), "a Redis URL begins with"),
        (("list", "--namespace", "a{b"), "key_namespace must be printable ASCII"),
    ],
)
def test_what_is_wrong_is_one_line(redis_url: str, words: tuple[str, ...], told: str) -> None:
    answer = leases(redis_url, *words)
    assert answer.returncode == 1
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr
