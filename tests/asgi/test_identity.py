"""Whose streams are counted [L7], as a pure function of the scope."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.authentication import BaseUser, SimpleUser

from asgi_stream.asgi import identity
from tests.asgi_client import http_scope


@pytest.mark.parametrize(
    ("client", "headers", "key", "proxied"),
    [
        ("192.0.2.7", {}, "addr:192.0.2.7", False),
        ("192.0.2.7", {"X-Forwarded-For": "198.51.100.1"}, "addr:192.0.2.7", False),
        ("2001:db8:1:2:3:4:5:6", {}, "addr:2001:db8:1:2::/64", False),
        ("::ffff:198.51.100.9", {}, "addr:198.51.100.9", False),
        ("10.0.0.5", {}, "addr:10.0.0.5", False),
        ("10.0.0.5", {"X-Forwarded-For": "198.51.100.1"}, "addr:10.0.0.5", True),
        ("127.0.0.1", {"Forwarded": "for=198.51.100.1"}, "addr:127.0.0.1", True),
    ],
)
def test_without_a_user_the_address_is_counted(client: str, headers: dict[str, str], key: str, proxied: bool) -> None:
    who = identity.identify(http_scope(client=(client, 1), headers=headers))
    assert (who.key, who.proxied, who.by_user) == (key, proxied, False)


class Account(BaseUser):
    """A user with every name; its identity wins."""

    is_authenticated = True
    display_name = "Ann"
    username = "ann"
    identity = "7"


def with_user(user: Any) -> Any:
    return http_scope(user=user)


def test_an_authenticated_user_is_counted_by_identity_then_username_then_display_name() -> None:
    class Named(BaseUser):
        is_authenticated = True
        display_name = "Bob"

        @property
        def identity(self) -> str:
            raise NotImplementedError

    assert identity.identify(with_user(Account())).key == "user:7"
    assert identity.identify(with_user(Named())).key == "user:Bob"
    assert identity.identify(with_user(SimpleUser("cy"))).key == "user:cy"


def test_a_user_that_is_not_authenticated_is_counted_by_address() -> None:
    class Guest(Account):
        is_authenticated = False

    assert identity.identify(with_user(Guest())).key == "addr:192.0.2.7"


def test_ones_own_identify_comes_first_and_may_decline() -> None:
    assert identity.identify(with_user(Account()), lambda scope: "own").key == "user:own"
    assert identity.identify(with_user(Account()), lambda scope: None).key == "addr:192.0.2.7"


@pytest.mark.parametrize("client", [None, ("testclient", 1), ("/run/app.sock", 0)])
def test_a_client_without_an_address_is_counted_all_the_same(client: Any) -> None:
    assert identity.identify(http_scope(client=client)).key.startswith("addr:")
