"""Commands as calls of scripts, and replies as results: every key, argument and reply of Redis is known here. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, TypeVar

from asgi_stream.channels.commands import (
    Append,
    Appended,
    BeginAttempt,
    Cancel,
    Command,
    Page,
    Read,
    Revoke,
    RevokedAt,
    Status,
    Touch,
)
from asgi_stream.channels.model import ChannelInfo, Position, Record, new_epoch, position_of
from asgi_stream.config import ChannelConfig
from asgi_stream.errors import AttemptSupersededError, RunEndedError
from asgi_stream.redis.scripts import Call, Script, load

T = TypeVar("T")

SCRIPTS: dict[str, Script] = {
    name: load("asgi_stream.channels", "common", name) for name in ("append", "read", "producer")
}

ARCHIVE_ENTRIES = 1_000_000
"""Appends that wait for an archiver. Beyond that the oldest go."""
REVOKED_FOR = 24 * 3600 * 1000
"""Milliseconds for which it is remembered that tickets were revoked: no ticket is good for longer."""


def log_key(config: ChannelConfig, channel: str) -> str:
    """The key of a channel's log, which is also the name that its events are published under."""
    return f"{config.key_prefix}{{{channel}}}"


def announcements(config: ChannelConfig) -> str:
    """The name that what all processes are told is published under."""
    return f"{config.key_prefix}announcements"


def archive_key(config: ChannelConfig) -> str:
    """The stream of what is to be written into the record by `asgi-stream archiver`."""
    return f"{config.key_prefix}archive"


def logs_key(config: ChannelConfig) -> str:
    """The stream of log records that are to be written into the record."""
    return f"{config.key_prefix}logs"


def channel_of(config: ChannelConfig, key: str) -> str:
    """The channel whose log has that key."""
    return key.removeprefix(config.key_prefix)[1:-1]


def encode(command: Command[T], config: ChannelConfig, publish: str = "PUBLISH", *, archived: bool = False) -> Call[T]:
    """Return the call that does *command*. *publish* is SPUBLISH in a cluster; *archived*: an archiver reads along."""
    name, arguments, read = _encode(command, config, publish)
    channel: str = command.channel  # type: ignore[attr-defined]
    key = log_key(config, channel)
    keys = (key, key + ":meta", archive_key(config)) if archived and name == "append" else (key, key + ":meta")
    return Call(SCRIPTS[name], keys, arguments, read)


@singledispatch
def _encode(command: Any, config: ChannelConfig, publish: str) -> tuple[str, tuple[Any, ...], Callable[[Any], Any]]:
    raise TypeError(f"no such command: {command!r}")


@_encode.register
def _(command: Append, config: ChannelConfig, publish: str) -> Any:
    arguments = (
        new_epoch(),
        *_known(command.known),
        command.attempt,
        command.producer,
        command.sequence,
        command.ending or "",
        command.state,
        1 if command.only_if_lost else 0,
        config.max_events,
        config.max_bytes,
        _ttl(config),
        publish,
        ARCHIVE_ENTRIES,
        command.about,
        *command.frames,
    )

    def read(reply: Sequence[Any]) -> Appended:
        word = reply[0]
        if word == b"ok" or word == b"repeated":
            return Appended(reply[1].decode(), reply[2], reply[3], word == b"repeated", reply[4].decode() or None)
        if word == b"ended":
            raise RunEndedError(command.channel, reply[1].decode())
        if word == b"superseded":
            raise AttemptSupersededError(command.channel, command.attempt, reply[1])
        return Appended("", 0, 0)  # only_if_lost, and it is alive

    return "append", arguments, read


@_encode.register
def _(command: Read, config: ChannelConfig, publish: str) -> Any:
    after = command.after
    arguments = (
        new_epoch(),
        *_known(command.known),
        after.epoch if after else "",
        after.offset if after else 0,
        command.max_events,
        command.max_bytes,
        _ttl(config),
    )

    def read(reply: Sequence[Any]) -> Page:
        epoch, top, first, size, state, attempt, idle, cancelling, lost, start, reset, missed, frames = reply
        info = ChannelInfo(
            epoch.decode(), top, first, size, state.decode(), attempt, idle / 1000, cancelling == 1, lost == 1
        )
        records = tuple(Record(position_of(frame), frame) for frame in frames)
        why = reset.decode() or None
        return Page(info, start, records, start + len(records) < top, why, missed if missed >= 0 else None)

    return "read", arguments, read


@_encode.register
def _(command: Touch, config: ChannelConfig, publish: str) -> Any:
    arguments = ("touch", new_epoch(), _ttl(config), command.attempt, round(command.seconds * 1000))
    return "producer", arguments, lambda reply: _status(reply, command.channel, command.attempt)


@_encode.register
def _(command: BeginAttempt, config: ChannelConfig, publish: str) -> Any:
    arguments = ("attempt", new_epoch(), _ttl(config))
    return "producer", arguments, lambda reply: _status(reply, command.channel, 0)


@_encode.register
def _(command: Cancel, config: ChannelConfig, publish: str) -> Any:
    arguments = ("cancel", new_epoch(), _ttl(config), command.reason)
    return "producer", arguments, lambda reply: _status(reply, command.channel, 0)


@_encode.register
def _(command: Revoke, config: ChannelConfig, publish: str) -> Any:
    arguments = ("revoke", new_epoch(), max(_ttl(config), REVOKED_FOR))
    return "producer", arguments, lambda reply: _status(reply, command.channel, 0)


@_encode.register
def _(command: RevokedAt, config: ChannelConfig, publish: str) -> Any:
    return "producer", ("revoked", new_epoch(), _ttl(config)), lambda reply: int(reply[1]) / 1000


def _status(reply: Sequence[Any], channel: str, attempt: int) -> Status:
    if reply[0] == b"superseded":
        raise AttemptSupersededError(channel, attempt, reply[1])
    return Status(reply[1].decode(), reply[2], reply[3].decode() or None, reply[4].decode())


def _known(known: Position | None) -> tuple[str, int]:
    return (known.epoch, known.offset) if known else ("", 0)


def _ttl(config: ChannelConfig) -> int:
    return round(config.history_seconds * 1000)
