"""The tools over MCP, with the clients that are out there: FastMCP's, OpenEnv's, and plain requests."""

from __future__ import annotations

import asyncio
import inspect
import json

import httpx
import pytest
from fastmcp import Client
from openenv.core.env_server.mcp_types import RESERVED_TOOL_NAMES
from openenv.core.mcp_client import MCPToolClient
from websockets.sync.client import connect

from llmserve_env.envs.tool_env import ServeToolEnv
from llmserve_env.schema import ServeAction
from tests.server.conftest import ends, running

EPISODE = {"task_id": "adversarial_multitenant", "seed": 5, "horizon_s": 20.0}
CONFIG = ServeAction(batch_cap=64, priority_routing=True).model_dump(mode="json")
STREAMS = {"Accept": "application/json, text/event-stream"}
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}


@pytest.fixture
def http(server_url):
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client


def played(seed: int = 5, **config) -> list[str]:
    """What the tools answer when the episode is played here."""
    env = ServeToolEnv()
    return [
        env.reset(**{**EPISODE, "seed": seed}),
        env.set_serving_config(**{**CONFIG, **config}, windows=2),
        env.observe(),
        env.set_serving_config(**{**CONFIG, **config}, windows=9),
        env.grade(),
    ]


async def play(call, seed: int = 5, **config) -> list[str]:
    """The same with a function that calls a tool by name."""
    return [
        await call("start_episode", {**EPISODE, "seed": seed}),
        await call("set_serving_config", {**CONFIG, **config, "windows": 2}),
        await call("observe", {}),
        await call("set_serving_config", {**CONFIG, **config, "windows": 9}),
        await call("grade", {}),
    ]


def rpc(http: httpx.Client, method: str, *, headers: dict | None = None, **params) -> dict:
    """The answer to a request in OpenEnv's dialect."""
    request = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    response = http.post("/mcp", json=request, headers=headers)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", 7)
    return answer


def opened(http: httpx.Client) -> str:
    """The id of a session that an MCP client has begun."""
    response = http.post("/mcp", json=INITIALIZE, headers=STREAMS)
    assert response.status_code == 200
    return response.headers["mcp-session-id"]


# MCP clients


def test_an_mcp_client_plays_what_is_played_here(server_url):
    async def session() -> list[str]:
        async with Client(f"{server_url}/mcp") as client:

            async def call(name, arguments):
                return (await client.call_tool(name, arguments)).data

            assert await call("list_tasks", {}) == ServeToolEnv().list_tasks()
            return await play(call)

    assert asyncio.run(session()) == played()


def test_tools_say_what_they_do_and_take(server_url):
    async def listed():
        async with Client(f"{server_url}/mcp") as client:
            return {tool.name: tool for tool in await client.list_tools()}, client.initialize_result

    tools, hello = asyncio.run(listed())
    assert set(tools) == {"grade", "list_tasks", "observe", "set_serving_config", "start_episode"}
    assert not set(tools) & RESERVED_TOOL_NAMES
    assert "start_episode" in hello.instructions
    schema = tools["set_serving_config"].inputSchema
    assert schema["required"] == [name for name in CONFIG if name != "admission_rate"]
    assert schema["properties"]["quantization_tier"]["enum"] == ["FP16", "INT8", "INT4"]
    for name in set(tools) - {"start_episode"}:
        assert tools[name].description.startswith(inspect.getdoc(getattr(ServeToolEnv, name)).splitlines()[0])
    for tool in tools.values():
        assert all(each["description"] for each in tool.inputSchema["properties"].values())


def test_clients_at_the_same_time_do_not_meet(server_url):
    async def session(number: int) -> list[str]:
        async with Client(f"{server_url}/mcp") as client:

            async def call(name, arguments):
                return (await client.call_tool(name, arguments)).data

            return await play(call, seed=number, batch_cap=8 * number)

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(session(number) for number in range(1, 9)))

    assert asyncio.run(all_of_them()) == [played(seed=n, batch_cap=8 * n) for n in range(1, 9)]


def test_what_goes_wrong_in_a_tool_is_told_and_the_session_goes_on(server_url):
    async def session() -> list:
        async with Client(f"{server_url}/mcp") as client:

            async def tell(name, **arguments):
                result = await client.call_tool(name, arguments, raise_on_error=False)
                return result.is_error, result.content[0].text

            return [
                await tell("observe"),
                await tell("grade"),
                await tell("set_serving_config", **CONFIG),
                await tell("start_episode", task_id="no_such_task"),
                await tell("start_episode", seed=-1),
                await tell("start_episode", **EPISODE),
                await tell("grade"),
                await tell("set_serving_config", **{**CONFIG, "batch_cap": 513}),
                await tell("set_serving_config", batch_cap=1),
                await tell("no_such_tool"),
                await tell("set_serving_config", **CONFIG, windows=9),
                await tell("set_serving_config", **CONFIG),
            ]

    told = asyncio.run(session())
    for answer in told[:3]:
        assert answer == (False, '{"error":"no episode has begun: start_episode"}')
    assert "static_workload" in told[3][1]
    assert "seed" in told[4][1]
    assert "4 windows" in told[6][1]
    assert json.loads(told[7][1])["error"] == ["batch_cap: expected a whole number from 1 to 512, found 513"]
    assert told[8][0]
    assert "Missing required argument" in told[8][1]
    assert told[9][0]
    assert json.loads(told[10][1])["windows_served"] == 4
    assert "over" in json.loads(told[11][1])["error"]


