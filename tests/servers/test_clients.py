"""Widely used clients read our streams: heartbeats after events with ids break some when they are done wrong [W1]."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import httpx_sse
import openai
import pytest
import sseclient

from tests.servers.harness import Client, Server, serve


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
