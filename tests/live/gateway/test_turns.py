"""Where a request goes while all upstreams are well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.live.gateway.admission.turns import Turns
from llmserve_env.live.servers.choice import choose
from llmserve_env.live.servers.upstreams import Upstream
from llmserve_env.schema import ServeAction

UPSTREAMS = st.lists(
    st.tuples(
        st.integers(0, 20),  # running
        st.integers(1, 3),  # engines
        st.sampled_from([None, 0.2, 0.9]),  # of its KV cache
        st.booleans(),  # whether it drains
    ),
    min_size=1,
    max_size=4,
)


@given(UPSTREAMS, st.permutations(range(4)), st.sampled_from([1.0, 0.5]))
def test_it_is_the_one_that_the_rules_for_all_cases_choose(given_, turns, budget):
    usages, pool = {}, []
    for (running, engines, usage, drains), turn in zip(given_, turns, strict=False):
        upstream = Upstream("http://127.0.0.1:1", engines=engines, running=running, turn=turn)
        upstream.health.draining = drains
        usages[upstream] = usage
        pool.append(upstream)
    action = ServeAction(batch_cap=8, kv_budget_fraction=budget)

    def has_room(each):
        return each.running < 8 * each.engines and (budget >= 1 or (usages[each] or 0.0) < budget)

    assert Turns(pool, action, usages.get, 0.0).free() is choose(pool, has_room, 0.0)
