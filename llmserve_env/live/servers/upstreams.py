"""Servers behind a gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmserve_env.errors import InputError
from llmserve_env.live.servers.health import Health
from llmserve_env.net.urls import server_url, without_credentials
from llmserve_env.schema import QuantizationTier, bounds

MAX_DEPTH: int = bounds("speculation_depth")["le"]
MAX_ENGINES = 1024
_OPTIONS = ("tier", "speculation", "engines", "control", "key")
_TIERS = "|".join(tier.value for tier in QuantizationTier)
OPTIONS = f"URL[,tier={_TIERS}][,speculation=DEPTH][,engines=COUNT][,control=FOLDER][,key=APIKEY]"
"""How a server is written."""


@dataclass(eq=False)
class Upstream:
    """One vLLM server.

    Attributes:
        url: without /v1.
        tier: precision of its weights, None where nobody says.
        speculation: draft tokens a step that it was started with, None where nobody says.
        key: its own API key.
        engines: behind it; a batch cap is of each.
        control: folder of its `LiveScheduler`, None where it has none.
        in_engine: fields of an action that its engines apply themselves, so that nobody before them has to.
        running: sequences of the requests that it has now.
        turn: number of the request that it got last; who is as little loaded and has waited longer is next.
        health: its state.
    """

    url: str = field(repr=False)
    tier: QuantizationTier | None = None
    speculation: int | None = None
    key: str | None = field(default=None, repr=False)
    engines: int = 1
    control: Path | None = None
    in_engine: frozenset[str] = frozenset()
    running: int = 0
    turn: int = -1
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        self.url = server_url(self.url, "upstream")

    @property
    def shown_url(self) -> str:
        """The URL without user and password."""
        return without_credentials(self.url)


def parse_upstream(text: str) -> Upstream:
    """An upstream as a command takes it: its URL and OPTIONS.

    Raises:
        InputError: says what was expected.
    """
    url, *options = text.split(",")
    given: dict[str, str] = {}
    for option in options:
        name, sign, value = option.partition("=")
        if name not in _OPTIONS or not sign or not value or name in given:
            raise InputError(f"expected {OPTIONS}", field="upstream")
        given[name] = value
    tier, depth = given.get("tier"), given.get("speculation")
    engines = given.get("engines", "1")
    if tier is not None and tier not in QuantizationTier.__members__:
        raise InputError(f"expected tier={_TIERS}", field="upstream")
    if depth is not None and not (depth.isdecimal() and int(depth) <= MAX_DEPTH):
        raise InputError(f"expected speculation=0..{MAX_DEPTH}", field="upstream")
    if not (engines.isdecimal() and 1 <= int(engines) <= MAX_ENGINES):
        raise InputError(f"expected engines=1..{MAX_ENGINES}", field="upstream")
    return Upstream(
        url,
        None if tier is None else QuantizationTier(tier),
        None if depth is None else int(depth),
        given.get("key"),
        int(engines),
        Path(given["control"]) if "control" in given else None,
    )
