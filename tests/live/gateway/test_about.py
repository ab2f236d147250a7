"""What a gateway tells of several upstreams, whatever one of them answers, and which it asks for a model."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve_env.live.gateway.gateway import Gateway
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import QuantizationTier, ServeAction

from ..endpoint_server import Running, ScriptedEndpoint
from .test_gateway import ANSWER, THREE, answering, ask, asking, held, standing

METRICS = b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1.0\n"


def listing(*names, **more):
    models = [{"id": name, "object": "model", **more} for name in names]
    return json.dumps({"object": "list", "data": models}).encode()


def endpoint(*names, script=answering, **others):
    return ScriptedEndpoint(script, others={"/v1/models": listing(*names), "/metrics": METRICS, **others})


async def get(here, path, **options):
    async with here.client.get(path, **options) as response:
        return response.status, await response.read()


class Endless:
    """Answers what it is asked for with a body that does not end, until its client hangs up."""

    def __init__(self):
        self.sent_bytes = 0

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watching = asyncio.create_task(self._watch(receive))
        while not watching.done():
            self.sent_bytes += 1 << 20
            await send({"type": "http.response.body", "body": b" " * (1 << 20), "more_body": True})
            await asyncio.sleep(0)  # to a client that is gone, uvicorn sends without waiting

    @staticmethod
    async def _watch(receive):
        while (await receive())["type"] != "http.disconnect":
            pass


UNREADABLE = [
    b"<html>login</html>",
    b"",
    b"\xff\xfe garbage",
    b'{"data": {"id": "x"}}',
    b'{"data": [{"id": "x", "size": NaN}]}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", UNREADABLE)
def test_what_cannot_be_read_of_one_upstream_is_left_out(body, caplog):
    async def main():
        bad = ScriptedEndpoint(answering, others={"/v1/models": body, "/metrics": body})
        async with standing(bad, endpoint("a", "b")) as here:
            for _ in range(2):
                status, got = await get(here, "/v1/models")
                assert (status, [each["id"] for each in json.loads(got)["data"]]) == (200, ["a", "b"])
                status, got = await get(here, "/metrics")
                (family,) = text_string_to_metric_families(got.decode())
                (sample,) = family.samples
                assert (status, sample.value, sample.labels) == (200, 1.0, {"upstream": here.servers[1].url})
            assert (await get(here, "/health"))[0] == 200
            said = [each.getMessage() for each in caplog.records if here.servers[0].url in each.getMessage()]
            assert [each.split(" of ")[0] for each in said] == ["/v1/models", "/metrics"]  # once each
            bad.others = endpoint("c").others
            assert [each["id"] for each in json.loads((await get(here, "/v1/models"))[1])["data"]] == [
                "c",
                "a",
                "b",
            ]
            assert "works again" in caplog.records[-1].getMessage()

    caplog.set_level(logging.WARNING)
    asyncio.run(main())


def test_entries_that_are_none_are_left_out():
    async def main():
        odd = json.dumps({"data": [1, {"id": 2}, {"name": "x"}, {"id": "c", "root": "r"}]}).encode()
        async with standing(endpoint("a"), ScriptedEndpoint(answering, others={"/v1/models": odd})) as here:
            _, got = await get(here, "/v1/models")
            assert json.loads(got)["data"][1:] == [{"id": "c", "root": "r"}]

    asyncio.run(main())


def test_a_body_without_end_costs_a_bound_and_health_reads_none():
    async def main():
        endless = Endless()
        async with standing(endless, endpoint("a")) as here:
            assert (await get(here, "/health"))[0] == 200
            assert endless.sent_bytes == 0
            assert json.loads((await get(here, "/v1/models"))[1])["data"][0]["id"] == "a"
            assert (await get(here, "/metrics"))[0] == 200
            assert endless.sent_bytes < 64 << 20

    asyncio.run(main())


def test_an_upstream_that_hangs_holds_nothing_up_for_longer_than_its_limit():
    async def main():
        hanging = ScriptedEndpoint(held)

        async def hang(scope, receive, send):
            if scope["method"] == "GET":
                while (await receive())["type"] != "http.disconnect":
                    pass
                return
            await hanging(scope, receive, send)

        async with standing(hang, endpoint("a"), limits={"connect_timeout_s": 0.3}) as here:
            models, metrics, again = await asyncio.gather(
                get(here, "/v1/models"), get(here, "/metrics"), get(here, "/metrics")
            )
            assert (models, metrics[0], again) == ((200, listing("a")), 200, metrics)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("first", "second", "statuses"),
    [(b"<html>", b"<html>", (502, 502)), (b"<html>", None, (404, 502)), (None, None, (404, 404))],
)
def test_without_a_good_answer_there_is_an_error(first, second, statuses):
    async def main():
        others = [{} if each is None else {"/v1/models": each, "/metrics": each} for each in (first, second)]
        async with standing(*(ScriptedEndpoint(answering, others=each) for each in others)) as here:
            for path, status in zip(("/v1/models", "/metrics"), statuses, strict=True):
                got_status, got = await get(here, path)
                assert (got_status, json.loads(got)["error"]["code"]) == (status, status)
            for each in here.servers:
                await each.kill()
            assert (await get(here, "/v1/models"))[0] == 503

    asyncio.run(main())


def test_a_redirect_of_metrics_is_followed():
    async def redirecting(scope, receive, send):
        path = scope["path"]
        headers = [(b"location", b"/metrics/")] if path == "/metrics" else []
        await send({"type": "http.response.start", "status": 307 if headers else 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if headers else METRICS})

    async def main():
        async with standing(redirecting) as here:
            status, got = await get(here, "/metrics")
            assert (status, b"num_requests_running{" in got) == (200, True)

    asyncio.run(main())


def test_one_model_is_shown_by_its_name():
    async def main():
        async with standing(endpoint("org/a b"), endpoint("c")) as here:
            status, got = await get(here, "/v1/models/org/a%20b")
            assert (status, json.loads(got)["id"]) == (200, "org/a b")
            status, got = await get(here, "/v1/models/d")
            error = json.loads(got)["error"]
            assert (status, error["type"], error["param"], error["code"]) == (
                404,
                "NotFoundError",
                "model",
                404,
            )

    asyncio.run(main())


# ------------------------------------------------------------------------------------ requests by their model


def asked(*endpoints):
    return [len(each.asked) for each in endpoints]


def test_requests_go_where_their_model_is(caplog):
    async def main():
        a, b = endpoint("a", "shared"), endpoint("b", "shared", "lora")
        async with standing(a, b) as here:
            for _ in range(4):
                assert (await ask(here, model="b"))[::2] == (200, b"".join(ANSWER))
            assert asked(a, b) == [0, 4]
            assert (await ask(here, model="lora"))[0] == 200
            assert (await ask(here, model="a"))[0] == 200
            assert asked(a, b) == [1, 5]
            for _ in range(4):
                assert (await ask(here, model="shared"))[0] == 200
            assert asked(a, b) == [3, 7]
            status, _, got = await ask(here, model="none")
            error = json.loads(got)["error"]
            assert (status, error["message"]) == (404, "The model `none` does not exist.")
            assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
            assert asked(a, b) == [3, 7]
            assert here.gateway.window().failed == 0
            said = [each.getMessage() for each in caplog.records if "different models" in each.getMessage()]
            assert len(said) == 1
            assert "b, lora, shared" in said[0]

    caplog.set_level(logging.WARNING)
    asyncio.run(main())


@pytest.mark.parametrize("unknown", [b"<html>", listing()])
def test_an_upstream_whose_list_is_not_known_may_serve_any(unknown):
    async def main():
        a, open_ = endpoint("a"), ScriptedEndpoint(answering, others={"/v1/models": unknown})
        async with standing(a, open_) as here:
            for _ in range(3):
                assert (await ask(here, model="b"))[0] == 200
            assert asked(a, open_) == [0, 3]

    asyncio.run(main())


def test_a_model_that_is_loaded_later_is_found(monkeypatch):
    monkeypatch.setattr("llmserve_env.live.gateway.several.models._ASK_AGAIN_S", 0.0)

    async def main():
        a, b = endpoint("a"), endpoint("a")
        async with standing(a, b) as here:
            assert (await ask(here, model="lora"))[0] == 404
            b.others["/v1/models"] = listing("a", "lora")
            assert (await ask(here, model="lora"))[0] == 200
            assert asked(a, b) == [0, 1]

    asyncio.run(main())


def test_a_model_whose_only_upstream_is_gone_is_no_unknown_one():
    async def main():
        a, b = endpoint("a"), endpoint("b")
        async with standing(a, b) as here:
            assert (await ask(here, model="b"))[0] == 200
            await here.servers[1].kill()
            status, headers, _ = await ask(here, model="b")
            assert (status, "retry-after" in headers) == (503, True)
            assert (await ask(here, model="a"))[0] == 200
            assert asked(a, b) == [1, 1]

    asyncio.run(main())


def test_who_waits_for_a_model_keeps_nobody_waiting_who_goes_elsewhere():
    async def main():
        a, b = endpoint("a", "shared", script=held), endpoint("b", "shared", script=held)
        async with standing(a, b, action=None, callers=THREE[2:]) as here:
            here.gateway.apply(here.gateway.action.model_copy(update={"batch_cap": 1}))
            requests = [asking(here, model="b")]
            await b.came(1)
            requests += [asking(here, model="b"), asking(here, model="b")]
            while here.gateway.waiting < 2:
                await asyncio.sleep(0)
            requests.append(asking(here, model="shared"))
            (await a.came(1)).go.release()
            for number in (1, 2, 3):
                (await b.came(number)).go.release()
            assert [status for status, *_ in await asyncio.gather(*requests)] == [200] * 4
            assert asked(a, b) == [1, 3]

    asyncio.run(main())


def test_a_failed_request_is_tried_where_its_model_is():
    async def main():
        def failing(asked):
            raise ConnectionAbortedError

        a, first, second = endpoint("a"), endpoint("b", script=failing), endpoint("b")
        async with standing(a, first, second) as here:
            for _ in range(3):
                assert (await ask(here, model="b"))[0] == 200
            assert asked(a, second) == [0, 3]

    asyncio.run(main())


def test_of_one_upstream_no_list_is_asked_for():
    async def main():
        one = endpoint("a")
        async with standing(one) as here:
            assert (await ask(here, model="anything"))[0] == 200

    asyncio.run(main())


def test_lists_are_looked_at_from_the_start(caplog):
    async def main():
        async with (
            standing(endpoint("a"), endpoint("b")) as here,
            Running(here.proxy, lifespan="on"),
        ):
            while not caplog.records:
                await asyncio.sleep(0)

    caplog.set_level(logging.WARNING)
    asyncio.run(main())
    assert "different models" in caplog.records[0].getMessage()


def test_a_heavy_request_gets_its_turn_where_its_model_is():
    async def main():
        a, b = Upstream("http://a"), Upstream("http://b")
        gateway = Gateway([a, b], action=ServeAction(batch_cap=4))
        only_b = frozenset([b])
        light = [gateway.enter(0, 1, places=only_b) for _ in range(3)]
        heavy = gateway.enter(0, 1, sequences=3, places=only_b)
        later = [gateway.enter(0, 1, places=only_b) for _ in range(6)]
        anywhere = [gateway.enter(0, 1) for _ in range(5)]
        assert [each.upstream for each in anywhere] == [a, a, a, a, None]  # it keeps nobody waiting there
        for each in (*light, *later):
            if heavy.upstream is None:
                gateway.complete(each, 1)
        assert heavy.upstream is b
        assert sum(each.over or each.upstream is b for each in later) == 3  # as many as it has sequences
        gateway.complete(anywhere[0], 1)
        assert anywhere[4].upstream is a

    asyncio.run(main())


def test_a_model_comes_before_the_precision_of_an_action():
    async def main():
        a, b = Upstream("http://a", QuantizationTier.FP16), Upstream("http://b", QuantizationTier.INT8)
        gateway = Gateway([a, b], action=ServeAction(quantization_tier="FP16"))
        assert [gateway.enter(0, 1, places=each).upstream for each in (None, frozenset([b]))] == [a, b]

    asyncio.run(main())
