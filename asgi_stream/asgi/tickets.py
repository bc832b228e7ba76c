"""Signed, short-lived rights to a channel [S3]: for pages that cannot send a login with their EventSource.

A ticket is ``<payload>.<signature>``: base64url of JSON, and its HMAC-SHA256 (RFC 2104). It is bound to one channel and
to verbs, and says until when it is good.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asgi_stream.errors import ConfigurationError

Verb = Literal["read", "cancel"]

MAX_SECONDS = 24 * 3600.0
"""How long a ticket may be good at most."""
MIN_SECRET_BYTES = 16
_LABEL = b"asgi_stream ticket 1\0"  # what else may be signed with the same secret is no ticket


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a ticket says."""

    channel: str
    verbs: frozenset[str]
    issued_at: float
    expires_at: float
    user: str | None


def check_secrets(secret: str | Sequence[str] | None) -> tuple[bytes, ...]:
    """Return the secrets as keys, the one to sign with first."""
    if secret is None:
        return ()
    given = [secret] if isinstance(secret, str) else list(secret)
    for one in given:
        if len(str(one).encode()) < MIN_SECRET_BYTES:
            raise ConfigurationError(
                f"secret (ASGI_STREAM_SECRET) must be text of at least {MIN_SECRET_BYTES} bytes, such as "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes"
            )
    return tuple(one.encode() for one in given)


def issue(
    secrets: Sequence[bytes],
    channel: str,
    *,
    verbs: Iterable[str] = ("read",),
    seconds: float = 300.0,
    user: Any = None,
) -> str:
    """Return a ticket for *channel*, good for *seconds*."""
    if not secrets:
        raise ConfigurationError("tickets need a secret: Streaming(secret=…), or ASGI_STREAM_SECRET in the environment")
    allowed = sorted(set(verbs))
    if not allowed or not set(allowed) <= {"read", "cancel"}:
        raise ConfigurationError(f"a ticket's verbs are read and cancel, not {allowed}")
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigurationError(f"a ticket is good for up to {MAX_SECONDS:.0f} seconds, not {seconds!r}")
    now = time.time()
    said = {"c": channel, "v": allowed, "i": round(now, 3), "e": round(now + seconds, 3)}
    if user is not None:
        said["u"] = str(user)
    payload = _encode(json.dumps(said, separators=(",", ":")).encode())
    return f"{payload}.{_sign(secrets[0], payload)}"


def check(secrets: Sequence[bytes], text: str) -> Ticket | None:
    """Return what the ticket says if one of the secrets signed it and its time is not over; None otherwise."""
    payload, _, signature = text.partition(".")
    if len(text) > 2048 or not text.isascii():
        return None
    if not any(hmac.compare_digest(signature, _sign(secret, payload)) for secret in secrets):
        return None
    try:
        said = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        ticket = Ticket(said["c"], frozenset(said["v"]), float(said["i"]), float(said["e"]), said.get("u"))
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None
    return ticket if time.time() < ticket.expires_at else None


def _sign(secret: bytes, payload: str) -> str:
    return _encode(hmac.digest(secret, _LABEL + payload.encode(), hashlib.sha256))


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
