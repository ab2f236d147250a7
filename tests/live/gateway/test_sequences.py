"""Requests of many sequences, and full rooms, over HTTP."""

from __future__ import annotations

import asyncio
import json
from random import Random

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve_env.commands.gateway import _most_sequences
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import load_task

from ..endpoint_server import WAIT, ScriptedEndpoint, event, piece, usage
from .test_gateway import ANSWER, THREE, Clock, answering, ask, asking, failures, held, standing, until

FREE, PAID = {"authorization": "Bearer k-free"}, {"authorization": "Bearer k-paid"}


def test_a_request_weighs_its_sequences_at_the_cap_and_in_the_records():
    async def main():
        endpoint = ScriptedEndpoint(held)
        async with standing(endpoint, action=ServeAction(batch_cap=6)) as here:
            first = asking(here, prompt=["a", "b"], n=2)
            await endpoint.came(1)
            second = asking(here, prompt=[[1, 2], [3], [4]])
            await until(lambda: here.gateway.waiting == 3)
            third = asking(here, prompt=[1, 2, 3], best_of=2)
            await endpoint.came(2)
            assert endpoint.asked[1].body["prompt"] == [1, 2, 3]  # one prompt, for which there was room
            record = here.gateway.window()
            assert (record.arrived, record.running, record.waiting) == (9, 6, 3)
            assert here.gateway.upstreams[0].running == 6
            for count in (1, 2, 3):
                (await endpoint.came(count)).go.release()
            assert [each[0] for each in await asyncio.gather(first, second, third)] == [200] * 3
            record = here.gateway.window()
            assert (record.completed, record.tenant_completed.tolist(), record.in_flight) == (9, [9], 0)
            assert record.first_tokens == record.ttft_histogram.sum() == 9

    asyncio.run(main())


def test_a_request_weighs_its_sequences_at_the_admission_rate():
    async def main():
        async with standing(
            ScriptedEndpoint(answering), action=ServeAction(admission_rate=4), clock=Clock()
        ) as here:
            statuses = [(await ask(here, n=n))[0] for n in (3, 2, 1, 1)]
            assert statuses == [200, 429, 200, 429]
            record = here.gateway.window()
            assert (record.arrived, record.completed, record.refused) == (7, 4, 3)

    asyncio.run(main())


