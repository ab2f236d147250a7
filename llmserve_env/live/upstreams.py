"""Servers behind a gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llmserve_env.errors import InputError
from llmserve_env.schema import QuantizationTier
from llmserve_env.urls import without_credentials

MAX_DEPTH = 8


@dataclass(eq=False)
class Upstream:
    """One vLLM server.

    Attributes:
        url: without /v1.
        tier: precision of its weights, None where nobody says.
        speculation: draft tokens a step that it was started with, None where nobody says.
        key: its own API key.
        running: requests that it has now.
        passed_over_until_s: it could not be reached; others come first until then (s of the gateway's clock).
    """

    url: str = field(repr=False)
    tier: QuantizationTier | None = None
    speculation: int | None = None
    key: str | None = field(default=None, repr=False)
    running: int = 0
    passed_over_until_s: float = float("-inf")

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"expected http://HOST:PORT, found {self.shown_url!r}", field="upstream")

    @property
    def shown_url(self) -> str:
        """The URL without user and password."""
        return without_credentials(self.url)


def parse_upstream(text: str) -> Upstream:
    """An upstream as the command takes it: URL[,tier=FP16|INT8|INT4][,speculation=DEPTH][,key=APIKEY].

    Raises:
        InputError: says what was expected.
    """
    url, *options = text.split(",")
    given: dict[str, str] = {}
    for option in options:
        name, sign, value = option.partition("=")
        if name not in ("tier", "speculation", "key") or not sign or name in given:
            raise InputError("expected URL[,tier=...][,speculation=...][,key=...]", field="upstream")
        given[name] = value
    tier, depth = given.get("tier"), given.get("speculation")
    if tier is not None and tier not in QuantizationTier.__members__:
        raise InputError(f"expected tier={'|'.join(QuantizationTier.__members__)}", field="upstream")
    if depth is not None and not (depth.isdecimal() and int(depth) <= MAX_DEPTH):
        raise InputError(f"expected speculation=0..{MAX_DEPTH}", field="upstream")
    return Upstream(
        url,
        None if tier is None else QuantizationTier(tier),
        None if depth is None else int(depth),
        given.get("key"),
    )
