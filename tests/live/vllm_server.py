"""A real HTTP server with the recorded answers of a vLLM server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from .endpoint_server import Reply

SCRAPES = Path(__file__).parent / "scrapes"


def metrics(name: str) -> str:
    """Recorded text of /metrics."""
    return (SCRAPES / f"vllm-{name}.txt").read_text()


def recorded() -> dict[str, Reply]:
    """Answers of vLLM 0.32 by path."""
    answers = json.loads((SCRAPES / "vllm-0.32-answers.json").read_text())
    kept = {}
    for path, answer in answers.items():
        kind = {"content-type": answer["headers"]["content-type"]} if answer["body"] else {}
        kept[path] = Reply(answer["body"], answer["status"], kind)
    return kept | {"/metrics": Reply(metrics("0.32-idle"))}


@dataclass
class RecordedServer:
    """Answers each path with what is in `answers`, others with 404; a reply without a body never comes.

    Attributes:
        answers: by path; may be changed while it serves.
        asked: method, path, `Authorization` and body of the requests.
    """

    answers: dict[str, Reply] = field(default_factory=recorded)
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)

    async def __call__(self, scope, receive, send):
        content, more = b"", True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        self.asked.append((scope["method"], scope["path"], key, content.decode()))
        reply = self.answers.get(scope["path"], Reply('{"detail":"Not Found"}', 404))
        if reply.body is None:
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": str(reply.body).encode()})
