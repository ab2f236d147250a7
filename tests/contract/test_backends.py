"""What serves episodes: the same contract for the simulator and for a live endpoint."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve_env.actions import to_array
from llmserve_env.backend import WINDOW
from llmserve_env.errors import InputError
from llmserve_env.hardware import load_profile
from llmserve_env.live import EndpointBackend, EndpointSettings
from llmserve_env.schema import ServeAction, ServeObservation
from llmserve_env.sim.simulator import SimulatorBatch
from llmserve_env.workloads.workload import Tenant, Workload
from tests.live.endpoint_server import CompletionEndpoint, serving

WINDOW_S = 0.2
FIRST = ServeAction(batch_cap=8)
ACTION = to_array([FIRST])


def workload(requests=6):
    arrivals = np.linspace(0.0, 2 * WINDOW_S, requests, endpoint=False)
    sizes = np.full(requests, 4, np.int32)
    return Workload(arrivals, sizes, sizes, np.zeros(requests, np.int16), (Tenant("only"),))


@pytest.fixture(params=["simulator", "endpoint"])
def backend(request):
    if request.param == "simulator":
        yield SimulatorBatch(load_profile("h100-llama-3.1-8b"), [workload()], action=FIRST)
        return
    with serving(CompletionEndpoint()) as url:
        made = EndpointBackend(EndpointSettings(url, "m"), workload(), window_s=WINDOW_S, start=FIRST)
        yield made
        made.close()


def test_before_the_first_window_nothing_has_been_done(backend):
    (window,) = backend.windows
    assert window.dtype == WINDOW
    counts = [name for name in WINDOW.names if WINDOW[name] == np.int64]
    assert all(window[name] == 0 for name in counts if name not in ("engines_up",))
    assert (window["end_s"], window["engines_up"]) == (0.0, 1)
    assert all(math.isnan(window[name]) for name in ("mean_ttft_s", "p99_ttft_s", "p99_gap_s"))
    assert backend.ignored(0, ACTION[0]) == {}
    assert [len(each) for each in backend.workloads] == [6]


def test_windows_follow_each_other_until_all_is_served(backend):
    arrived = 0
    for index in range(20):
        windows = backend.serve(ACTION, WINDOW_S)
        assert windows is backend.windows
        assert windows["start_s"][0] == pytest.approx(index * WINDOW_S)
        assert windows["end_s"][0] == pytest.approx((index + 1) * WINDOW_S)
        arrived += int(windows["arrived"][0])
        if arrived == 6 and not windows["in_flight"][0]:
            break
    assert (arrived, windows["in_flight"][0]) == (6, 0)
    assert backend.stale is None


def test_a_window_is_of_those_who_are_asked(backend):
    backend.serve(ACTION, WINDOW_S)
    before = backend.windows.tobytes()
    assert backend.serve(ACTION, WINDOW_S, np.zeros(1, bool)).tobytes() == before


def test_what_it_says_is_said_by_field(backend):
    asked = ServeAction(prefill_decode_split=True)
    fields = set(ServeAction.model_fields)
    assert "prefill_decode_split" in backend.not_applied(asked)
    backend.serve(to_array([asked]), WINDOW_S)
    ignored = backend.ignored(0, to_array([asked])[0])
    assert "prefill_decode_split" in ignored
    assert all(isinstance(reason, str) and reason for reason in ignored.values())
    assert set(ignored) <= fields
    assert set(backend.capabilities()) in (set(), fields)
    assert set(backend.unmeasured) <= set(ServeObservation.model_fields)
    assert bool(backend.unmeasured) is not backend.replayable
    assert set(backend.notes()) == (set() if backend.replayable else {"live"})


def test_what_cannot_be_served_is_refused(backend):
    for actions, window_s in ((ACTION, 0.0), (ACTION, -1.0), (np.repeat(ACTION, 2), WINDOW_S)):
        with pytest.raises(InputError):
            backend.serve(actions, window_s)


def test_an_episode_begins_anew_after_a_close_too(backend):
    for close in (False, True):
        backend.serve(ACTION, WINDOW_S)
        if close:
            backend.close()
            backend.close()
        assert backend.windows["end_s"][0] == pytest.approx(WINDOW_S)
        backend.reset(0, workload(3), seed=4)
        assert backend.windows["end_s"][0] == 0.0
        assert len(backend.workloads[0]) == 3


def test_a_state_is_kept_or_the_error_says_why_not(backend):
    backend.serve(ACTION, WINDOW_S)
    if not backend.replayable:
        for call in (backend.snapshot, lambda: backend.restore(b"")):
            with pytest.raises(InputError, match="real engines"):
                call()
        return
    kept = backend.snapshot()
    first = backend.serve(ACTION, WINDOW_S).tobytes()
    backend.restore(kept)
    assert backend.serve(ACTION, WINDOW_S).tobytes() == first
