"""Documents that wait in files while OpenSearch is away: bounded, in order, and kept over the end of the process.

Each process has a folder of its own, with a lock in it. What a process left behind is taken over by the next one that
begins to write in the same place.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import msgspec

from asgi_stream.errors import ConfigurationError
from asgi_stream.storage.document import YIELD_EVERY, Document

try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    LOCKS = True
except ImportError:  # Windows: what a process left behind stays where it is
    LOCKS = False

SEGMENT_BYTES = 4 * 1024 * 1024
REFUSED_BYTES = 16 * 1024 * 1024


class _Line(msgspec.Struct):
    i: str
    d: str
    s: msgspec.Raw


class _Segment:
    __slots__ = ("count", "path", "size")

    def __init__(self, path: Path, size: int = 0, count: int = 0) -> None:
        self.path = path
        self.size = size
        self.count = count  # lines that are not discarded yet


class Spool:
    """A queue of documents in files. For one thread. Every method may raise `OSError`: a disk may be full."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._limit = limit
        self._segments: list[_Segment] = []
        self._number = 0
        self._offset = 0  # in the first segment: what is before it is done
        self._out: IO[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
        # By another name until it is locked: a folder with a lock that nobody holds is taken over.
        self._lock: IO[bytes] = (self.folder / "new").open("wb")
        _lock(self._lock)
        (self.folder / "new").rename(self.folder / "lock")
        self.dropped = 0
        self.adopted = self._adopt()

    @property
    def size(self) -> int:
        """Bytes that wait, about."""
        return sum(segment.size for segment in self._segments) - self._offset

    @property
    def count(self) -> int:
        """Documents that wait."""
        return sum(segment.count for segment in self._segments)

    def append(self, documents: Iterable[Document]) -> None:
        """Put them at the end. Beyond the limit the oldest are dropped, and counted."""
        try:
            self._write(documents)
        except OSError:
            # Its last line may be cut: what comes after it begins another file.
            out, self._out = self._out, None
            if out is not None:
                with contextlib.suppress(OSError):
                    out.close()
            raise
        while self.size > self._limit and len(self._segments) > 1:
            self.dropped += self._segments[0].count
            self._drop_first()

    def _write(self, documents: Iterable[Document]) -> None:
        for number, document in enumerate(documents):
            if number % YIELD_EVERY == 0:
                time.sleep(0)
            line = msgspec.json.encode(_Line(document.index, document.id, msgspec.Raw(document.source))) + b"\n"
            if self._out is None or self._segments[-1].size + len(line) > SEGMENT_BYTES:
                self._next_segment()
            assert self._out is not None
            self._out.write(line)
            self._segments[-1].size += len(line)
            self._segments[-1].count += 1
        if self._out is not None:
            self._out.flush()

    def peek(self, limit: int, weight: int) -> tuple[list[Document], int]:
        """The oldest documents, at most so many and about so many bytes, and what `discard` takes for them.

        A damaged line is left out.
        """
        found: list[Document] = []
        while self._segments:
            with self._segments[0].path.open("rb") as file:
                file.seek(self._offset)
                position = self._offset
                for line in file:
                    if not line.endswith(b"\n") and self._out is not None and len(self._segments) == 1:
                        break
                    position += len(line)
                    try:
                        read = msgspec.json.decode(line, type=_Line)
                        found.append(Document(read.i, read.d, bytes(read.s)))
                    except msgspec.DecodeError:
                        self.dropped += 1
                    if len(found) >= limit or position - self._offset >= weight:
                        break
            if found:
                return found, position
            if len(self._segments) == 1 and self._out is not None:
                self._out.close()
                self._out = None
            self._drop_first()
        return [], 0

    def discard(self, count: int, position: int) -> None:
        """The first *count* documents, up to *position*, are done."""
        first = self._segments[0]
        self._offset = position
        first.count = max(first.count - count, 0)
        if position >= first.size:
            if len(self._segments) == 1 and self._out is not None:
                self._out.close()
                self._out = None
            self._drop_first()

    def close(self) -> None:
        """Let go; what waits is there for the next process."""
        if self._out is not None:
            self._out.close()
            self._out = None
        if not self._segments:
            (self.folder / "lock").unlink(missing_ok=True)
            try:
                self.folder.rmdir()
            except OSError:
                pass
        self._lock.close()

    def _next_segment(self) -> None:
        if self._out is not None:
            self._out.close()
        path = self.folder / f"{self._number:012}.jsonl"
        self._out = path.open("ab")
        self._number += 1
        self._segments.append(_Segment(path))

    def _drop_first(self) -> None:
        first = self._segments.pop(0)
        self._offset = 0
        first.path.unlink(missing_ok=True)

    def _adopt(self) -> int:
        """Take over what processes left behind that are no more; return how many documents."""
        if not LOCKS:
            return 0
        for folder in sorted(self.root.iterdir()):
            if folder == self.folder or not (folder / "lock").exists():
                continue
            with (folder / "lock").open("ab") as lock:
                if not _lock(lock):
                    continue
                for path in sorted(folder.glob("*.jsonl")):
                    moved = self.folder / f"{self._number:012}.jsonl"
                    self._number += 1
                    path.rename(moved)
                    count = moved.read_bytes().count(b"\n")
                    self._segments.append(_Segment(moved, moved.stat().st_size, count))
                (folder / "lock").unlink(missing_ok=True)
                try:
                    folder.rmdir()
                except OSError:
                    pass
        return self.count


def refuse(root: Path, documents: Iterable[tuple[Document, str]]) -> Path:
    """Keep what OpenSearch will never take, with the reason, in ``refused.jsonl``; the file before it is kept, too."""
    path = root / "refused.jsonl"
    if path.exists() and path.stat().st_size > REFUSED_BYTES:
        path.replace(root / "refused.1.jsonl")
    with path.open("ab") as file:
        for document, why in documents:
            made = {"index": document.index, "id": document.id, "why": why, "event": msgspec.Raw(document.source)}
            file.write(msgspec.json.encode(made) + b"\n")
    return path


def spool_root(spool_dir: str) -> Path:
    """The folder of all spools. By default it is a private one among the temporary files."""
    if spool_dir:
        root = Path(spool_dir)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigurationError(f"spool_dir={spool_dir!r} cannot be made: {exc}") from exc
        return root
    user = os.getuid() if hasattr(os, "getuid") else 0
    root = Path(tempfile.gettempdir(), f"asgi_stream-spool-{user}")
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if hasattr(os, "getuid") and (found.st_uid != user or root.is_symlink() or found.st_mode & 0o077):
        raise ConfigurationError(f"{root} is not this user's own; name another folder: OPENSEARCH_SPOOL_DIR")
    return root


def _lock(file: IO[Any]) -> bool:
    if not LOCKS:
        return True
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True
