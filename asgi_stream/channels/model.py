"""What a channel is made of: positions, records, and ids that say whose they are. Pure: no I/O, no clock of its own.

A channel is a log. Every event in it has a `Position`: the log's *epoch*, a random word that is made anew when the log
was lost, and its *offset*, a whole number that counts from 1 without gaps [C2]. On the wire a position is
``<epoch>.<offset in base 36>``; several, for several channels on one stream, are joined by ``~``; the position of an
ending has the suffix ``.e``.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import re
import time
from dataclasses import dataclass
from typing import Any

from asgi_stream.errors import ConfigurationError
from asgi_stream.events import ENDINGS
from asgi_stream.sse.decode import decode

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_POSITION = re.compile(r"([0-9A-Za-z]{6})\.([0-9a-z]{1,8})(\.e)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_.~-]{1,128}", re.ASCII)
_ID = re.compile(r"c1([0-9a-z]{9})([0-9A-Za-z]{22})([0-9A-Za-z]{22})", re.ASCII)

_ENDING_MARK = b".e\n\n"


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a channel's log: after the event with this offset. Offset 0 is before the first."""

    epoch: str
    offset: int
    ending: bool = False  # the event there ended the run

    def __str__(self) -> str:
        return f"{self.epoch}.{base36(self.offset)}{'.e' if self.ending else ''}"

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """Return the position that *text* is, or None: ids come from clients, and may be anything."""
        found = _POSITION.fullmatch(text)
        return cls(found[1], int(found[2], 36), found[3] is not None) if found else None


def parse_cursor(text: str | None, channels: int) -> list[Position | None]:
    """Return a position for each of so many channels from a composite id; None where there is none.

    A cursor only says where to go on. It never selects a channel [S2], and one that makes no sense is no cursor.
    """
    nothing: list[Position | None] = [None] * channels
    if not text or len(text) > 128:
        return nothing
    parts = text.split("~")
    if len(parts) != channels:
        return nothing
    return [Position.parse(part) for part in parts]


@dataclass(frozen=True, slots=True)
class Record:
    """One event of a channel's log. ``frame`` is its block on the wire, id and blank line included."""

    position: Position
    frame: bytes

    @property
    def id(self) -> str:
        """The event's id on the wire: its position."""
        return str(self.position)

    @property
    def event(self) -> str:
        """The event's name, ``message`` if it has none."""
        return next(iter(decode((self.frame,)))).event

    @property
    def text(self) -> str:
        """The event's data as it is on the wire."""
        return next(iter(decode((self.frame,)))).data

    @property
    def data(self) -> Any:
        """The event's data: a JSON value if it is one, else its text."""
        text = self.text
        try:
            return json.loads(text)
        except ValueError:
            return text


@dataclass(frozen=True, slots=True)
class ChannelInfo:
    """The state of a channel's log.

    ``state`` is ``waiting`` (nothing was published yet), ``queued``, ``running``, or the name of the ending;
    ``top`` the last offset and ``first`` the oldest that is still kept; ``bytes`` what the kept events weigh.
    ``attempt`` counts from 1 where a queue numbers attempts, else 0. ``idle`` is how many seconds ago the last event or
    sign of life was. ``cancelling``: somebody asked for the run to be cancelled. ``lost``: its producer promised signs
    of life and they stopped coming.
    """

    epoch: str
    top: int
    first: int
    bytes: int
    state: str
    attempt: int
    idle: float
    cancelling: bool
    lost: bool

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.state in ENDINGS


def position_of(frame: bytes) -> Position:
    """Return the position of a frame that a broker made, from its last line."""
    begin = frame.rindex(b"id: ") + 4
    position = Position.parse(frame[begin:-2].decode("ascii"))
    if position is None:
        raise ValueError(f"not a channel's frame: {frame[-40:]!r}")
    return position


def offset_of(frame: bytes) -> int:
    """The offset alone, for the hot path: the epoch is 6 characters long."""
    begin = frame.rindex(b"id: ") + 11
    return int(frame[begin : -4 if is_ending(frame) else -2], 36)


def is_ending(frame: bytes) -> bool:
    """Whether the frame of a broker ends its run."""
    # The 14th event ends like an ending, since 14 is "e": there is no offset before its mark.
    return frame.endswith(_ENDING_MARK) and frame.rindex(b"id: ") + 11 < len(frame) - 4


def epoch_of(frame: bytes) -> bytes:
    """The epoch alone, for the hot path."""
    begin = frame.rindex(b"id: ") + 4
    return frame[begin : begin + 6]


def base36(number: int) -> str:
    """Write *number* with the digits 0-9a-z."""
    if number < 36:
        return _DIGITS[number]
    digits = []
    while number:
        number, digit = divmod(number, 36)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def base62(number: int, length: int) -> str:
    """Write *number* with so many of the digits 0-9A-Za-z."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def new_epoch() -> str:
    """A word of 6 digits of base 62 that this process has not made before, and that others do not make by chance."""
    # Counted up from a random beginning: it is made for every command, and needed by the first of a log only.
    if _epochs.pid != os.getpid():
        _epochs.__init__()  # type: ignore[misc]
    return base62(next(_epochs.numbers), 6)


class _Epochs:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.numbers = itertools.count(int.from_bytes(os.urandom(8)))


_epochs = _Epochs()


# Ids of channels


def new_channel_id(workspace_id: Any, *, now: float | None = None) -> str:
    """Make a channel id that certifies its owner.

    It holds the time, 128 random bits, and a 128-bit hash of *workspace_id* keyed by both: who knows a workspace can
    check whether a channel is its own without asking anybody, and a forged id names another, empty channel. Who has
    an id can test guesses of its workspace.
    """
    if not isinstance(workspace_id, str) or workspace_id == "":
        raise ConfigurationError(f"workspace_id must be text that names the owner, not {workspace_id!r}")
    seconds = int(time.time() if now is None else now)
    stamp = base36(seconds).rjust(9, "0")
    salt = base62(int.from_bytes(os.urandom(16)), 22)
    return f"c1{stamp}{salt}{_certificate(stamp, salt, workspace_id)}"


def is_owner(channel_id: str, workspace_id: str) -> bool:
    """Whether *channel_id* was made for *workspace_id*."""
    found = _ID.fullmatch(channel_id)
    return found is not None and hmac.compare_digest(found[3], _certificate(found[1], found[2], workspace_id))


def created_at(channel_id: str) -> float | None:
    """When *channel_id* was made, in Unix seconds; None for a name of your own."""
    found = _ID.fullmatch(channel_id)
    return None if found is None else float(int(found[1], 36))


def check_channel(channel_id: Any) -> str:
    """Return *channel_id* if a channel may have it: 1 to 128 of ``A-Z a-z 0-9 _ . ~ -`` [S2]."""
    if not isinstance(channel_id, str) or not _NAME.fullmatch(channel_id):
        raise ConfigurationError(
            f"a channel's name is 1 to 128 characters of A-Z a-z 0-9 _ . ~ - (a StreamContext makes one); "
            f"got {channel_id!r:.80}"
        )
    return channel_id


def _certificate(stamp: str, salt: str, workspace_id: str) -> str:
    keyed = hashlib.blake2b(workspace_id.encode("utf-8", "surrogatepass"), digest_size=16, key=(stamp + salt).encode())
    return base62(int.from_bytes(keyed.digest()), 22)
