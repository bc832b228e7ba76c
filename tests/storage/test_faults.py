"""The record when things go wrong: nothing is lost within the bounds, nothing comes twice, and publishing goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from asgi_stream.errors import BackendError, ConfigurationError
from asgi_stream.storage import OpenSearchEventStorage
from asgi_stream.storage.spool import Spool
from tests.storage.conftest import MakeStorage
from tests.storage.front import Front, password_is
from tests.storage.server import SearchServer
from tests.storage.test_contract import entry, every_page, refresh, until, write
from tests.support import need_module

HANG = 60.0
OUTAGE = 10.0 if os.environ.get("CI") == "true" else 2.0
RATE = 1000


def messages(storage: OpenSearchEventStorage, channel: str = "c") -> list[str]:
    refresh(storage)
    return [str(one.message) for one in every_page(storage, 1000, channel=channel)]


def test_opensearch_is_away_for_a_while(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """1,000 events a second go on; afterwards every one is there, once."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port, flush_seconds=0.1)
        write(storage, entry("c", ("log", {"message": "0"})))
        port = front.port
    slowest, n = 0.0, 1
    ends = time.monotonic() + OUTAGE
    while time.monotonic() < ends:
        for _ in range(RATE // 100):
            begun = time.perf_counter()
            storage.offer(entry("c", ("log", {"message": str(n)}), first=n + 1))
            slowest = max(slowest, time.perf_counter() - begun)
            n += 1
        time.sleep(0.01)
    until(lambda: storage.stats().spooled > 0)
    stats = storage.stats()
    assert (stats.reachable, stats.dropped, stats.written) == (False, 0, 1)
    assert "cannot be reached" in stats.error
    with front.running(port=port):
        assert storage.flush(HANG)
        assert messages(storage) == [str(k) for k in range(n)]
        assert (storage.stats().reachable, storage.stats().spool_bytes) == (True, 0)
        assert slowest < 1.0
        storage.close()


def test_a_server_that_is_killed(own_server: SearchServer, make_storage: MakeStorage) -> None:
    """SIGKILL of OpenSearch itself, and its start anew on the same data."""
    if not own_server.is_node:
        pytest.skip("osmem-server keeps nothing over its end")
    storage = make_storage(own_server, flush_seconds=0.1)
    stop = threading.Event()
    count = 0

    def publish() -> None:
        nonlocal count
        begun = time.monotonic()
        while not stop.is_set():
            storage.offer(entry("c", ("log", {"message": str(count)}), first=count + 1))
            count += 1
            time.sleep(max(begun + count / RATE - time.monotonic(), 0.0))

    publisher = threading.Thread(target=publish)
    publisher.start()
    until(lambda: storage.stats().written > 500)
    own_server.kill()
    time.sleep(OUTAGE)
    own_server.start()
    stop.set()
    publisher.join()
    assert storage.flush(HANG)
    assert messages(storage) == [str(n) for n in range(count)]
    assert storage.stats().dropped == 0


def test_answers_that_are_lost(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """It was done, nobody was told, it is sent again: it is there once."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port)
        front.lose_answers = 2
        for n in range(50):
            storage.offer(entry("c", ("log", {"message": str(n)}), first=n + 1))
        assert storage.flush(HANG)
        assert messages(storage) == [str(n) for n in range(50)]
        assert storage.stats().repeated > 0
        storage.close()


def test_answers_that_are_lost_over_a_rollover(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """In a data stream an id is known in the newest index only: what may be there is looked for first."""
    if not search_server.is_node:
        pytest.skip("osmem-server has no data streams")
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port, data_stream=True)
        write(storage, entry("c", ("log", {"message": "first"})))
        front.lose_answers = 1
        storage.offer(entry("c", ("log", {"message": "second"}), first=2))
        until(lambda: storage.stats().spooled == 1)
        storage.client.indices.rollover(alias=storage.config.index_prefix)
        assert storage.flush(HANG)
        assert messages(storage) == ["first", "second"]
        storage.close()


@pytest.mark.parametrize("strange", [b"<html>Please log in</html>", b"{}", b'{"items": [], "hits": {}}', b"[]", b"{"])
def test_answers_that_are_not_opensearchs(
    search_server: SearchServer, make_storage: MakeStorage, strange: bytes
) -> None:
    """Something in between answers in its place: what was to be written waits."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port, flush_seconds=0.05)
        front.strange = strange
        for n in range(5):
            storage.offer(entry("c", ("log", {"message": str(n)}), first=n + 1))
        until(lambda: storage.stats().spooled == 5)
        assert "is not OpenSearch" in storage.stats().error
        with pytest.raises(BackendError, match="is not OpenSearch"):
            storage.search(channel="c")
        with pytest.raises(BackendError, match="is not OpenSearch"):
            storage.status()
        front.strange = None
        assert storage.flush(HANG)
        assert messages(storage) == ["0", "1", "2", "3", "4"]
        assert (storage.stats().written, storage.stats().dropped) == (5, 0)
        storage.close()


def test_a_server_that_has_forgotten_all(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """Its index template, too: it is there again before the first event makes an index without it."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port, flush_seconds=0.05)
        write(storage, entry("c", ("log", {"message": "before"})))
        port = front.port
    storage.offer(entry("c", ("log", {"message": "after"}), first=2))
    until(lambda: storage.stats().spooled == 1)
    other = make_storage(search_server, index_prefix=storage.config.index_prefix)
    for index in other.status()["indices"]:
        other.client.indices.delete(index=index)
    other.client.indices.delete_index_template(name=storage.config.index_prefix)
    with front.running(port=port):
        assert storage.flush(HANG)
        assert messages(storage) == ["after"]
        assert storage.status()["template"] is True
        storage.close()


def test_a_full_disk_of_the_server(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """Flood stage answers 429 for each item, or blocks the index: that passes, and everything is there then, once."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port)
        write(storage, entry("c", ("log", {"message": "0"})))
        index = storage.status()["indices"][0]
        settings = storage.client.indices.put_settings
        if search_server.is_node:
            settings(index=index, body={"index.blocks.read_only_allow_delete": True})
        else:
            front.busy_items = True
        for n in range(1, 100):
            storage.offer(entry("c", ("log", {"message": str(n)}), first=n + 1))
        until(lambda: storage.stats().spooled == 99)
        assert "429" in storage.stats().error
        time.sleep(1.0)  # it is tried again meanwhile
        if search_server.is_node:
            settings(index=index, body={"index.blocks.read_only_allow_delete": None})
        front.busy_items = False
        assert storage.flush(HANG)
        assert messages(storage) == [str(n) for n in range(100)]
        storage.close()


def test_what_opensearch_never_takes_is_kept(
    search_server: SearchServer, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's mapping, or a size that the server does not take: told, kept in a file; the rest is written."""
    front = Front(*search_server.settings.values())
    with front.running():
        front.max_bytes = 100_000
        storage = make_storage(search_server, port=front.port)
        storage.setup()
        broken = f"{storage.config.index_prefix}-2026.01.01"
        storage.client.indices.create(index=broken, body={"mappings": {"properties": {"message": {"type": "long"}}}})
        at = 1767225600000  # of that day
        write(
            storage,
            entry("c", ("log", {"message": "no number"}), at=at),
            entry("c", ("log", {"message": "x" * 200_000}), ("log", {"message": "fits"}), first=2),
        )
        assert messages(storage) == ["fits"]
        stats = storage.stats()
        assert (stats.refused, stats.written, stats.dropped) == (2, 1, 0)
        kept = Path(storage.config.spool_dir, "refused.jsonl").read_text()
        assert "no number" in kept
        assert '"why":"400: mapper_parsing_exception' in kept
        assert "the server takes no request of this size (413)" in kept
        assert "OpenSearch refused" in caplog.text
        storage.close()


def test_bounds(search_server: SearchServer, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the spool's bound the oldest go, are counted, and said in the log."""
    front = Front(*search_server.settings.values())
    with front.running():
        port = front.port
    storage = make_storage(search_server, port=port, spool_bytes=9 * 1024 * 1024)
    for n in range(40):
        storage.offer(entry("c", ("log", {"message": f"{n} {'x' * 500_000}"}), first=n + 1))
        until(lambda: storage.stats().waiting == 0)
    until(lambda: storage.stats().dropped + storage.stats().spooled == 40)
    dropped = storage.stats().dropped
    assert dropped > 15
    assert storage.stats().spool_bytes <= 9 * 1024 * 1024
    assert "were dropped" in caplog.text
    with front.running(port=port):
        assert storage.flush(HANG)
        refresh(storage)
        found = every_page(storage, 10, kinds="log", workspace=None, everything=True)
        assert sorted(int(str(one.message).split()[0]) for one in found) == list(range(dropped, 40))
        storage.close()


def test_the_queue_is_bounded(search_server: SearchServer, make_storage: MakeStorage) -> None:
    storage = make_storage(search_server, queue_bytes=100_000, flush_seconds=60.0)
    for n in range(400):
        storage.offer(entry("c", ("log", {"message": "x" * 1000}), first=n + 1))
    stats = storage.stats()
    assert stats.waiting < 100
    assert stats.dropped == 400 - stats.waiting
    storage.close()


def test_a_spool_that_takes_nothing(
    search_server: SearchServer, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, or a folder that went away: what is in memory waits for OpenSearch."""
    front = Front(*search_server.settings.values())
    with front.running():
        storage = make_storage(search_server, port=front.port)
        write(storage, entry("c", ("log", {"message": "0"})))
        port = front.port
    shutil.rmtree(storage.config.spool_dir)
    storage.offer(entry("c", ("log", {"message": "1"}), first=2))
    until(lambda: "takes nothing" in caplog.text)
    storage.offer(entry("c", ("log", {"message": "2"}), first=3))
    with front.running(port=port):
        assert storage.flush(HANG)
        assert messages(storage) == ["0", "1", "2"]
        storage.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files")
def test_the_next_process_writes_what_a_killed_one_left(search_server: SearchServer, make_storage: MakeStorage) -> None:
    front = Front(*search_server.settings.values())
    with front.running():
        port = front.port
    storage = make_storage(search_server, port=port)
    environ = {
        **os.environ,
        "ASGI_STREAM_ENABLE_STORAGE": "1",
        "OPENSEARCH_HOST": "127.0.0.1",
        "OPENSEARCH_PORT": str(port),
        "OPENSEARCH_INDEX_PREFIX": storage.config.index_prefix,
        "OPENSEARCH_SPOOL_DIR": storage.config.spool_dir,
        "OPENSEARCH_FLUSH_SECONDS": "0.05",
    }
    environ.pop("REDIS_URL", None)
    command = [sys.executable, "-m", "tests.storage.publisher", "c", "300", "1000"]
    process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "published\n"

    def spooled() -> int:
        return sum(path.read_bytes().count(b"\n") for path in Path(storage.config.spool_dir).glob("*/*.jsonl"))

    until(lambda: spooled() == 300)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with front.running(port=port):
        storage.offer(entry("other", ("log", {"message": "x"})))
        until(lambda: storage.stats().written == 301)
        assert messages(storage) == [str(n) for n in range(300)]
        storage.close()
    assert [path.name for path in Path(storage.config.spool_dir).iterdir()] == []


def test_a_damaged_spool(tmp_path: Path) -> None:
    """A line that was cut by a crash costs that line alone."""
    from asgi_stream.storage.document import Document

    spool = Spool(tmp_path, 1_000_000)
    spool.append([Document("i", str(n), b'{"n":1}') for n in range(3)])
    spool.close()
    (segment,) = tmp_path.glob("*/*.jsonl")
    segment.write_bytes(segment.read_bytes() + b'{"i":"i","d":"3","s":{"n"')
    again = Spool(tmp_path, 1_000_000)
    found, position = again.peek(100, 10_000)
    assert [document.id for document in found] == ["0", "1", "2"]
    again.discard(len(found), position)
    again.append([Document("i", "4", b"{}")])
    found, position = again.peek(100, 10_000)
    assert [document.id for document in found] == ["4"]
    again.discard(1, position)
    assert again.peek(100, 10_000) == ([], 0)
    assert again.count == 0
    again.close()


def test_what_waits_is_written_at_the_end(search_server: SearchServer, make_storage: MakeStorage) -> None:
    storage = make_storage(search_server, flush_seconds=30.0)
    storage.offer(entry("c", *(("log", {"message": str(n)}) for n in range(100))))
    begun = time.monotonic()
    storage.close()
    assert time.monotonic() - begun < 10.0
    assert messages(storage) == [str(n) for n in range(100)]


@pytest.mark.parametrize("silent", [False, True])
def test_the_end_does_not_wait_for_a_server_that_is_away_or_silent(
    search_server: SearchServer, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture, silent: bool
) -> None:
    """What is not written by then is in the spool [O1]."""
    front = Front(*search_server.settings.values())
    with front.running():
        port = front.port
    with socket.create_server(("127.0.0.1", port)) if silent else nullcontext():
        storage = make_storage(search_server, port=port, shutdown_seconds=0.5)
        storage.offer(entry("c", ("log", {"message": "0"})))
        until(lambda: storage.stats().waiting == 0)
        storage.offer(entry("c", ("log", {"message": "1"}), first=2))
        begun = time.monotonic()
        storage.close()
        assert time.monotonic() - begun < 5.0
    assert "2 events were not written; 2 wait in" in caplog.text
    with front.running(port=port):
        storage.offer(entry("d", ("log", {"message": "2"})))
        until(lambda: storage.stats().written == 3)
        assert messages(storage) == ["0", "1"]
        storage.close()


# Who may


def test_basic_over_tls(search_server: SearchServer, make_storage: MakeStorage, tmp_path: Path) -> None:
    trustme = need_module("trustme")
    ours, another = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    trusted, untrusted = tmp_path / "ca.pem", tmp_path / "other.pem"
    ours.cert_pem.write_to_path(trusted)
    another.cert_pem.write_to_path(untrusted)
    front = Front(*search_server.settings.values())
    front.check = password_is("admin", "ünlikely")
    with front.running(tls=context):
        settings: dict[str, Any] = {"port": front.port, "host": "localhost", "use_ssl": True, "auth_type": "basic"}
        settings |= {"username": "admin", "password": "ünlikely"}
        storage = make_storage(search_server, **settings, ca_file=str(trusted))
        write(storage, entry("c", ("log", {"message": "secret"})))
        assert messages(storage) == ["secret"]

        wrong_ca = make_storage(search_server, **settings, ca_file=str(untrusted))
        with pytest.raises(BackendError, match="OPENSEARCH_CA_FILE"):
            wrong_ca.search(channel="c")
        wrong_word = make_storage(search_server, **{**settings, "password": "guess"}, ca_file=str(trusted))
        with pytest.raises(BackendError, match="it refused the credentials"):
            wrong_word.search(channel="c")
        assert "guess" not in repr(wrong_word.config)
        # Written with the wrong password: it waits, and nothing is lost.
        wrong_word.offer(entry("c", ("log", {"message": "later"})))
        until(lambda: wrong_word.stats().spooled == 1)
        assert "refused the credentials" in wrong_word.stats().error
        front.check = password_is("admin", "guess")
        assert wrong_word.flush(HANG)
        for one in (storage, wrong_ca, wrong_word):
            one.close()
    with pytest.raises(ConfigurationError, match="OPENSEARCH_USERNAME"):
        make_storage(search_server, auth_type="basic")


@pytest.mark.parametrize("service", ["es", "aoss"])
def test_sigv4(
    search_server: SearchServer, make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """The other side makes the signature again from what it received."""
    need_module("botocore")
    from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
    from botocore.credentials import Credentials  # type: ignore[import-untyped]

    for name, value in (("ACCESS_KEY_ID", "AKID"), ("SECRET_ACCESS_KEY", "very secret"), ("SESSION_TOKEN", "token")):
        monkeypatch.setenv(f"AWS_{name}", value)
    seen: list[str] = []

    def signed(method: str, path: str, headers: dict[str, str], body: bytes) -> bool:
        given = headers.get("authorization", "")
        names = given.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        url = f"http://{headers['host']}{path}"
        request = AWSRequest(method, url, data=body, headers={name: headers[name] for name in names})
        request.context["timestamp"] = headers.get("x-amz-date", "")
        auth = SigV4Auth(Credentials("AKID", "very secret", "token"), service, "eu-west-1")
        expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        seen.append(path)
        return bool(names) and given.endswith(f"Signature={expected}")

    front = Front(*search_server.settings.values())
    front.check, front.refuse_with = signed, 403
    with front.running():
        settings = {"port": front.port, "auth_type": "aws", "aws_region": "eu-west-1", "aws_service": service}
        storage = make_storage(search_server, **settings)
        write(storage, entry("c", ("log", {"message": "signed ✓"})))
        assert messages(storage) == ["signed ✓"]
        assert any("_bulk" in path for path in seen)
        storage.close()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guess")
        storage = make_storage(search_server, **settings)
        with pytest.raises(BackendError, match="does not allow this"):
            storage.search(channel="c")
        storage.close()
    with pytest.raises(ConfigurationError, match="OPENSEARCH_AWS_REGION"):
        make_storage(search_server, auth_type="aws")


def test_the_retention_policy_of_a_data_stream(search_server: SearchServer, make_storage: MakeStorage) -> None:
    """Index state management is a plugin that no test server has: what is asked of it is its documented request."""
    front = Front(*search_server.settings.values())
    asked: list[tuple[str, str, Any]] = []

    def note(method: str, path: str, headers: dict[str, str], body: bytes) -> bool:
        if "/_plugins/_ism/" in path or path.startswith("/_index_template"):
            asked.append((method, path, json.loads(body) if body else None))
            return False
        return True

    front.check, front.refuse_with = note, 201
    with front.running():
        storage = make_storage(search_server, port=front.port, data_stream=True, retention_days=30)
        name = storage.config.index_prefix
        assert storage.setup() == [f"index template {name}", "retention policy of 30 days"]
        (_, _, made), (method, path, policy) = asked
        assert made["data_stream"] == {}
        assert made["index_patterns"] == [name]
        assert (method, path) == ("PUT", f"/_plugins/_ism/policies/{name}")
        states = {state["name"]: state for state in policy["policy"]["states"]}
        assert states["hot"]["actions"] == [{"rollover": {"min_index_age": "1d", "min_primary_shard_size": "30gb"}}]
        assert states["hot"]["transitions"] == [{"state_name": "delete", "conditions": {"min_index_age": "30d"}}]
        assert states["delete"]["actions"] == [{"delete": {}}]
        assert policy["policy"]["ism_template"] == [{"index_patterns": [name], "priority": 200}]
        storage.close()
    if search_server.is_node:
        storage = make_storage(search_server, data_stream=True, retention_days=30)
        with pytest.raises(BackendError, match="storage prune"):
            storage.setup()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from asgi_stream import Streaming
    from asgi_stream.config import StorageConfig
    from asgi_stream.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "opensearchpy", None)
    with pytest.raises(MissingExtraError, match=r"asgi-stream\[opensearch\]"):
        Streaming(storage=StorageConfig())


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("opensearch").setLevel(logging.CRITICAL)
