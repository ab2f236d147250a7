"""Upstreams that get no requests by command: a file names them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from llmserve_env.errors import InputError
from llmserve_env.files import read_text
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.net.urls import server_url, without_credentials

LOG = logging.getLogger(__name__)


class DrainFile:
    """A file with the URL of an upstream in each line; whoever may write it may drain.

    An upstream that is named gets no new requests, and ends those that it has. It gets some again when it is
    named no more. Empty lines and what follows a # are comments. Without the file nothing drains.

    Args:
        path: path of the file.
        upstreams: all that there are.

    Example:
        >>> drain = DrainFile(Path("drained.txt"), gateway.upstreams)
        >>> await forever(drain.look, 1.0, "the file of drained upstreams")
    """

    def __init__(self, path: Path, upstreams: Sequence[Upstream]) -> None:
        self._path = path
        self._upstreams = upstreams
        self._busy: set[Upstream] = set()  # of those that drain

    def look(self) -> None:
        """Do what the file says now.

        Raises:
            InputError: it cannot be read: all stays as it was; or a line names no upstream: the others count.
        """
        named, unknown = self._named()
        for upstream in self._upstreams:
            drains = without_credentials(upstream.url) in named
            if drains != upstream.health.draining:
                upstream.health.draining = drains
                if drains:
                    self._busy.add(upstream)
                    LOG.warning("%s drains: %d under way", upstream.shown_url, upstream.running)
                else:
                    self._busy.discard(upstream)
                    LOG.warning("%s gets requests again", upstream.shown_url)
            if upstream in self._busy and not upstream.running:
                self._busy.discard(upstream)
                LOG.warning("%s has drained", upstream.shown_url)
        if unknown:
            raise InputError(f"expected URLs of upstreams, found {unknown[0]}", file=str(self._path))

    def _named(self) -> tuple[set[str], list[str]]:
        """URLs in the file, without credentials; and lines that name no upstream."""
        lines = read_text(self._path).splitlines() if os.path.lexists(self._path) else []
        known = {without_credentials(each.url) for each in self._upstreams}
        named, unknown = set[str](), list[str]()
        for number, line in enumerate(lines, start=1):
            said = line.partition("#")[0].strip()
            if not said:
                continue
            try:
                url = without_credentials(server_url(said))
            except InputError:
                url = ""
            if url in known:
                named.add(url)
            else:
                unknown.append(f"another in line {number}")
        return named, unknown
