"""The demo as a newcomer meets it: the real command, real processes, a real browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.support import need_module, need_program

HANG = 30.0


class Demo:
    """A running ``python -m asgi_stream demo``."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "asgi_stream", "demo", "--port", "0", "--no-browser", *options]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        self.url = found.group()
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.upstream = self.named("asgi_stream.demo.upstream")[0]

    def named(self, module: str) -> list[psutil.Process]:
        return [child for child in self.children if module in child.cmdline()]

    def gone(self) -> None:
        """Wait until every process is."""
        _, alive = psutil.wait_procs(self.children, HANG)
        assert alive == []


@contextmanager
def running(*options: str) -> Iterator[Demo]:
    demo = Demo(*options)
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait(HANG)
        if demo.process.stdout is not None:
            demo.process.stdout.close()
        demo.gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_demo_and_all_its_processes_with_streams_open(number: signal.Signals) -> None:
    """[O1]"""
    with running() as demo, httpx.Client(base_url=demo.url, timeout=HANG) as client:
        client.get("/")
        with client.stream("GET", "/hold") as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            begun = time.monotonic()
            demo.process.send_signal(number)
            assert any(line == "event: close" for line in lines)
        demo.process.wait(HANG)
        assert time.monotonic() - begun < 3.0
        demo.gone()


def test_all_processes_die_with_a_demo_that_was_killed() -> None:
    with running() as demo:
        assert len(demo.named("asgi_stream.demo.worker")) == 2
        assert len(demo.named("asgi_stream.demo.web")) == 1
        demo.process.kill()
        demo.gone()


def test_the_chat_streams_tokens_and_the_upstream_s_failure_is_a_status() -> None:
    with running("--speed", "500") as demo, httpx.Client(base_url=demo.url, timeout=HANG) as client:
        client.get("/")
        text = client.post("/chat", json={"prompt": "What is a lease?", "speed": 1000}).text
        assert text.count("data: ") > 30
        assert "event: complete" in text
        assert client.get("/stats").json() == {"open": 0, "limit": 5, "upstream_open": 0}
        demo.upstream.kill()  # it is started again half a second later
        while demo.upstream.is_running() and demo.upstream.status() != psutil.STATUS_ZOMBIE:
            pass
        assert client.post("/chat", json={"prompt": "x"}).status_code == 500


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "asgi_stream", "demo", "--port", port, "--no-browser"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert "--port 0" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("module", "extra"), [("typer", "cli"), ("uvicorn", "demo"), ("fastapi", "demo")])
def test_a_missing_extra_is_one_line_that_names_it(module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['asgi-stream', 'demo', '--no-browser'];"
        "from asgi_stream.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == f"{module} is needed here: pip install 'asgi-stream[{extra}]'"


@pytest.mark.parametrize(("arguments", "expected"), [(["--version"], "asgi-stream 0."), (["--help"], "demo")])
def test_the_command_line_explains_itself(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "asgi_stream", *arguments]
    assert expected in subprocess.check_output(command, text=True, timeout=HANG)


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = need_module("playwright.sync_api")
    chromium = need_program("chromium", "apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with (
        running("--speed", "20") as demo,
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=chromium, args=flags) as browser,
    ):
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(HANG * 1000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(demo.url) else problems.append(request.url))
        page.goto(demo.url)
        yield page
        if shots := os.environ.get("ASGI_STREAM_SHOTS"):
            for scheme in ("light", "dark"):
                for width in (1280, 390):
                    page.emulate_media(color_scheme=scheme)
                    page.set_viewport_size({"width": width, "height": 900})
                    page.screenshot(path=f"{shots}/{scheme}-{width}.png", full_page=True)
        context.close()
        assert problems == []


