"""The recipes of `examples/jobs/`: each with its runner's real worker, started by its own command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.recipes.conftest import recipes
from tests.support import missing

FOLDER = Path(__file__).parents[2] / "examples" / "jobs"
HANG = 60.0

WORKERS = {
    "asgi_stream": ["asgi-stream", "worker", "asgi_stream_recipe:registry"],
    "celery": ["celery", "-A", "celery_recipe", "worker", "--concurrency", "2"],
    "rq": ["rq", "worker", "--url", "$REDIS_URL", "builds"],
    "dramatiq": ["dramatiq", "dramatiq_recipe", "--processes", "1", "--threads", "2"],
    "arq": ["arq", "arq_recipe.WorkerSettings"],
    "taskiq": ["taskiq", "worker", "taskiq_recipe:broker", "--workers", "1"],
    "saq": ["saq", "saq_recipe.settings"],
    "streaq": ["streaq", "run", "streaq_recipe:worker"],
}


def test_every_recipe_is_run() -> None:
    assert {path.name.removesuffix("_recipe.py") for path in FOLDER.glob("*.py")} == set(WORKERS)


@pytest.mark.parametrize("runner", WORKERS)
def test_a_recipe(runner: str, redis_url: str) -> None:
    program = Path(sys.executable).with_name(WORKERS[runner][0])
    if not program.exists():
        missing(runner, "pip install -e '.[recipes]'")
    if runner == "arq" and sys.version_info >= (3, 14):
        pytest.skip("arq 0.25 asks for an event loop before there is one: its worker does not start on Python 3.14")
    # A database of its own: runners leave keys with names of theirs. Found by name, as a shell in the folder would.
    url = f"{redis_url.rpartition('/')[0]}/{list(WORKERS).index(runner) + 1}"
    environ = {**os.environ, "REDIS_URL": url, "PYTHONPATH": str(FOLDER), "PYTHONWARNINGS": "default"}
    command = [str(program), *(word.replace("$REDIS_URL", url) for word in WORKERS[runner][1:])]
    assert (
        " ".join(WORKERS[runner]).replace("$REDIS_URL", '"$REDIS_URL"') in (FOLDER / f"{runner}_recipe.py").read_text()
    )
    with tempfile.TemporaryFile() as log:
        worker = psutil.Popen(command, cwd=FOLDER, env=environ, stdout=log, stderr=log)
        try:
            begun = time.monotonic()
            ordered = subprocess.run(
                [sys.executable, f"{runner}_recipe.py"],
                cwd=FOLDER,
                env=environ,
                capture_output=True,
                text=True,
                timeout=HANG,
                check=False,
            )
            pids = {worker.pid, *(child.pid for child in worker.children(recursive=True))}
        finally:
            for process in [*worker.children(recursive=True), worker]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            worker.wait(HANG)
        log.seek(0)
        said = log.read().decode(errors="replace")
    assert ordered.returncode == 0, ordered.stderr + said
    lines = ordered.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[0] == "queued", ordered.stdout + said
    assert names[-1] == "complete"
    assert names.count("started") == 1
    assert names.count("progress") >= 20
    (pid,) = re.findall(r'"pid (\d+)"', ordered.stdout)
    if runner != "rq":  # whose job ran in a process that has ended by now
        assert int(pid) in pids
    assert int(pid) != os.getpid()
    seconds = time.monotonic() - begun
    recipes[runner] = f"{pid:>8}{len(lines):>10}{seconds:>22.2f}"