REFUSED = [
    ({"n": 33}, "n"),
    ({"n": 1e9}, "n"),
    ({"n": 10**400}, "n"),
    ({"best_of": 64}, "best_of"),
    ({"prompt": ["p"] * 33}, "prompt"),
    ({"prompt": ["p"] * 9, "n": 4}, "prompt"),
    ({"use_beam_search": True, "n": 40}, "n"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": float("nan")}, "n"),
    ({"n": float("inf")}, "n"),
    ({"n": [200]}, "n"),
    ({"n": {"n": 200}}, "n"),
    ({"best_of": "x"}, "best_of"),
]


def test_what_no_upstream_could_run_at_once_is_refused_by_its_field():
    async def main():
        endpoint = ScriptedEndpoint(answering)
        async with standing(endpoint, action=ServeAction(batch_cap=32)) as here:
            for path in ("/v1/completions", "/v1/chat/completions"):
                for body, param in REFUSED:
                    async with here.client.post(path, json={"prompt": "p", **body}) as response:
                        error = (await response.json())["error"]
                    assert (response.status, error["code"], error["param"]) == (400, 400, param)
                    assert error["type"] == "invalid_request_error"
                    assert error["message"].startswith(f"Invalid {param}: ")
            assert (here.gateway.window().arrived, endpoint.asked) == (0, [])
            assert here.proxy.history.turned_away == {"too many sequences": 14, "invalid body": 20}

    asyncio.run(main())


def test_how_many_sequences_a_request_may_have():
    async def main():
        endpoint = ScriptedEndpoint(answering)
        upstream = [{"engines": 2}]
        async with standing(endpoint, upstream=upstream, action=ServeAction(batch_cap=2)) as here:
            assert [(await ask(here, n=n))[0] for n in (4, 4.0, None, 5)] == [200, 200, 200, 400]
        action = ServeAction(batch_cap=2)
        async with standing(endpoint, action=action, max_sequences=5) as here:
            assert [(await ask(here, n=n))[0] for n in (5, 6)] == [200, 400]

    asyncio.run(main())
    upstreams = [Upstream("http://a"), Upstream("http://b", engines=3)]
    task = load_task("bursty_workload")
    assert _most_sequences(task, upstreams) == 3 * max(task.grid.values["batch_cap"])
    assert _most_sequences(None, upstreams) is None


def test_sequences_have_first_tokens_and_gaps_of_their_own():
    """Two sequences, a piece of each every 20 ms: no gap is 10 ms, and the TPOT is that of each."""

    def of(index, end=None):
        text = json.loads(piece("x", end))
        text["choices"][0]["index"] = index
        return event(json.dumps(text))

    rounds = [[of(0), of(1)], [of(1), of(0)], [of(0, "length"), of(1, "length")]]
    parts = [each for part in rounds for each in (WAIT, part[0], WAIT, part[1])]

    async def main():
        clock = Clock()
        endpoint = ScriptedEndpoint(lambda asked: [*parts, event(usage(1, 6)), event("[DONE]")])
        async with standing(endpoint, clock=clock) as here:
            answer = asking(here, n=2)
            asked = await endpoint.came(1)
            for count in range(1, 7):
                clock.now_s += 0.01
                asked.go.release()
                await until(lambda n=count: here.gateway.ledger.totals[0].output_tokens == n)
            assert (await answer)[0] == 200
            record = here.gateway.window()
            assert (record.first_tokens, record.output_tokens) == (2, 6)
            assert record.mean_ttft_s == pytest.approx(0.015)
            assert (record.p50_gap_s, record.p99_gap_s) == (
                pytest.approx(0.02, abs=1e-6),
                pytest.approx(0.03, abs=1e-3),
            )
            assert list(here.gateway.ledger.totals[0].recent_tpot_s) == [pytest.approx(0.025)] * 2

    asyncio.run(main())


# ----------------------------------------------------------------------------------------------- full rooms


def test_an_urgent_request_takes_a_place_in_a_full_queue():
    async def main():
        endpoint = ScriptedEndpoint(held)
        action = ServeAction(batch_cap=2, priority_routing=True)
        async with standing(endpoint, callers=THREE, action=action, max_waiting=3) as here:
            free = []
            for count in range(1, 7):
                free.append(asking(here, FREE, prompt=str(count)))
                await until(lambda n=count: here.gateway.ledger.totals[0].arrived == n)
            assert (await free[5])[0] == 429
            paid = asking(here, PAID, prompt="paid")
            status, headers, got = await free[4]  # the newest that waits
            assert (status, headers["retry-after"]) == (429, "1")
            assert json.loads(got)["error"]["type"] == "rate_limit_error"
            for count in range(1, 6):
                (await endpoint.came(count)).go.release()
            assert (await paid)[0] == 200
            assert [(await each)[0] for each in free[:4]] == [200] * 4
            assert [each.body["prompt"] for each in endpoint.asked] == ["1", "2", "paid", "3", "4"]
            assert failures(here) == {"queue full": 1, "displaced": 1}
            async with here.client.get("/gateway/metrics") as response:
                found = {
                    (each.labels["tenant"], each.labels["outcome"]): each.value
                    for family in text_string_to_metric_families(await response.text())
                    for each in family.samples
                    if each.name == "llmserve_gateway_requests_total" and each.value
                }
            assert found == {("free", "completed"): 4, ("free", "refused"): 2, ("paid", "completed"): 1}

    asyncio.run(main())


async def sending(here, headers, size, whole):
    """A client that sends so many bytes of a body, and the rest once `whole` is set."""

    async def parts():
        yield json.dumps({"prompt": "x" * size}).encode()[:-1]
        await whole.wait()
        yield b"}"

    async with here.client.post("/v1/completions", data=parts(), headers=headers) as response:
        return response.status, response.headers, await response.read()


def test_an_urgent_body_finds_memory_wherever_others_hold_it():
    def script(asked):
        return [event(piece("a")), WAIT, *ANSWER] if asked.body["prompt"] == "begun" else [WAIT, *ANSWER]

    async def main():
        endpoint, whole = ScriptedEndpoint(script), asyncio.Event()
        action = ServeAction(batch_cap=2, priority_routing=True)
        limits = {"max_held_bytes": 4000, "max_body_bytes": 3000}
        async with standing(endpoint, callers=THREE, action=action, limits=limits) as here:
            bytes_ = here.proxy._held
            begun = await here.client.post("/v1/completions", json={"prompt": "begun"}, headers=FREE)
            await until(lambda: bytes_.bytes == 0)  # what has an answer is held no more
            unanswered = asking(here, FREE, prompt="u" * 900)
            await endpoint.came(2)
            waiting = asking(here, FREE, prompt="w" * 900)
            await until(lambda: here.gateway.waiting == 1)
            coming = asyncio.create_task(sending(here, FREE, 900, whole))
            await until(lambda: bytes_.bytes > 2700)
            assert (await ask(here, FREE, prompt="f" * 1500))[0] == 429
            paid = asking(here, PAID, prompt="p" * 2900)
            for each, status in ((coming, 429), (waiting, 429)):
                got_status, headers, got = await each
                assert (got_status, headers["retry-after"]) == (status, "1")
                assert json.loads(got)["error"]["type"] == "rate_limit_error"
            urgent = asking(here, PAID, prompt="q" * 900)
            assert (await unanswered)[0] == 429
            await until(endpoint.asked[1].hung_up.is_set)
            await endpoint.came(3)
            assert 3800 < bytes_.bytes <= 4000
            status, headers, _ = await ask(here, PAID, prompt="r" * 900)
            assert (status, headers["retry-after"]) == (429, "1")  # now it is its own that fill it
            for asked in endpoint.asked:
                asked.go.release()
            assert (await paid)[0] == 200
            (await endpoint.came(4)).go.release()
            assert (await urgent)[0] == 200
            assert b"[DONE]" in await begun.read()
            await until(lambda: bytes_.bytes == 0)
            assert failures(here) == {"displaced": 2}
            assert here.proxy.history.turned_away == {"memory": 2, "displaced": 1}
            record = here.gateway.window()
            assert (record.arrived, record.completed, record.failed, record.refused) == (5, 3, 2, 1)

    asyncio.run(main())


def test_without_priorities_a_tenant_has_its_share_of_memory():
    async def main():
        endpoint = ScriptedEndpoint(held)
        limits = {"max_held_bytes": 6000, "max_body_bytes": 3000}
        async with standing(endpoint, callers=THREE, action=ServeAction(batch_cap=1), limits=limits) as here:
            flood = []
            for count in range(6):
                flood.append(asking(here, FREE, prompt="f" * 900))
                await until(lambda n=count: here.gateway.waiting == n)
            paid = asking(here, PAID, prompt="p" * 1500)
            assert [(await each)[0] for each in flood[4:]] == [429] * 2
            await until(lambda: here.gateway.waiting == 4)
            for count in range(1, 6):
                (await endpoint.came(count)).go.release()
            assert (await paid)[0] == 200
            assert [(await each)[0] for each in flood[:4]] == [200] * 4

    asyncio.run(main())


def test_a_client_that_hangs_up_with_half_a_body_holds_nothing():
    async def main():
        async with standing(ScriptedEndpoint(answering)) as here:
            coming = asyncio.create_task(sending(here, {}, 900, asyncio.Event()))
            await until(lambda: here.proxy._held.bytes > 900)
            coming.cancel()
            with pytest.raises((asyncio.CancelledError, aiohttp.ClientError)):
                await coming
            await until(lambda: here.proxy._held.bytes == 0)

    asyncio.run(main())


@pytest.mark.parametrize("routing", [True, False])
def test_every_request_ends_once_and_nothing_is_left_behind(routing):
    """Three tenants send more than there is room for, of all weights and sizes, and every fifth hangs up."""
    draw = Random(11)
    sizes, counts = [10, 10, 400, 1500], [1, 1, 1, 2, 3, 8, 40]

    async def main():
        def script(asked):
            return ANSWER if len(asked.body["prompt"]) % 2 else [WAIT, *ANSWER]

        endpoints = [ScriptedEndpoint(script) for _ in range(2)]
        action = ServeAction(batch_cap=8, priority_routing=routing)
        limits = {"max_held_bytes": 6000, "max_body_bytes": 5000}
        async with standing(*endpoints, callers=THREE, action=action, limits=limits, max_waiting=12) as here:
            sent = []
            for number in range(150):
                headers = draw.choice([FREE, FREE, FREE, PAID, {}])
                prompt, n = "x" * (draw.choice(sizes) + number % 2), draw.choice(counts)
                sent.append(asking(here, headers, prompt=prompt, n=n))
                await asyncio.sleep(0)
                if number % 5 == 0:
                    draw.choice(sent).cancel()
                for endpoint in endpoints:
                    if number % 7 == 0:
                        for asked in endpoint.asked[-20:]:
                            asked.go.release()
            while not all(each.done() for each in sent):
                for endpoint in endpoints:
                    for asked in endpoint.asked:
                        asked.go.release()
                await asyncio.sleep(0)
            answers = await asyncio.gather(*sent, return_exceptions=True)
            statuses = [each[0] for each in answers if isinstance(each, tuple)]
            assert set(statuses) == {200, 400, 429}
            gateway = here.gateway
            await until(lambda: not gateway._in_flight)
            assert here.proxy._held.bytes == gateway.waiting == len(gateway._at_upstreams) == 0
            assert [each.running for each in gateway.upstreams] == [0, 0]
            for totals in gateway.ledger.totals:
                assert totals.arrived == totals.outcomes.total()
            record = gateway.window()
            assert record.completed + record.failed == record.arrived
            assert record.in_flight == 0

    asyncio.run(main())
