"""How a stream ended."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger("asgi_stream")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `on_finish` is told.

    ``status``: ``complete`` (the producer ended), ``failed`` (it raised, or ran into a time limit), ``cancelled``
    (the client left) or ``closed`` (the server ended the connection). ``reason`` says more: the name of the limit,
    ``disconnect``, ``shutdown``, ``lease_lost``. ``items`` counts what the producer yielded, ``error`` is what it
    raised, ``duration`` is in seconds.
    """

    status: Literal["complete", "failed", "cancelled", "closed"]
    reason: str | None
    items: int
    error: BaseException | None
    duration: float


OnFinish = Callable[[Outcome], Awaitable[None] | None]


async def report(on_finish: OnFinish, outcome: Outcome) -> None:
    """Call *on_finish*; what it raises is logged, since the response is over."""
    try:
        result = on_finish(outcome)
        if inspect.isawaitable(result):
            await result
    except Exception:
        logger.exception("on_finish raised; the stream had ended as %r", outcome.status)
