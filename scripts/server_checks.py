"""Checks of a running server, all of them through its address."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from checkout_checks import read_manifest
from checks import Check, Problem, expect
from openenv.cli._validation import validate_running_environment
from openenv.validation.graders import Subject
from openenv.validation.graders.runtime import (
    ObservationSchemaGrader,
    RewardWellFormedGrader,
    StateContractGrader,
)
from openenv.validation.runtime.collector import collect_runtime_evidence
from openenv.validation.types import CheckStatus
from websockets.sync.client import connect

TIMEOUT_S = 120.0
"""Of a request (s): a Space may be waking up, a baseline is playing episodes."""
_TASK = "static_workload"
_HORIZON_S = 20.0


def server_checks(url: str, root: Path) -> list[Check]:
    """All of them.

    Args:
        url: of the server.
        root: of the checkout, whose manifest says what OpenEnv's graders send and expect.
    """
    url = url.rstrip("/")

    def client() -> httpx.Client:
        # No cookies are kept between the checks: each has a client of its own.
        return httpx.Client(base_url=url, timeout=TIMEOUT_S, follow_redirects=True)

    def with_client(check: Callable[[httpx.Client], str]) -> Callable[[], str]:
        def run() -> str:
            with client() as opened:
                return check(opened)

        return run

    plain = {
        "/health /metadata /schema /tasks": check_descriptions,
        "/web and /docs": check_pages,
        "/reset /step /state /log /grader": check_episode,
        "the same seed, the same episode": check_determinism,
        "errors 404 409 413 422": check_errors,
        "/mcp": lambda opened: check_mcp(opened, root),
        "/baseline": check_baseline,
    }
    checks: list[Check] = [(name, with_client(check)) for name, check in plain.items()]
    return [
        *checks,
        ("/ws", lambda: check_websocket(url)),
        ("openenv validate --url", lambda: check_validate_url(url)),
        ("OpenEnv's runtime graders", lambda: check_runtime_graders(url, root)),
    ]


def _json(response: httpx.Response, status: int = 200) -> Any:
    where = f"{response.request.method} {response.request.url.path}"
    if response.status_code != status:
        raise Problem(f"{where}: expected {status}, found {response.status_code}: {response.text[:200]}")
    try:
        return response.json()
    except ValueError:
        raise Problem(f"{where}: expected JSON, found {response.text[:100]!r}") from None


def check_descriptions(client: httpx.Client) -> str:
    """What the server says of itself."""
    expect(_json(client.get("/health"))["status"] == "healthy", "/health: not healthy")
    metadata = _json(client.get("/metadata"))
    for key in ("name", "description", "version"):
        expect(metadata.get(key), f"/metadata: {key} is missing")
    schema = _json(client.get("/schema"))
    for key in ("action", "observation", "state"):
        expect(schema.get(key, {}).get("properties"), f"/schema: {key} is missing")
    tasks = _json(client.get("/tasks"))
    ids = [task["id"] for task in tasks["tasks"]]
    expect(len(ids) >= 3 and tasks["default"] in ids, f"/tasks: found {ids}, default {tasks['default']}")
    return f"{metadata['name']} {metadata['version']}, {len(ids)} tasks"


def check_pages(client: httpx.Client) -> str:
    """The pages that people open."""
    for path, content in (("/web/", "gradio"), ("/docs", "swagger"), ("/", "gradio")):
        response = client.get(path)
        expect(response.status_code == 200, f"{path}: {response.status_code}")
        expect(content in response.text.lower(), f"{path}: no {content} in it")
    expect('"README"' in client.get("/web/config").text, "/web: the README is not shown")
    return "answer"


def play(client: httpx.Client, seed: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Play an episode over HTTP; returns the header that names the session and all answers."""
    first = client.post("/reset", json={"task_id": _TASK, "seed": seed, "horizon_s": _HORIZON_S})
    answers = [_json(first)]
    session = {"X-Session-Id": first.headers["X-Session-Id"]}
    cap = 512
    while not answers[-1]["done"]:
        expect(len(answers) < 1000, "/step: the episode does not end")
        cap = 64 if cap == 512 else 512
        action = {"batch_cap": cap, "quantization_tier": "FP16"}
        answers.append(_json(client.post("/step", json={"action": action}, headers=session)))
    return session, answers


def check_episode(client: httpx.Client) -> str:
    """An episode from reset to grade, and what its parts say of each other."""
    session, answers = play(client, seed=11)
    state = _json(client.get("/state", headers=session))
    expect(state["step_count"] == len(answers) - 1, f"/state: step_count {state['step_count']}")
    grade = _json(client.post("/grader", headers=session))
    mean = sum(answer["reward"] for answer in answers[1:]) / (len(answers) - 1)
    expect(grade["verified"] and grade["complete"], f"/grader: {grade}")
    expect(abs(grade["score"] - mean) < 1e-9, f"/grader: score {grade['score']}, mean reward {mean}")
    log = _json(client.get("/log", headers=session))
    again = _json(client.post("/grader", json={"episode_log": log}))
    expect(again["score"] == grade["score"], "/grader: a posted log has another score")
    log["score"] = log["rewards"][0] = 1.0
    _json(client.post("/grader", json={"episode_log": log}), 422)
    return f"{len(answers) - 1} windows, score {grade['score']:.3f}, a forged log refused"


