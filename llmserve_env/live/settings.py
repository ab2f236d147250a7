"""Which servers serve, and what an episode may ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from llmserve_env.errors import InputError, missing_package
from llmserve_env.live.servers.upstreams import Upstream, parse_upstream
from llmserve_env.net.http import open_client
from llmserve_env.net.urls import without_credentials
from llmserve_env.schema import QuantizationTier

_ASK_S = 10.0


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible endpoint, of one server or several, and the bounds of what is sent to it.

    Attributes:
        base_url: URL with its /v1; `/completions` below it has to stream. Options may follow, as
            `upstreams.parse_upstream` takes them: `http://gpu-1:8000/v1,tier=FP16,control=FOLDER`.
        model: name of the model at the endpoint.
        api_key: key that is sent as a bearer token (default: none).
        more: further servers, likewise.
        max_requests_per_step: requests that arrive in a window, at most; further ones are left out of the
            episode.
        max_prompt_tokens: longest prompt; longer ones are shortened to it (tokens).
        max_completion_tokens: longest answer; longer ones are shortened to it (tokens).
        request_timeout_s: time after which an unfinished request has failed (s).
        token_ids: range [first, last) of the random token ids of prompts, which have just the length asked.
            Choose ordinary ones of the model's vocabulary (default: random English words, most of them one
            token).
        precision: precision of the weights behind servers that state no tier, which no answer tells: without
            it nothing is earned for quality.
    """

    base_url: str = field(repr=False)
    model: str
    api_key: str | None = field(default=None, repr=False)
    more: tuple[str, ...] = field(default=(), repr=False)
    max_requests_per_step: int = 100
    max_prompt_tokens: int = 1024
    max_completion_tokens: int = 256
    request_timeout_s: float = 120.0
    token_ids: tuple[int, int] | None = None
    precision: QuantizationTier | None = None

    def __post_init__(self) -> None:
        self.servers()
        if not self.model:
            raise InputError("expected the name of a model", field="model")
        for name in ("max_requests_per_step", "max_prompt_tokens", "max_completion_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"expected 1 or more, found {getattr(self, name)}", field=name)
        if not self.request_timeout_s > 0:
            raise InputError(
                f"expected seconds > 0, found {self.request_timeout_s}", field="request_timeout_s"
            )
        if self.token_ids is not None and not 0 <= self.token_ids[0] < self.token_ids[1]:
            raise InputError(f"expected 0 <= first < last, found {self.token_ids}", field="token_ids")

    def servers(self) -> list[tuple[Upstream, str]]:
        """Each server, and the URL below which it has `/completions`.

        Raises:
            InputError: one is no server's.
        """
        found = []
        for name, text in (("base_url", self.base_url), *(("more", each) for each in self.more)):
            try:
                upstream = parse_upstream(text)
            except InputError as error:
                raise InputError(error.reason, field=name) from error
            upstream.tier = upstream.tier or self.precision
            upstream.key = upstream.key or self.api_key
            url = text.split(",")[0].rstrip("/")
            found.append((upstream, url if urlsplit(url).path else f"{url}/v1"))
        return found

    @property
    def shown_url(self) -> str:
        """The URLs without user, password, query and fragment."""
        return ", ".join(without_credentials(url) for _, url in self.servers())


def open_endpoint(
    url: str | Sequence[str],
    model: str | None = None,
    *,
    control: str | None = None,
    precision: str | None = None,
    **bounds: Any,
) -> EndpointSettings:
    """Settings of servers as a user names them.

    Args:
        url: URL of a server, with options as `upstreams.parse_upstream` takes them; or several URLs.
        model: its name (default: the first that the first server lists).
        control: folder of the server's `LiveScheduler`, where there is one server.
        precision: precision of the weights behind servers that state none.
        bounds: further fields of `EndpointSettings`.

    Raises:
        InputError: one cannot be used; or the model is not given, and the server does not tell or cannot be
            reached.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise InputError("expected one or more", field="url")
    if control is not None:
        if len(urls) > 1:
            raise InputError("of several servers, expected ,control=FOLDER behind each URL", field="control")
        urls = [f"{urls[0]},control={control}"]
    if precision is not None and precision not in QuantizationTier.__members__:
        raise InputError(f"expected {', '.join(QuantizationTier.__members__)}", field="precision")
    settings = EndpointSettings(
        urls[0],
        model or "unknown",
        more=tuple(urls[1:]),
        precision=None if precision is None else QuantizationTier(precision),
        **bounds,
    )
    return settings if model else replace(settings, model=_first_model(settings))


def _first_model(settings: EndpointSettings) -> str:
    """The first model that the first server lists."""
    try:
        import httpx
    except ImportError as error:
        raise missing_package(error) from error
    upstream, root = settings.servers()[0]
    try:
        with open_client(root, upstream.key, timeout_s=_ASK_S) as client:
            answer = client.get("models")
        answer.raise_for_status()
        found = answer.json()["data"][0]["id"]
    except httpx.TransportError as error:
        what = str(error) or type(error).__name__
        reason = f"{upstream.shown_url} cannot be reached and does not tell its models: {what}"
        raise InputError(reason, field="url") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        reason = f"{upstream.shown_url} does not tell its models ({type(error).__name__}): give one"
        raise InputError(reason, field="model") from error
    return str(found)
