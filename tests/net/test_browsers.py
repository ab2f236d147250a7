"""Which requests a browser sends in the name of another site, and which hosts are a server's own."""

from __future__ import annotations

import pytest

from llmserve_env.net.browsers import is_cross_origin, is_host


def headers(**given: str) -> dict[bytes, str]:
    return {
        b"host": "localhost:8000",
        **{name.replace("_", "-").encode(): text for name, text in given.items()},
    }


@pytest.mark.parametrize(
    "sent",
    [
        headers(),  # a program
        headers(sec_fetch_site="same-origin", origin="http://localhost:8000"),
        headers(sec_fetch_site="same-origin", origin="null"),  # a page that tells nobody where it is
        headers(sec_fetch_site="none"),
        headers(origin="http://localhost:8000"),
        headers(origin="http://LOCALHOST:8000"),
        headers(origin="https://a.hf.space", host="a.hf.space"),
        headers(origin="https://a.hf.space", host="a.hf.space:443"),
        headers(origin="https://a.hf.space", host="10.0.0.1:7860", x_forwarded_host="a.hf.space, proxy"),
        headers(origin="http://[::1]:8000", host="[::1]:8000"),
    ],
)
def test_programs_and_pages_of_our_own_may_send(sent):
    assert not is_cross_origin(sent)


@pytest.mark.parametrize(
    "sent",
    [
        headers(sec_fetch_site="cross-site"),
        headers(sec_fetch_site="cross-site", origin="http://localhost:8000"),
        headers(sec_fetch_site="same-site", origin="http://localhost:3000"),
        headers(origin="http://localhost:3000"),
        headers(origin="http://localhost"),
        headers(origin="https://other.example"),
        headers(origin="null"),
        headers(origin="http://localhost:8000.other.example"),
        headers(origin="http://localhost:99999999"),
        headers(origin="https://b.hf.space", host="a.hf.space", sec_fetch_site="same-site"),
        headers(origin="https://other.example", x_forwarded_host="a.hf.space"),
        headers(origin="https://other.example", host=""),
    ],
)
def test_pages_of_others_may_not(sent):
    assert is_cross_origin(sent)
    assert is_cross_origin(sent, ["https://third.example"])


def test_origins_that_were_named_may():
    sent = headers(origin="https://other.example", sec_fetch_site="cross-site")
    assert not is_cross_origin(sent, ["https://other.example"])
    assert not is_cross_origin(sent, ["*"])
    assert is_cross_origin(sent, ["http://other.example"])


OURS = frozenset({"llm.example", "*.apps.example"})


@pytest.mark.parametrize(
    "host",
    [
        *("llm.example", "LLM.example:8000", "llm.example.", "a.apps.example", "a.b.apps.example:1"),
        *(
            "localhost",
            "localhost:8000",
            "a.localhost",
            "127.0.0.1:8000",
            "10.1.2.3",
            "[::1]:8000",
            "",
            "service:8000",
        ),
    ],
)
def test_names_of_ours_and_addresses_are_good(host):
    assert is_host(host, OURS)


@pytest.mark.parametrize(
    "host",
    [
        *("other.example", "a.llm.example", "apps.example", "llm.example.other.example", "not.local.host"),
        *("127.0.0.1.other.example", "llm.example:8000:1", "[::1", "xapps.example"),
    ],
)
def test_other_names_are_not(host):
    assert not is_host(host, OURS)
