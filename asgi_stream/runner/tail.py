"""Prints a channel's events to a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from asgi_stream.channels.client import SyncStreamChannel
from asgi_stream.channels.model import Record


def follow(channel: str, redis_url: str, *, after: str | None, as_json: bool, out: TextIO | None = None) -> int:
    """Print to the run's end; return the exit code that says how it ended."""
    out = sys.stdout if out is None else out
    ending: Record | None = None
    for record in SyncStreamChannel(channel, redis=redis_url).subscribe(after=after):
        if as_json:
            line = json.dumps({"id": record.id, "event": record.event, "data": record.data}, ensure_ascii=False)
        else:
            line = describe(record)
        print(line, file=out, flush=True)
        if record.position.ending:
            ending = record
    return exit_code(ending)


def describe(record: Record) -> str:
    """One event as a line for people."""
    data: Any = record.data
    if not isinstance(data, dict):
        return str(data)
    match record.event:
        case "log":
            level = data.get("level", "info")
            return f"{data.get('message')}" if level == "info" else f"{str(level).upper()}: {data.get('message')}"
        case "progress":
            step = f" {data['step']}" if data.get("step") else ""
            return f"[{data.get('percent', 0):3.0f}%]{step}"
        case "token":
            return str(data.get("text"))
    shown = {key: value for key, value in data.items() if key != "ts"}
    return f"== {record.event} {json.dumps(shown, ensure_ascii=False)}"


def exit_code(ending: Record | None) -> int:
    """0 for success; the exit code of a command that was run; 1 for everything else."""
    if ending is None or ending.event != "complete" or not isinstance(ending.data, dict):
        return 1
    if ending.data.get("success"):
        return 0
    code = ending.data.get("exit_code")
    return code if isinstance(code, int) and 0 < code < 256 else 1
