"""The package as a newcomer meets it: imports, names, the README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import asgi_stream
from tests.asgi_client import fetch, http_scope

README = (Path(__file__).parent.parent / "README.md").read_text()


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
async def test_the_readme_s_application_gives_the_output_that_is_printed_beside_it() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks[0].splitlines()) <= 24
    for block in blocks:
        namespace: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), namespace)
    namespace = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    exchange = await fetch(namespace["app"], http_scope("/chat"))
    printed = README.split("curl -N localhost:8000/chat\n")[1].split("```")[0]
    stamp = re.compile(r'"ts":\d+|id: \w+\.e')
    assert stamp.sub("", exchange.body.decode()).strip() == stamp.sub("", printed).strip()
