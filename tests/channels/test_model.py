"""Positions, cursors and ids of channels."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_stream.channels.model import (
    Position,
    base36,
    check_channel,
    created_at,
    is_owner,
    new_channel_id,
    new_epoch,
    offset_of,
    parse_cursor,
    position_of,
)
from asgi_stream.errors import ConfigurationError

EPOCHS = st.from_regex(re.compile(r"[0-9A-Za-z]{6}", re.ASCII), fullmatch=True)
POSITIONS = st.builds(Position, EPOCHS, st.integers(0, 36**8 - 1), st.booleans())


@given(POSITIONS)
def test_a_position_is_read_back(position: Position) -> None:
    assert Position.parse(str(position)) == position
    frame = f"data: id: x\nid: {position}\n\n".encode()
    assert position_of(frame) == position
    assert offset_of(frame) == position.offset


@given(st.lists(POSITIONS, min_size=1, max_size=8))
def test_eight_positions_fit_into_an_id(positions: list[Position]) -> None:
    """[W1]"""
    text = "~".join(map(str, positions))
    assert len(text) <= 8 * 17 + 7
    if len(text) <= 128:
        assert parse_cursor(text, len(positions)) == positions
    assert parse_cursor(text, len(positions) + 1) == [None] * (len(positions) + 1)


@given(st.text(max_size=200))
def test_what_clients_send_as_a_cursor_never_raises(text: str) -> None:
    for count in (1, 3):
        assert len(parse_cursor(text, count)) == count


@given(st.integers(0, 10**12))
def test_base_36(number: int) -> None:
    assert int(base36(number), 36) == number


def test_epochs_differ() -> None:
    epochs = {new_epoch() for _ in range(1000)}
    assert len(epochs) == 1000
    assert all(re.fullmatch("[0-9A-Za-z]{6}", epoch) for epoch in epochs)


@given(st.text(min_size=1), st.text(min_size=1))
def test_an_id_certifies_its_owner(workspace: str, other: str) -> None:
    """[S1]"""
    channel = new_channel_id(workspace, now=1_700_000_000.9)
    assert check_channel(channel) == channel
    assert is_owner(channel, workspace)
    assert is_owner(channel, other) == (workspace == other)
    assert created_at(channel) == 1_700_000_000


def test_a_changed_id_is_nobody_s() -> None:
    channel = new_channel_id("ann")
    for n in range(len(channel)):
        changed = channel[:n] + ("x" if channel[n] != "x" else "y") + channel[n + 1 :]
        assert not is_owner(changed, "ann")
    assert created_at("my-own-name") is None
    assert len({new_channel_id("ann") for _ in range(100)}) == 100


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "ä", "x" * 129, "a{b}", "a*", 7, None])
def test_names_that_no_channel_can_have(name: object) -> None:
    """[S2]"""
    with pytest.raises(ConfigurationError, match="channel"):
        check_channel(name)


@pytest.mark.parametrize("workspace", ["", 7, None])
def test_an_owner_has_a_name(workspace: object) -> None:
    with pytest.raises(ConfigurationError, match="workspace_id"):
        new_channel_id(workspace)