def test_a_client_that_closes_frees_its_session(single_url):
    async def sessions(url: str) -> list[int]:
        found = []
        for _ in range(3):
            async with Client(f"{url}/mcp") as client:
                await client.call_tool("start_episode", EPISODE)
                async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                    refused = await http.post("/mcp", json=INITIALIZE, headers=STREAMS)
                    found.append(refused.status_code)
                    assert int(refused.headers["retry-after"]) >= 1
        return found

    assert asyncio.run(sessions(single_url)) == [429] * 3


def test_initialize_that_is_refused_holds_no_session(single_url):
    with httpx.Client(base_url=single_url, timeout=60) as http:
        refused = http.post("/mcp", json=INITIALIZE, headers={"Accept": "text/plain"})
        assert refused.status_code == 406
        assert "mcp-session-id" not in refused.headers
        incomplete = http.post("/mcp", json={**INITIALIZE, "params": {}}, headers=STREAMS)
        assert "error" in incomplete.json()
        assert "mcp-session-id" not in incomplete.headers
        http.delete("/mcp", headers={"Mcp-Session-Id": opened(http)})


def test_the_session_is_one_of_the_service(http):
    session_id = opened(http)
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call"}
    call["params"] = {"name": "start_episode", "arguments": EPISODE}
    answer = http.post("/mcp", json=call, headers={**STREAMS, "Mcp-Session-Id": session_id})
    assert json.loads(answer.json()["result"]["content"][0]["text"])["windows_left"] == 4
    state = http.get("/state", headers={"X-Session-Id": session_id}).json()
    assert (state["task_id"], state["seed"], state["windows"]) == ("adversarial_multitenant", 5, 4)
    assert http.delete("/mcp", headers={"Mcp-Session-Id": session_id}).status_code == 204
    assert http.get("/state", headers={"X-Session-Id": session_id}).status_code == 404


def test_a_client_goes_on_after_a_restart(tmp_path):
    def call(url: str, session_id: str, name: str, arguments: dict) -> str:
        request = {"jsonrpc": "2.0", "id": 2, "method": "tools/call"}
        request["params"] = {"name": name, "arguments": arguments}
        headers = {**STREAMS, "Mcp-Session-Id": session_id}
        answer = httpx.post(f"{url}/mcp", json=request, headers=headers, timeout=60)
        return answer.json()["result"]["content"][0]["text"]

    with running("--journal", str(tmp_path)) as url, httpx.Client(base_url=url, timeout=60) as http:
        session_id = opened(http)
        answers = [call(url, session_id, "start_episode", EPISODE)]
        answers.append(call(url, session_id, "set_serving_config", {**CONFIG, "windows": 2}))
    with running("--journal", str(tmp_path)) as url:
        answers.append(call(url, session_id, "observe", {}))
        answers.append(call(url, session_id, "set_serving_config", {**CONFIG, "windows": 9}))
        answers.append(call(url, session_id, "grade", {}))
    assert answers == played()


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_session_that_is_not_there_is_404_as_the_protocol_asks(http, method):
    request = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
    headers = {**STREAMS, "Mcp-Session-Id": "gone"}
    assert http.request(method, "/mcp", json=request, headers=headers).status_code == 404
    assert http.request(method, "/mcp", json=request, headers=STREAMS).status_code == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b'{"jsonrpc":"2.0","method":"notifications/initialized"}', 202),
        (b'{"jsonrpc":"2.0","method":"notifications/unheard_of"}', 202),
        (b'{"jsonrpc":"2.0","id":1,"result":{}}', 202),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"}', 200),
        (b'{"jsonrpc":"2.0","id":1,"method":"unheard_of"}', 200),
        (b'{"jsonrpc":"2.0","id":[1],"method":"unheard_of"}', 200),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":["observe"]}}', 200),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"observe","arguments":7}}', 200),
    ],
)
def test_messages_of_mcp_clients_without_a_tool_to_call(http, body, status):
    session_id = opened(http)
    headers = {**STREAMS, "Mcp-Session-Id": session_id, "Content-Type": "application/json"}
    response = http.post("/mcp", content=body, headers=headers)
    assert response.status_code == status
    if status == 200:
        answer = response.json()
        assert answer["result"] == {} if b"ping" in body else answer["error"]["code"] == -32602
        assert answer["id"] == (None if b"[1]" in body else 1)
    http.delete("/mcp", headers=headers)


