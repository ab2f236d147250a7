"""Which servers serve, and what an episode may ask of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llmserve_env.errors import InputError
from llmserve_env.live.upstreams import Upstream, parse_upstream
from llmserve_env.schema import QuantizationTier
from llmserve_env.urls import without_credentials


@dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible endpoint, of one server or several, and the bounds of what is sent to it.

    Attributes:
        base_url: with its /v1; `/completions` below it has to stream. Options may follow, as
            `upstreams.parse_upstream` takes them: `http://gpu-1:8000/v1,tier=FP16,control=FOLDER`.
        model: its name at the endpoint.
        api_key: sent as a bearer token (default: none).
        more: further servers, likewise.
        max_requests_per_step: requests that arrive in a window, at most; further ones are left out of the
            episode.
        max_prompt_tokens: longer prompts are shortened to it (tokens).
        max_completion_tokens: longer answers are shortened to it (tokens).
        request_timeout_s: a request that is not finished so long after it was sent has failed (s).
        token_ids: prompts are random token ids from [first, last), of exactly the length asked. Choose
            ordinary ones of the model's vocabulary (default: random English words, most of them one token).
        precision: of the weights behind servers that state no tier, which no answer tells: without it nothing
            is earned for quality.
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
