"""Widely used clients read our streams: heartbeats after events with ids break some when they are done wrong [W1]."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import openai
import pytest
import sseclient

from tests.servers.harness import Client, Server, serve
from tests.support import missing, need_module, need_program


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("uvicorn httptools", "chat") as running:
        yield running


def test_the_stream_has_heartbeats_between_its_events(server: Server) -> None:
    client = Client(server.port, "/chat/completions")
    assert client.read_to_end().count(b": ping\n") >= 4


def test_openai_reads_through_heartbeats_and_ids(server: Server) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}", api_key="none", max_retries=0) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
        with client.chat.completions.create(model="m", messages=messages, stream=True) as chunks:
            words = [chunk.choices[0].delta.content for chunk in chunks]
    assert words == ["Hel", "lo"]


def test_httpx_sse_sees_the_events_and_nothing_else(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/"
    with httpx.Client() as client, httpx_sse.connect_sse(client, "GET", url) as source:
        events = list(source.iter_sse())
    assert [event.id for event in events] == ["0", "1", "1"]
    assert [json.loads(event.data)["choices"][0]["delta"]["content"] for event in events[:-1]] == ["Hel", "lo"]
    assert events[-1].data == "[DONE]"


def test_sseclient_sees_the_events_and_nothing_else(server: Server) -> None:
    with httpx.Client() as client, client.stream("GET", f"http://127.0.0.1:{server.port}/") as response:
        events = list(sseclient.SSEClient(response.iter_bytes()).events())
    assert len(events) == 3


NODE_PACKAGES = ["eventsource-parser@3", "eventsource@4"]

PARSER = """
import { EventSourceParserStream } from 'eventsource-parser/stream';
const response = await fetch(process.argv[2]);
const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
for await (const event of events) console.log(JSON.stringify(event));
"""

SOURCE = """
import { EventSource } from 'eventsource';
const source = new EventSource(process.argv[2]);
for (const name of ['message', 'sum', 'complete', 'error']) source.addEventListener(name, (event) => {
  console.log(JSON.stringify({ name, data: event.data, id: event.lastEventId, code: event.code }));
  if (name === 'error' && source.readyState === 2) process.exit(0);
});
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a module in a folder that has the packages; return the JSON of its lines."""
    need_program("node", "apt install nodejs")
    npm = need_program("npm", "apt install npm")
    folder: Path = tmp_path_factory.mktemp("node")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode:
        missing(" and ".join(NODE_PACKAGES), f"npm must reach its registry: {installed.stderr[-300:]}")

    def run(source: str, *arguments: str) -> list[Any]:
        (folder / "client.mjs").write_text(source)
        done = subprocess.run(
            ["node", "client.mjs", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_eventsource_parser_sees_the_events_and_nothing_else(server: Server, node: Any) -> None:
    events = node(PARSER, f"http://127.0.0.1:{server.port}/")
    assert [event.get("id") for event in events] == ["0", "1", None]
    assert events[-1]["data"] == "[DONE]"


def test_node_s_eventsource_comes_back_once_and_starts_nothing(node: Any) -> None:
    """[W4]"""
    with serve("uvicorn httptools", "event_source") as server:
        events = node(SOURCE, f"http://127.0.0.1:{server.port}/stream")
        assert [event["name"] for event in events] == ["message", "sum", "complete", "error", "error"]
        assert events[-1]["code"] == 204
        assert sum("began" in line for line in server.log) == 1


@pytest.mark.browser
def test_a_browser_s_eventsource_comes_back_once_and_starts_nothing() -> None:
    """[W4]"""
    need_module("playwright")
    from playwright.sync_api import sync_playwright

    chromium = need_program("chromium", "apt install chromium")
    with serve("uvicorn httptools", "event_source") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        seen = page.evaluate(
            """() => new Promise((resolve) => {
              const seen = [], source = new EventSource('/stream');
              for (const name of ['message', 'sum', 'complete', 'error']) source.addEventListener(name, (event) => {
                seen.push([name, event.data ?? null]);
                if (source.readyState === EventSource.CLOSED) resolve(seen);
              });
            })"""
        )
        browser.close()
        assert [name for name, _ in seen] == ["message", "sum", "complete", "error", "error"]
        assert seen[0] == ["message", "word"]
        assert sum("began" in line for line in server.log) == 1
