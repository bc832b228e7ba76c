"""The job behind the deploy panel: real commands, whose output is streamed line by line.

It bundles the demo with what it stands on: copies the packages, checks and compiles every module, packs them into an
archive and tests that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asgi_stream.context import StreamContext

PACKAGES = ("asgi_stream", "starlette", "anyio", "fastapi", "pydantic", "redis", "httpx", "uvicorn", "docket", "rich")
SECONDS_A_LINE = 0.005
"""The output is read no faster, so that there is time to press the page's buttons."""
GUARD = Path(__file__).parents[1] / "guard.py"


def deploy(entity: dict[str, Any]) -> None:
    """Build the bundle. The queue ends the run."""
    ctx = StreamContext.from_dict(entity["ctx"])
    with tempfile.TemporaryDirectory(dir=entity["folder"]) as folder:
        source, archive = Path(folder, "bundle"), Path(folder, "bundle.zip")
        ctx.log(f"Deploying {ctx.project} to {ctx.env}")
        for name in PACKAGES:
            _copy(name, source)
        modules = sorted(source.rglob("*.py"))
        ctx.progress(10, "copied")
        ctx.log(f"Copied {len(PACKAGES)} packages with {len(modules)} modules")

        _work(ctx, [sys.executable, "-u", "-m", "tabnanny", "-v", "bundle"], folder, len(modules), 10, 40, "checking")
        compiling = [sys.executable, "-u", "-m", "compileall", "-f", "bundle"]
        _work(ctx, compiling, folder, len(modules), 40, 60, "compiling")
        compiling.insert(1, "-OO")
        _work(ctx, compiling, folder, len(modules), 60, 85, "optimising")

        ctx.progress(85, "packing")
        for _ in _run(ctx, [sys.executable, "-m", "zipfile", "-c", str(archive), str(source)], folder):
            pass
        ctx.progress(95, "testing")
        for _ in _run(ctx, [sys.executable, "-m", "zipfile", "-t", str(archive)], folder):
            pass
        size = archive.stat().st_size
        ctx.progress(100, "done")
        ctx.complete(success=True, modules=len(modules), megabytes=round(size / 1e6, 1))


def _work(ctx: StreamContext, command: list[str], folder: str, modules: int, begin: int, end: int, step: str) -> None:
    """Run a command that says a line for each module; show the progress in whole percents."""
    shown = begin
    done = 0
    for line in _run(ctx, command, folder):
        done += ".py" in line
        percent = min(begin + (end - begin) * done // modules, end)
        if percent != shown:
            shown = percent
            ctx.progress(percent, step)


def _copy(name: str, target: Path) -> None:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))


def _run(ctx: StreamContext, command: list[str], folder: str) -> Iterator[str]:
    """Run *command*, log each line of its output, and yield it."""
    ctx.log("$ " + " ".join(Path(word).name if os.sep in word else word for word in command), logger="shell")
    with _guarded(command, folder) as process:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.rstrip()
            ctx.log(text, logger="shell")
            ctx.raise_if_cancelled()
            time.sleep(SECONDS_A_LINE)
            yield text
        if process.wait() != 0:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")


@contextmanager
def _guarded(command: list[str], folder: str) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive this one, nor the block."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), "-", *command],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
        process.stderr.close()
