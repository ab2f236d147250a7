"""How the service serves connections, and what stands before its paths: one server, in this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from openenv.auto import AutoAction, AutoEnv
from pydantic_core import from_json, to_json
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from llmserve_env.client import ConflictError, LLMServeEnv, RemoteSession
from llmserve_env.errors import InputError
from llmserve_env.net.sockets import listen
from llmserve_env.schema import ServeAction
from server.app import create_app, server_config
from server.settings import Settings
from tests.server._playing import ACTIONS, BEGIN, bare, client, local, ok

PREFIX = "/llmserve"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of a server below a prefix that pings every few milliseconds."""
    settings = Settings(web=False, root_path=f"{PREFIX}/")
    config = server_config(create_app(settings), settings)
    config.ws_ping_interval = 0.01
    server, listening = uvicorn.Server(config), listen("127.0.0.1", 0)
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    serving.start()
    try:
        where = "http://{}:{}".format(*listening.getsockname())
        ok(httpx.get(f"{where}/health", timeout=60))
        yield where
    finally:
        server.should_exit = True
        serving.join()


# Pings


class Silent:
    """A WebSocket connection whose client answers no pings, as one whose event loop stands still."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._socket = socket.create_connection((place.hostname, place.port), 60)
        self._protocol = ClientProtocol(parse_uri(url.replace("http", "ws", 1) + "/ws"))
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        self._received()

    def send(self, kind: str, data: object) -> None:
        """Send a message of OpenEnv's."""
        self._protocol.send_text(to_json({"type": kind, "data": data}))
        self._flush()

    def next(self, opcode: Opcode) -> bytes:
        """The content of the next frame of a kind."""
        while True:
            for event in self._received():
                assert getattr(event, "opcode", opcode) is not Opcode.CLOSE, event
                if getattr(event, "opcode", None) is opcode:
                    return bytes(event.data)

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        self._socket.sendall(b"".join(self._protocol.data_to_send()))

    def _received(self) -> list[object]:
        self._protocol.receive_data(self._socket.recv(65536))
        self._protocol.data_to_send()  # pongs, which nobody sends
        return self._protocol.events_received()


def test_who_answers_no_pings_keeps_the_episode(url):
    with closing(Silent(url)) as connection:
        connection.send("reset", BEGIN)
        first = from_json(connection.next(Opcode.TEXT))
        for _ in range(3):  # a server that waits for the answer to one sends no other
            connection.next(Opcode.PING)
        connection.send("step", ACTIONS[0])
        seen = [first, from_json(connection.next(Opcode.TEXT))]
        assert [bare(each["data"]) for each in seen] == local(actions=ACTIONS[:1])[0]


def test_our_client_waits_for_no_answer_to_its_pings_either(url):
    async def play() -> None:
        async with LLMServeEnv.from_url(url) as env:
            await env.reset(**BEGIN)
            assert (env._ws.ping_interval, env._ws.ping_timeout) == (20, None)
        async with LLMServeEnv.from_url(url, websocket_ping_timeout_s=5) as env:
            assert env._ws.ping_timeout == 5

    asyncio.run(play())


# Below a path


@pytest.mark.parametrize("below", ["", PREFIX])
def test_a_service_below_a_path_takes_requests_with_it_and_without(url, below):
    with LLMServeEnv.from_url(f"{url}{below}/").sync() as env:
        env.reset(**BEGIN)
        assert env.step(ServeAction(**ACTIONS[0])).reward == local(actions=ACTIONS[:1])[0][1]["reward"]
        with client(f"{url}{below}") as http:
            session = env.state().session_id
            assert ok(http.get("state", headers={"X-Session-Id": session}))["step_count"] == 1
            tools = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
            assert len(ok(http.post("mcp", json=tools))["result"]["tools"]) == 5
            assert (
                http.post("reset", json=BEGIN, headers={"Origin": "https://other.example"}).status_code == 403
            )
            assert http.get("baseline", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
            assert f"'{PREFIX}/openapi.json'" in http.get("docs").text
            assert http.get("demo").headers["location"] == f"{PREFIX}/web/"
            opened = http.post("reset", json=BEGIN)
            assert f"Path={PREFIX};" in opened.headers["set-cookie"]
    assert httpx.get(f"{url}/llmserve2/health", timeout=60).status_code == 404


@pytest.mark.parametrize("told", ["/some/where", "/some/where/"])
def test_a_proxy_may_say_where_the_service_is(server_url, told):
    headers = {"X-Forwarded-Prefix": told}
    assert httpx.get(f"{server_url}/demo", headers=headers).headers["location"] == "/some/where/web/"
    assert ok(httpx.get(f"{server_url}/some/where/health", headers=headers)) == {"status": "healthy"}
    assert httpx.get(f"{server_url}/some/where/health").status_code == 404
    with LLMServeEnv.from_url(f"{server_url}/some/where", headers=headers).sync() as env:
        assert env.tasks()


@pytest.mark.parametrize("told", ["//other.example", "/a/../b", "https://other.example", "/a b", "", "/"])
def test_what_is_no_path_leads_nowhere(server_url, told):
    answer = httpx.get(f"{server_url}/demo", headers={"X-Forwarded-Prefix": told})
    assert answer.headers["location"] == "web/"


@pytest.mark.parametrize("path", ["llmserve", "/a/../b", "//other.example", "http://host/a"])
def test_a_root_path_that_is_none_is_refused(path):
    with pytest.raises(InputError, match="root_path': expected a path like /llmserve"):
        create_app(Settings(web=False, root_path=path))


# Clients of OpenEnv's


def test_the_url_of_the_websocket_is_as_good(url):
    for given in (f"{url}/ws", f"{url}/ws/", url.replace("http", "ws") + PREFIX + "/ws"):
        with LLMServeEnv.from_url(given).sync() as env:
            env.reset(**BEGIN)
            session = env.state().session_id
            other = LLMServeEnv.from_url(given, session_id=session).sync()
            with other, pytest.raises(ConflictError, match="another WebSocket"):
                other.state()
    assert RemoteSession(f"{url}/ws").tasks()


def test_auto_env_plays_without_an_installed_package(url):
    env = AutoEnv.from_env("llmserve", base_url=url, skip_install=True).sync()
    action = AutoAction.from_env("llmserve", skip_install=True)
    here = local(actions=ACTIONS[:1])[0]
    with env:
        seen = [env.reset(**BEGIN), env.step(action(**ACTIONS[0]))]
        assert [each.reward for each in seen] == [each["reward"] for each in here]
        assert seen[1].observation["queue_depth"] == here[1]["observation"]["queue_depth"]
