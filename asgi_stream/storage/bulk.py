"""Writing documents, and what became of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from asgi_stream.config import StorageConfig
from asgi_stream.errors import BackendError
from asgi_stream.events import json_bytes
from asgi_stream.storage.client import explain, make_client, status_of
from asgi_stream.storage.document import VERSION, YIELD_EVERY, Document, template

logger = logging.getLogger("asgi_stream")

CHUNK_BYTES = 5 * 1024 * 1024
CHUNK_DOCUMENTS = 1000


@dataclass(slots=True)
class Written:
    """What became of documents. ``later``: to be sent again; ``refused``: never to be taken, and why."""

    done: int = 0
    repeated: int = 0  # of them: it had them before
    later: list[Document] = field(default_factory=list)
    refused: list[tuple[Document, str]] = field(default_factory=list)
    reason: str = ""  # why some are to be sent again

    def add(self, other: Written) -> None:
        self.done += other.done
        self.repeated += other.repeated
        self.later += other.later
        self.refused += other.refused
        self.reason = other.reason or self.reason


class BulkWriter:
    """Writes with `_bulk`. For one thread."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self._client: Any = None
        self._prepared = False

    def write(self, documents: list[Document], *, again: bool = False) -> Written:
        """Write them; never raises for what OpenSearch does.

        ``again``: it may have some of them, since the answer to an earlier request was lost. A data stream must be
        asked then: an id is known in its newest index only.
        """
        result = Written()
        for chunk in chunks(documents):
            if result.reason:
                result.later += chunk  # it is away: not asked again for each chunk
                continue
            try:
                self._prepare()
                if again and self.config.data_stream:
                    known = self._known(chunk)
                    result.done += len(known)
                    result.repeated += len(known)
                    chunk = [document for document in chunk if document.id not in known]
                if chunk:
                    result.add(self._send(chunk))
            except Exception as exc:
                result.later += chunk
                result.reason = str(exc if isinstance(exc, BackendError) else explain(self.config, exc))
                self._prepared = False  # it may come back without what it knew
        return result

    def _client_now(self) -> Any:
        if self._client is None:
            self._client = make_client(self.config)
        return self._client

    def _prepare(self) -> None:
        """Install the index template, or a newer one, before the first event makes an index without it."""
        if self._prepared:
            return
        try:
            put_template(self._client_now(), self.config)
        except Exception as exc:
            if status_of(exc) != 403:
                raise explain(self.config, exc) from exc
            logger.warning("storage: no right to look after the index template; run `asgi-stream storage setup`")
        self._prepared = True

    def _known(self, chunk: list[Document]) -> set[str]:
        client, index = self._client_now(), self.config.index_prefix
        body = {"query": {"ids": {"values": [document.id for document in chunk]}}, "_source": False}
        try:
            client.indices.refresh(index=index, params={"ignore_unavailable": "true"})
            found = client.search(index=index, body=body, size=len(chunk), params={"ignore_unavailable": "true"})
        except Exception as exc:
            raise explain(self.config, exc) from exc
        return {hit["_id"] for hit in found["hits"]["hits"]}

    def _send(self, chunk: list[Document]) -> Written:
        lines: list[bytes] = []
        for number, document in enumerate(chunk):
            if number % YIELD_EVERY == 0:
                time.sleep(0)
            lines += (json_bytes({"create": {"_index": document.index, "_id": document.id}}), document.source)
        lines.append(b"")
        try:
            answer = self._client_now().bulk(body=b"\n".join(lines))
        except Exception as exc:
            status = status_of(exc)
            if status not in (400, 413):
                raise explain(self.config, exc) from exc
            if len(chunk) == 1:
                why = "the server takes no request of this size (413)" if status == 413 else str(exc)[:300]
                return Written(refused=[(chunk[0], why)])
            # One of them is to blame: find it.
            half = len(chunk) // 2
            result = self._send(chunk[:half])
            result.add(self._send(chunk[half:]))
            return result
        result = Written()
        for document, item in zip(chunk, answer["items"], strict=True):
            (outcome,) = item.values()
            status = outcome["status"]
            if status == 409:
                result.done += 1
                result.repeated += 1
            elif status < 300:
                result.done += 1
            elif status == 429 or status >= 500 or _is_block(outcome):
                result.later.append(document)
                result.reason = f"it answered {status} for single events: {_why(outcome)}"
            else:
                result.refused.append((document, f"{status}: {_why(outcome)}"))
        return result

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def put_template(client: Any, config: StorageConfig, *, always: bool = False) -> None:
    """Install the index template if it is not there, or older."""
    name = config.index_prefix
    if not always and client.indices.exists_index_template(name=name):
        found = client.indices.get_index_template(name=name)["index_templates"][0]["index_template"]
        if found.get("version", 0) >= VERSION and ("data_stream" in found) == config.data_stream:
            return
    client.indices.put_index_template(name=name, body=template(config))


def chunks(documents: Iterable[Document]) -> Iterable[list[Document]]:
    """Split them into requests of a good size."""
    chunk: list[Document] = []
    weight = 0
    for document in documents:
        if chunk and (weight + document.weight > CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS):
            yield chunk
            chunk, weight = [], 0
        chunk.append(document)
        weight += document.weight
    if chunk:
        yield chunk


def _is_block(outcome: dict[str, Any]) -> bool:
    """A full disk makes indices read-only: that passes."""
    return outcome["status"] == 403 and "cluster_block" in str(outcome.get("error"))


def _why(outcome: dict[str, Any]) -> str:
    error = outcome.get("error")
    if isinstance(error, dict):
        cause = error.get("caused_by")
        more = f" ({cause.get('reason')})" if isinstance(cause, dict) else ""
        return f"{error.get('type')}: {error.get('reason')}{more}"[:300]
    return str(error)[:300]
