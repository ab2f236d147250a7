"""Workload URIs: SCHEME://[PATH][?NAME=VALUE&...]."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from llmserve_env.errors import InputError


@dataclass(frozen=True)
class WorkloadURI:
    """A workload's address, taken apart.

    Attributes:
        scheme: the generator, or "trace".
        path: path of the file that it reads, if any.
        query: parameters by name, in the order given.
    """

    scheme: str
    path: str
    query: dict[str, str]

    def __str__(self) -> str:
        pairs = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in self.query.items())
        return f"{self.scheme}://{_quoted(self.path)}" + (f"?{pairs}" if pairs else "")


def parse_uri(text: str) -> WorkloadURI:
    """Take a URI apart; text without "://" is the path of a trace.

    Raises:
        InputError: a parameter has no value or comes twice.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return WorkloadURI("trace", text, {})
    path, _, query = rest.partition("?")
    pairs: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, equals, value = (_unquoted(piece) for piece in part.partition("="))
        if not name or not equals or not value:
            raise InputError(f"expected NAME=VALUE, found {part!r} in {text!r}", field=name or None)
        if name in pairs:
            raise InputError(f"is given twice in {text!r}", field=name)
        pairs[name] = value
    return WorkloadURI(scheme, _unquoted(path), pairs)


def _quoted(text: str) -> str:
    return quote(text, safe="/:,. ", errors="surrogateescape")


def _unquoted(text: str) -> str:
    """As `_quoted` had it, with bytes of file names that are no UTF-8."""
    return unquote(text, errors="surrogateescape")