@pytest.mark.browser
def test_the_page_streams_cuts_and_shows_the_limit(page: Any) -> None:
    def text(selector: str) -> str:
        return str(page.text_content(selector))

    def wait_for(condition: str) -> None:
        page.wait_for_function(condition)

    # Tokens appear, and the numbers move.
    page.click("#send")
    wait_for("Number(document.querySelector('#tokens').textContent) > 5")
    assert text("#ttft").endswith("ms")
    wait_for("document.querySelector('#upstream').textContent === '1'")
    assert float(text("#rate")) > 1

    # Cut the connection: the request to the model is closed.
    page.click("#cut")
    wait_for("document.querySelector('#upstream').textContent === '0'")
    assert "Connection cut" in text("#state")

    # Stop does the same, and says so.
    page.click("#send")
    wait_for("document.querySelector('#upstream').textContent === '1'")
    page.click("#stop")
    wait_for("document.querySelector('#upstream').textContent === '0'")
    assert "Stopped" in text("#state")

    # Five streams are open, the sixth is refused; heartbeats tick meanwhile.
    for count in range(1, 6):
        page.click("#more")
        wait_for(f"document.querySelectorAll('#chips li').length === {count}")
    page.click("#more")
    page.wait_for_selector("#refusal:visible")
    assert "429 Too many concurrent streams" in text("#refusal")
    assert "Retry-After" in text("#refusal")
    wait_for("Number(document.querySelector('#beats').textContent) > 10")
    wait_for("document.querySelector('#open').textContent === '5 of 5'")

    # One closed is one free; all closed are all free.
    page.click("#chips li:first-child button")
    wait_for("document.querySelector('#open').textContent === '4 of 5'")
    page.fill("#speed", "200")
    page.fill("#prompt", "Tell me about the wire format")
    page.click("#send")
    wait_for("document.querySelector('#state').textContent === 'Complete.'")
    assert "Server-sent events are lines of text." in text("#answer")
    assert "event: complete" in text("#log")
    page.click("#close-all")
    wait_for("document.querySelector('#open').textContent === '0 of 5'")


@pytest.mark.browser
def test_a_deployment_survives_what_its_buttons_do(page: Any) -> None:
    """[C1] [C2] [C7]"""

    def text(on: Any, selector: str) -> str:
        return str(on.text_content(selector))

    def lines(on: Any) -> list[str]:
        return text(on, "#lines").splitlines()

    def wait_for(condition: str, on: Any = page) -> None:
        try:
            on.wait_for_function(condition)
        except Exception as exc:
            shown = text(on, "#deploy-state"), text(on, "#attempt"), lines(on)[-8:]
            raise AssertionError(f"{condition}: {shown}") from exc

    more = "Number(document.querySelector('#count').textContent) > "

    # Lines come, and the bar moves.
    page.click("#deploy")
    wait_for(f"{more} 50")
    assert "on worker" in lines(page)[0]
    assert float(page.get_attribute("#bar", "value")) >= 10

    # A reloaded page has them all again, from the first.
    before = lines(page)
    page.click("#reload")
    wait_for(f"{more} {len(before)}")
    assert lines(page)[: len(before)] == before

    # A second viewer, on the other web process, sees the same.
    with page.context.expect_page() as opened:
        page.click("#second")
    second = opened.value
    second.set_default_timeout(HANG * 1000)
    wait_for(f"{more} {len(before)}", second)
    assert lines(second)[: len(before)] == before
    assert {text(page, "#web").split()[0], text(second, "#web").split()[0]} == {"first", "second"}

    # The worker is killed: both are told, and another one does the job.
    first_worker = text(page, "#worker")
    page.click("#kill")
    for on in (page, second):
        wait_for("document.querySelector('#attempt').textContent === '2'", on)
        assert "attempt 1 was lost: its worker died" in lines(on)
    assert text(page, "#worker") != first_worker

    # Redis is restarted: nobody misses anything.
    count = int(text(page, "#count"))
    connections = text(page, "#connections")
    page.click("#restart")
    wait_for(f"{more} {count + 20}")
    for on in (page, second):
        wait_for("document.querySelector('#deploy-state').textContent.startsWith('Complete')", on)
    assert text(page, "#connections") == connections  # the stream was never interrupted
    told = [line for line in lines(page) if not line.startswith("—")]
    assert told == lines(second)
    assert not any("events are gone" in line for line in told)
    begun = next(n for n, line in enumerate(told) if line.startswith("attempt 2"))
    for line in (f"Compiling 'bundle/{module}/__init__.py'..." for module in ("anyio", "starlette", "asgi_stream")):
        assert told[begun:].count(line) == 2  # for each of two kinds of bytecode

    # The worker that was killed is back, and a job can be cancelled.
    page.click("#deploy")
    wait_for(f"{more} 20")
    page.click("#cancel")
    wait_for("document.querySelector('#deploy-state').textContent.startsWith('Cancelled')")
    second.close()
