"""The package as a newcomer meets it: imports, names, the README."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import asgi_stream
from asgi_stream.config import ChannelConfig, StorageConfig, StreamLeaseConfig
from asgi_stream.job_queue import QueueConfig
from asgi_stream.runtime import shutdown_streaming
from tests.asgi_client import fetch, http_scope

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_the_core_loads_no_optional_package() -> None:
    code = (
        "import sys, asgi_stream.events, asgi_stream.sse, asgi_stream.leases.policy;"
        "print({'redis', 'starlette', 'fastapi', 'opensearchpy', 'anyio'} & set(sys.modules))"
    )
    assert python(code) == "set()"


def test_importing_the_package_loads_nothing_and_starts_nothing() -> None:
    """[O3]"""
    code = (
        "import sys, threading, signal; before = signal.getsignal(signal.SIGTERM); import asgi_stream.runtime;"
        "print('fastapi' in sys.modules, threading.active_count(), signal.getsignal(signal.SIGTERM) is before)"
    )
    assert python(code) == "False 1 True"


def test_every_public_name_is_there() -> None:
    for name in asgi_stream.__all__:
        assert getattr(asgi_stream, name) is not None
    assert set(asgi_stream.__all__) <= set(dir(asgi_stream))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = asgi_stream.nothing


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "try:\n    import asgi_stream.fastapi\nexcept ImportError as exc:\n    print(exc)"
    )
    assert "pip install 'asgi-stream[fastapi]'" in python(code)


@pytest.mark.anyio
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
async def test_every_block_of_code_runs(page: Path) -> None:
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):  # noqa: ASYNC240
            exec(compile(block, str(page), "exec"), {})
            await shutdown_streaming()
    finally:
        for handler in list(logging.getLogger("billing").handlers):
            logging.getLogger("billing").removeHandler(handler)
            handler.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:benchmarks|docs|examples|tests)/[\w./]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def shown(default: Any) -> str:
    """A default as the tables have it."""
    match default:
        case None:
            return "none"
        case "":
            return "empty"
        case bool():
            return f"`{int(default)}`"
        case str():
            return f"`{default}`"
    return str(int(default)) if default == int(default) else str(default)


@pytest.mark.parametrize("settings", [StreamLeaseConfig, ChannelConfig, StorageConfig, QueueConfig])
def test_every_setting_is_in_the_table(settings: Any) -> None:
    """docs/settings.md has each with its variable and its default."""
    prefix = {
        StreamLeaseConfig: "ASGI_STREAM_LEASE_",
        ChannelConfig: "ASGI_STREAM_CHANNEL_",
        StorageConfig: "OPENSEARCH_",
    }.get(settings)
    table = (ROOT / "docs" / "settings.md").read_text()
    for setting in fields(settings):
        if setting.name == "operations_registry":
            continue
        first = f"| `{prefix}{setting.name.upper()}` " if prefix else ""
        row = re.search(re.escape(f"{first}| `{setting.name}` | ") + r"(.*?) \|", table)
        assert row is not None, setting.name
        assert row[1].partition(" (")[0] == shown(setting.default), setting.name


@pytest.mark.anyio
async def test_the_readme_s_application_gives_the_output_that_is_printed_beside_it() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks[0].splitlines()) <= 24
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    exchange = await fetch(namespace["app"], http_scope("/chat"))
    printed = README.split("curl -N localhost:8000/chat\n")[1].split("```")[0]
    stamp = re.compile(r'"ts":\d+|id: \w+\.e')
    assert stamp.sub("", exchange.body.decode()).strip() == stamp.sub("", printed).strip()
