"""HTTP clients: what they send, and what is said where they are not installed."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from llmserve_env.errors import InputError
from llmserve_env.net.http import bearer, open_client, open_session, payload


def test_a_key_is_sent_unless_the_url_has_a_user_of_its_own():
    assert bearer("http://host:8000", "sesame") == {"Authorization": "Bearer sesame"}
    assert bearer("http://host:8000", None) == bearer("http://user:word@host:8000", "sesame") == {}
    with open_client("http://host:8000/v1", "sesame", timeout_s=3.0) as client:
        request = client.build_request("GET", "models")
    assert (str(request.url), request.headers["authorization"]) == (
        "http://host:8000/v1/models",
        "Bearer sesame",
    )
    assert client.timeout.read == 3.0


def test_large_bodies_are_files():
    assert payload(b"small") == b"small"
    large = payload(bytes(2 << 20))
    assert isinstance(large, io.BytesIO)
    assert len(large.getvalue()) == 2 << 20


def test_a_session_has_no_bounds_of_its_own():
    async def bounds():
        async with open_session(trust_env=True) as session:
            return session.connector.limit, session.timeout.total, session.trust_env

    assert asyncio.run(bounds()) == (0, None, True)


@pytest.mark.parametrize(
    ("package", "make"),
    [("aiohttp", open_session), ("httpx", lambda: open_client("http://host", timeout_s=1.0))],
)
def test_a_missing_package_is_named(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"the {package} package is missing: pip install -e '\.\[server\]'"):
        make()
