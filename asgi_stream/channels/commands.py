"""What can be done to a channel, as values: one set of commands for every broker, sent by sync code or async.

Each is one atomic step. A command that is sent twice because its reply was lost does no harm: an `Append` carries its
producer's id and sequence, the others are the same the second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from asgi_stream.channels.model import ChannelInfo, Position, Record

T = TypeVar("T")


class Command(Generic[T]):
    """One atomic step on a channel, whose result is a *T*."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Appended:
    """The offsets that the first and the last frame have got.

    ``repeated``: an earlier sending of the same command had done it. ``cancelling``: why the run is to be cancelled.
    """

    epoch: str
    first: int
    last: int
    repeated: bool = False
    cancelling: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a channel's log, and its state at that moment.

    ``reset`` is why it does not begin where it was asked to (``epoch``: the log was lost since; ``trimmed``: history
    does not reach back so far, and ``missed`` events are gone). ``more``: the log goes on after the last record.
    """

    info: ChannelInfo
    start: int  # the offset before the first record: where whoever takes this page stands before it
    records: tuple[Record, ...]
    more: bool
    reset: str | None = None
    missed: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """What a producer learns with each sign of life."""

    state: str
    attempt: int
    cancelling: str | None  # why the run is to be cancelled
    epoch: str


@dataclass(frozen=True, slots=True)
class Append(Command[Appended]):
    """Append *frames* (blocks without an id line, `encode_block`) and publish them; end the run with the last if asked.

    ``known`` is the highest position the caller knows of: a log whose top is below it was lost in part, and begins a
    new epoch [C2]. ``attempt``: refused once a later attempt has begun [C7]. ``only_if_lost``: do nothing unless the
    producer's signs of life have stopped. ``about``: the JSON of whose run it is, for the record of events.

    Raises `RunEndedError`, `AttemptSupersededError`.
    """

    channel: str
    frames: tuple[bytes, ...]
    ending: str | None = None
    state: str = "running"
    attempt: int = 0
    producer: str = ""
    sequence: int = 0
    known: Position | None = None
    only_if_lost: bool = False
    about: bytes = b""


@dataclass(frozen=True, slots=True)
class Read(Command[Page]):
    """Read what comes after *after*, or from the beginning of history: at most about *max_bytes*.

    Creates the channel's epoch, so that whoever waits for a first event learns if the log is lost meanwhile [C2].
    """

    channel: str
    after: Position | None = None
    known: Position | None = None
    max_events: int = 512
    max_bytes: int = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Touch(Command[Status]):
    """A producer's sign of life, good for *seconds*. Raises `AttemptSupersededError`."""

    channel: str
    seconds: float
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class BeginAttempt(Command[Status]):
    """Number a new attempt; verbs of older ones are refused from now on [C7]."""

    channel: str


@dataclass(frozen=True, slots=True)
class Cancel(Command[Status]):
    """Ask the run to stop: its producer learns it with its next verb or sign of life."""

    channel: str
    reason: str


@dataclass(frozen=True, slots=True)
class Revoke(Command[Status]):
    """Make every ticket for this channel that was issued before now worthless [S3]."""

    channel: str


@dataclass(frozen=True, slots=True)
class RevokedAt(Command[float]):
    """When tickets were revoked for the last time, in Unix seconds; 0 for never."""

    channel: str