def check_determinism(client: httpx.Client) -> str:
    """Two sessions of one seed see the same, those of another seed do not."""

    def seen(seed: int) -> list[Any]:
        _, answers = play(client, seed)
        for answer in answers:
            answer["observation"]["metadata"].pop("session_id", None)
            answer.pop("metadata", None)
        return answers

    expect(seen(5) == seen(5), "two episodes of seed 5 differ")
    expect(seen(5) != seen(6), "episodes of seeds 5 and 6 are the same")
    return "holds"


def check_errors(client: httpx.Client) -> str:
    """Every kind of refusal, with the status and the detail that the contract promises."""
    session, _ = play(client, seed=1)
    _json(client.post("/step", json={"action": {}}, headers=session), 409)
    client.cookies.clear()
    _json(client.post("/step", json={"action": {}, "session_id": "none"}), 404)
    _json(client.post("/reset", json={"task_id": "none"}), 404)
    faults = _json(client.post("/step", json={"action": {"batch_cap": 0}}, headers=session), 422)["detail"]
    expect(faults[0]["loc"][-1] == "batch_cap", f"422: expected the field, found {faults[0]['loc']}")
    _json(client.post("/step", json={"action": {"batch_size": 1}}, headers=session), 422)
    _json(client.post("/reset", content=b"{", headers={"Content-Type": "application/json"}), 422)
    large = client.post("/reset", content=b" " * (8 << 20), headers={"Content-Type": "application/json"})
    _json(large, 413)
    return "as promised"


def check_mcp(client: httpx.Client, root: Path) -> str:
    """JSON-RPC lists the tools that the manifest declares, and one of them answers."""
    declared = read_manifest(root)[0].capabilities.declared_tools
    tools = [tool["name"] for tool in _call(client, "tools/list", {})["tools"]]
    expect(sorted(tools) == sorted(declared), f"/mcp: expected {declared}, found {tools}")
    said = _call(client, "tools/call", {"name": "list_tasks", "arguments": {}})
    expect(_TASK in json.dumps(said), f"/mcp: list_tasks: {str(said)[:200]}")
    return ", ".join(tools)


def _call(client: httpx.Client, method: str, params: dict[str, Any]) -> Any:
    answer = _json(client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
    expect("result" in answer, f"/mcp: {method}: {answer.get('error')}")
    return answer["result"]


def check_baseline(client: httpx.Client) -> str:
    """The reference agents' suite runs on the server."""
    content = _json(client.get("/baseline", params={"task_id": _TASK, "episodes": 1}))
    scores = {agent: found["mean"] for agent, found in content["summary"][_TASK].items()}
    expect(all(0 <= score <= 1 for score in scores.values()) and len(scores) > 1, f"/baseline: {scores}")
    return ", ".join(f"{agent} {score:.3f}" for agent, score in scores.items())


def check_websocket(url: str) -> str:
    """An episode through the WebSocket."""
    parts = urlsplit(url)
    address = urlunsplit(
        ("wss" if parts.scheme == "https" else "ws", parts.netloc, parts.path + "/ws", "", "")
    )
    with connect(address, open_timeout=TIMEOUT_S) as socket:

        def ask(kind: str, expected: str, data: dict[str, Any] | None = None) -> Any:
            socket.send(json.dumps({"type": kind} if data is None else {"type": kind, "data": data}))
            answer = json.loads(socket.recv(timeout=TIMEOUT_S))
            expect(answer["type"] == expected, f"/ws: {kind}: {str(answer)[:200]}")
            return answer["data"]

        ask(
            "reset", "observation", {"task_id": _TASK, "seed": 3, "horizon_s": _HORIZON_S, "episode_id": "ws"}
        )
        ask("step", "observation", {"batch_cap": 128})
        expect(ask("state", "state")["episode_id"] == "ws", "/ws: another episode_id")
        fault = ask("step", "error", {"batch_cap": "many"})
        expect(fault["code"] == "VALIDATION_ERROR", f"/ws: {fault}")
        rest = ask("step_n", "steps", {"actions": [{}] * 1000, "every": False})
        expect(rest["steps"][-1]["done"], "/ws: step_n: the episode does not end")
        score = ask("grade", "grade", {})["score"]
    return f"{rest['played'] + 1} windows, score {score:.3f}"


def check_validate_url(url: str) -> str:
    """`openenv validate --url`."""
    report = validate_running_environment(url, timeout_s=30)
    summary = report["summary"]
    expect(report["passed"], f"failed: {', '.join(summary['failed_criteria'])}")
    return f"{summary['passed_count']} of {summary['total_count']}"


def check_runtime_graders(url: str, root: Path) -> str:
    """OpenEnv's graders of reward, observation schema and state, over the plan of the checkout."""
    manifest, plan = read_manifest(root)
    evidence = collect_runtime_evidence(url, plan, episode_timeout_s=manifest.resources.episode_timeout_s)
    expect(evidence.failure_reason is None, f"{evidence.failure_reason}")
    subject = Subject(
        root=root,
        manifest=manifest,
        image_ref=None,
        running=None,
        outputs_dir=root,
        runtime_evidence=evidence,
    )
    graders = (RewardWellFormedGrader(), ObservationSchemaGrader(), StateContractGrader())
    for result in [grader.run(subject) for grader in graders]:
        expect(result.status is CheckStatus.PASS, f"{result.check_id}: {'; '.join(result.evidence)}")
    ended = json.loads(evidence.exchanges[-2].response_json)["data"]["done"]
    expect(ended, "the plan does not reach the end of its episode")
    return f"{', '.join(grader.check_id for grader in graders)} over {len(evidence.exchanges)} messages"