def test_there_is_no_stream_to_listen_to(http):
    response = http.get("/mcp", headers=STREAMS)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST, DELETE"


# OpenEnv's dialect


def test_openenvs_client_plays_with_tools_and_steps_in_one_session(server_url):
    async def session() -> list[str]:
        async with MCPToolClient(base_url=server_url) as client:
            assert {tool.name for tool in await client.list_tools()} >= {"observe", "set_serving_config"}
            assert (await client.get_tool("observe")).input_schema["type"] == "object"

            async def call(name, arguments):
                return await client.call_tool(name, **arguments)

            answers = await play(call)
            assert (await client.state()).step_count == 4
            await client.reset(**EPISODE)
            assert json.loads(await client.call_tool("observe"))["windows_left"] == 4
            return answers

    assert asyncio.run(session()) == played()


def test_a_session_is_created_used_and_closed(http):
    session_id = rpc(http, "openenv/session/create")["result"]["session_id"]
    other = rpc(http, "openenv/session/create")["result"]["session_id"]

    async def call(name, arguments):
        answer = rpc(http, "tools/call", name=name, arguments=arguments, session_id=session_id)
        assert answer["result"]["content"] == [{"type": "text", "text": answer["result"]["data"]}]
        return answer["result"]["data"]

    assert asyncio.run(play(call)) == played()
    untouched = rpc(http, "tools/call", name="observe", session_id=other)["result"]["data"]
    assert "no episode has begun" in untouched
    named = {"X-Session-Id": session_id}
    assert "score_so_far" in rpc(http, "tools/call", name="observe", headers=named)["result"]["data"]
    closed = rpc(http, "openenv/session/close", session_id=session_id)["result"]
    assert closed == {"session_id": session_id, "closed": True}
    assert "no such session" in rpc(http, "openenv/session/close", session_id=session_id)["error"]["message"]


def test_tools_that_need_no_session_need_none(http):
    listed = rpc(http, "tools/list")["result"]["tools"]
    assert {"name", "description", "inputSchema"} <= set(listed[0])
    assert "static_workload" in rpc(http, "tools/call", name="list_tasks")["result"]["data"]
    assert "session_id" in rpc(http, "tools/call", name="observe")["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", -32600),
        (b"[]", -32600),
        (b"null", -32600),
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b'{"jsonrpc":"2.0","method":"tools/cal"}', -32601),
        (b'{"jsonrpc":"2.0","method":"tools/call"}', -32602),
        (b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"observe","arguments":[1]}}', -32602),
        (b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"x","session_id":"gone"}}', -32602),
        (b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"list_tasks","session_id":[1]}}', -32602),
        (b'{"jsonrpc":"2.0","method":"openenv/session/close"}', -32602),
        (b'{"jsonrpc":"2.0","method":"openenv/session/close","params":{"session_id":7}}', -32602),
        (b'{"jsonrpc":"1.0","method":"tools/list"}', -32600),
    ],
)
def test_what_cannot_be_read_is_answered_as_json_rpc_asks(http, body, code):
    response = http.post("/mcp", content=body)
    assert response.status_code == 200
    assert response.json()["jsonrpc"] == "2.0"
    assert response.json()["error"]["code"] == code


def test_an_unknown_tool_and_a_bad_argument_are_invalid_parameters(http):
    session_id = rpc(http, "openenv/session/create")["result"]["session_id"]
    unknown = rpc(http, "tools/call", name="no_such_tool", session_id=session_id)["error"]
    assert unknown["code"] == -32602
    assert "no_such_tool" in unknown["message"]
    arguments = {"seed": "five"}
    bad = rpc(http, "tools/call", name="start_episode", arguments=arguments, session_id=session_id)["error"]
    assert bad["code"] == -32602
    assert "seed" in bad["message"]


def test_over_a_websocket_the_session_ends_with_the_connection(server_url, http):
    def ask(method: str, **params) -> dict:
        websocket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
        return json.loads(websocket.recv())

    with connect(f"{server_url.replace('http', 'ws')}/mcp") as websocket:
        session_id = ask("openenv/session/create")["result"]["session_id"]
        begun = ask("tools/call", name="start_episode", arguments=EPISODE)["result"]["data"]
        assert begun == played()[0]
        assert "connection" in ask("openenv/session/close", session_id=session_id)["error"]["message"]
        websocket.send("{")
        assert json.loads(websocket.recv())["error"]["code"] == -32700
        assert "windows_left" in ask("tools/call", name="observe")["result"]["data"]
        assert http.get("/state", headers={"X-Session-Id": session_id}).status_code == 200
    assert ends(server_url, session_id)
