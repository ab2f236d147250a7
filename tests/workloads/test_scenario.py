"""Scenarios: regimes, spikes and sessions as declared, streams of their own, and what is refused."""

from __future__ import annotations

import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve_env.commands.workload import workload as describe_command
from llmserve_env.errors import InputError
from llmserve_env.workloads import open_workload, parameters, parse_scenario
from llmserve_env.workloads.generators.conversations import Conversations

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "workloads.md"
ARRAYS = ("arrival_s", "prompt_tokens", "output_tokens", "tenant", "prefix_offsets", "prefix_ids")

PLAIN = """
[tenants.premium]
slo = "mlperf-llama-3.1-8b-interactive"
lengths = "azure-conv"
shape = 0.5
weight = 3.0
[tenants.batch]
slo = "mooncake"
lengths = "arxiv-summarization"
[[regimes]]
name = "calm"
dwell_s = [120, 240]
rates = { premium = 2.0, batch = 1.0 }
[[regimes]]
name = "rush"
dwell_s = [60, 120]
rates = { premium = 8.0 }
[[regimes]]
name = "night"
dwell_s = [30, 60]
rates = {}
"""

SESSIONS = """
[tenants.first]
sessions = { turns = 4, think = 5, system = 64, context = 4096 }
[tenants.plain]
lengths = "fixed:100,10"
[tenants.second]
sessions = { turns = 3, think = 10, system = 40 }
[[regimes]]
name = "day"
dwell_s = [100, 200]
rates = { first = 4.0, plain = 3.0, second = 2.0 }
[[regimes]]
name = "pause"
dwell_s = [100, 200]
rates = {}
"""


def table(text: str) -> dict:
    return tomllib.loads(text)


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def of_tenant(workload, index: int):
    return workload.take(np.flatnonzero(workload.tenant == index))


def seconds_in(scenario, seed: int, duration_s: float) -> tuple[np.ndarray, list[str]]:
    """Edges of the visits, up to the end, and their regimes."""
    starts, names = zip(*scenario.timeline(seed, duration_s), strict=True)
    return np.array([*starts, duration_s]), list(names)


def test_tenants_are_those_of_the_table():
    scenario = parse_scenario(table(PLAIN))
    premium, batch = scenario.tenants
    assert (premium.name, premium.ttft_slo_s, premium.tpot_slo_s, premium.weight) == ("premium", 0.5, 0.03, 3)
    assert (batch.name, batch.ttft_slo_s) == ("batch", 30.0)
    workload = scenario.sample(0, 600)
    assert workload.tenants is scenario.tenants
    assert workload.source == ""
    assert workload.prefix_block_tokens == 0
    assert np.median(of_tenant(workload, 1).prompt_tokens) > 2000, "arXiv papers"


@pytest.mark.parametrize("order", ["shuffled", "cycle"])
def test_rates_and_stays_are_those_of_the_regimes(order):
    scenario, duration_s = parse_scenario({"order": order, **table(PLAIN)}), 100_000.0
    edges, names = seconds_in(scenario, 5, duration_s)
    workload = scenario.sample(5, duration_s)
    counts = {index: np.histogram(of_tenant(workload, index).arrival_s, edges)[0] for index in range(2)}
    for regime in scenario.regimes:
        visits = np.array(names) == regime.name
        stays = np.diff(edges)[visits]
        whole = stays[:-1]  # the last one is cut
        assert regime.dwell_s[0] <= whole.min() < whole.max() <= regime.dwell_s[1]
        assert whole.mean() == pytest.approx(regime.mean_dwell_s, rel=0.05)
        for index, rate in enumerate(regime.rates_rps):
            expected = rate * stays.sum()
            # 4 standard deviations of Gamma gaps of shape 0.5: variance is twice the mean
            assert counts[index][visits].sum() == pytest.approx(expected, abs=4 * (2 * expected) ** 0.5)
    np.testing.assert_allclose(np.bincount(workload.tenant) / duration_s, scenario.mean_rates_rps, rtol=0.03)


def test_gaps_have_their_shape():
    text = '[tenants.a]\nshape = 0.25\n[[regimes]]\nname = "r"\ndwell_s = [9, 9]\nrates = { a = 20 }\n'
    gaps = np.diff(parse_scenario(table(text)).sample(0, 5000).arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(2, rel=0.03)


def test_each_cycle_is_shuffled():
    scenario = parse_scenario(table(PLAIN))
    names = [name for _, name in scenario.timeline(0, 50_000)]
    cycles = [tuple(names[i : i + 3]) for i in range(0, len(names) - 3, 3)]
    assert all(sorted(cycle) == ["calm", "night", "rush"] for cycle in cycles)
    assert len(set(cycles)) == 6


def test_a_cycle_keeps_the_listed_order_from_any_regime():
    scenario = parse_scenario({"order": "cycle", **table(PLAIN)})
    listed = ["calm", "rush", "night"]
    firsts = set()
    for seed in range(20):
        names = [name for _, name in scenario.timeline(seed, 1000)]
        first = listed.index(names[0])
        firsts.add(first)
        assert names == [listed[(first + i) % 3] for i in range(len(names))]
    assert firsts == {0, 1, 2}


def test_spikes_come_to_all_tenants_at_once():
    text = PLAIN.replace("rates = { premium = 2.0, batch = 1.0 }", "rates = { premium = 20, batch = 20 }")
    text = text.replace(
        "dwell_s = [120, 240]",
        "dwell_s = [3000, 3000]\nspikes = { every_s = 60, length_s = 5, factor = 6 }",
        1,
    )
    scenario = parse_scenario({"order": "cycle", **table(text)})
    onsets = set()
    for seed in range(12):
        edges, names = seconds_in(scenario, seed, 4000)
        visit = names.index("calm")
        if edges[visit + 1] - edges[visit] < 2999:
            continue
        workload = scenario.sample(seed, 4000)
        found = []
        for index in range(2):
            since = of_tenant(workload, index).arrival_s - edges[visit]
            since = since[(since >= 0) & (since < 3000)]
            folded = np.bincount((since % 60).astype(int), minlength=60) / 50
            around = np.convolve(np.r_[folded, folded[:4]], np.ones(5), "valid") / 5
            onset = int(around.argmax())
            assert around.max() == pytest.approx(120, rel=0.2), "five seconds of six times the rate"
            beside = np.delete(np.roll(folded, -onset), [*range(6), 59])
            assert beside.mean() == pytest.approx(20, rel=0.1), "the rate between spikes is as declared"
            found.append(onset)
        assert (found[0] - found[1] + 30) % 60 - 30 in (-1, 0, 1)
        onsets.add(found[0])
    assert len(onsets) > 4, "the seed draws when they come"


def test_spikes_count_in_the_mean_rate():
    text = '[tenants.a]\n[[regimes]]\nname = "r"\ndwell_s = [7, 19]\nrates = { a = 10 }\n'
    text += "spikes = { every_s = 6, length_s = 1.5, factor = 5 }\n"
    scenario = parse_scenario(table(text))
    assert scenario.mean_rates_rps.tolist() == [20.0]
    assert len(scenario.sample(1, 20_000)) == pytest.approx(400_000, rel=0.01)


@pytest.mark.parametrize("text", [PLAIN, SESSIONS])
def test_one_seed_is_one_workload(text):
    one, other = parse_scenario(table(text)), parse_scenario(table(text))
    assert same(one.sample(7, 900), other.sample(7, 900))
    assert one.timeline(7, 900) == other.timeline(7, 900)
    assert not np.array_equal(one.sample(7, 900).arrival_s, one.sample(8, 900).arrival_s)
    assert one.timeline(7, 900) != one.timeline(8, 900)


@pytest.mark.parametrize("text", [PLAIN, SESSIONS])
def test_a_longer_duration_only_appends(text):
    scenario = parse_scenario(table(text))
    long = scenario.sample(3, 2000)
    assert (long.arrival_s < 2000).all()
    for duration_s in (150, 400, 1111.5):
        short = scenario.sample(3, duration_s)
        assert len(short) == (long.arrival_s < duration_s).sum()
        assert same(short, long.take(np.arange(len(short))))
        timeline = scenario.timeline(3, duration_s)
        assert timeline == scenario.timeline(3, 2000)[: len(timeline)]


@pytest.mark.parametrize("text", [PLAIN, SESSIONS])
def test_a_tenant_leaves_the_others_as_they_are(text):
    changed = table(text)
    first, *others = changed["tenants"]
    changed["tenants"][first]["lengths"] = "fixed:7,8"
    for regime in changed["regimes"]:
        regime["rates"][first] = 5.5
    before, after = (parse_scenario(each).sample(4, 900) for each in (table(text), changed))
    assert not np.array_equal(of_tenant(before, 0).arrival_s, of_tenant(after, 0).arrival_s)
    for index, _ in enumerate(others, start=1):
        assert len(of_tenant(before, index)) > 100
        assert same(of_tenant(before, index), of_tenant(after, index))


def test_sessions_share_prefixes_among_their_turns_alone():
    workload = parse_scenario(table(SESSIONS)).sample(2, 600)
    assert workload.prefix_block_tokens == 16
    blocks = [
        workload.prefix_ids[low:high].tolist()
        for low, high in zip(workload.prefix_offsets[:-1], workload.prefix_offsets[1:], strict=True)
    ]
    system_blocks = {0: 4, 1: 0, 2: 2}  # full blocks of 64 and 40 tokens
    systems: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
    owners: dict[int, tuple[int, int]] = {}
    turns: dict[tuple[int, int], list[int]] = {}
    for i, ids in enumerate(blocks):
        tenant = int(workload.tenant[i])
        assert len(ids) == (0 if tenant == 1 else workload.prompt_tokens[i] // 16)
        shared = system_blocks[tenant]
        systems[tenant].add(tuple(ids[:shared]))
        if len(ids) > shared:
            session = (tenant, ids[shared])
            turns.setdefault(session, []).append(i)
            assert all(owners.setdefault(block, session) == session for block in ids[shared:])
    assert [len(each) for each in systems.values()] == [1, 1, 1]
    assert not set(*systems[0]) & set(*systems[2]), "each tenant has a system prompt of its own"
    assert not (set(*systems[0]) | set(*systems[2])) & set(owners)
    assert max(map(len, turns.values())) > 4
    for session in turns.values():
        longer = workload.prompt_tokens[session]
        assert (np.diff(longer) > 0).all()
        for before, after in pairwise(session):
            assert blocks[after][: len(blocks[before])] == blocks[before]


def test_sessions_keep_the_rate_and_spill_over():
    text = SESSIONS.replace("dwell_s = [100, 200]", "dwell_s = [300, 300]")
    scenario = parse_scenario({"order": "cycle", **table(text)})
    early, late, after, silent = [], [], [], 0
    for seed in range(60):
        arrival_s = of_tenant(scenario.sample(seed, 600), 0).arrival_s
        if scenario.timeline(seed, 600)[0][1] == "day":
            early.append((arrival_s < 60).sum())
            late.append(((arrival_s >= 200) & (arrival_s < 260)).sum())
            after.append(((arrival_s >= 300) & (arrival_s < 315)).sum())
            silent += (arrival_s > 560).sum()
        else:
            assert arrival_s.min() >= 300, "no session begins before a silent regime"
    assert len(early) > 15
    assert np.mean(early) == pytest.approx(240, rel=0.1), "sessions of before the start"
    assert np.mean(late) == pytest.approx(240, rel=0.1)
    assert np.mean(after) > 15, "later turns come in the next regime"
    assert silent == 0


def test_plain_tenants_and_silence():
    text = '[tenants.a]\n[[regimes]]\nname = "off"\ndwell_s = [5, 5]\nrates = {}\n'
    nothing = parse_scenario(table(text))
    assert len(nothing.sample(0, 60)) == 0
    assert nothing.mean_rates_rps.tolist() == [0.0]
    assert nothing.timeline(0, 12) == [(0.0, "off"), (5.0, "off"), (10.0, "off")]
    quiet = parse_scenario(table(text.replace("[tenants.a]", "[tenants.a]\nsessions = {}"))).sample(0, 60)
    assert (len(quiet), quiet.prefix_block_tokens, len(quiet.prefix_ids)) == (0, 16, 0)


def test_scaled_multiplies_all_rates():
    scenario = parse_scenario(table(SESSIONS))
    np.testing.assert_allclose(scenario.scaled(2.5).mean_rates_rps, 2.5 * scenario.mean_rates_rps)
    assert scenario.scaled(2.5).timeline(1, 900) == scenario.timeline(1, 900)
    assert same(scenario.scaled(1.0).sample(1, 900), scenario.sample(1, 900))
    with pytest.raises(InputError, match="factor > 0"):
        scenario.scaled(0)


@pytest.mark.parametrize("duration_s", [0, -1, float("inf"), float("nan"), 1e9])
def test_a_duration_that_cannot_be_covered_is_refused(duration_s):
    with pytest.raises(InputError) as caught:
        parse_scenario(table(PLAIN)).sample(0, duration_s)
    assert caught.value.field == "duration"


@settings(max_examples=60)
@given(
    rates=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=4),
    stay=st.tuples(st.floats(1, 60), st.floats(0, 60)),
    every=st.floats(1, 40),
    part=st.floats(0.01, 0.99),
    factor=st.floats(0.1, 20),
    seed=st.integers(0, 2**63),
    duration=st.floats(0.1, 200),
)
def test_any_regimes_give_a_valid_workload(rates, stay, every, part, factor, seed, duration):
    spikes = {"every_s": every, "length_s": part * every, "factor": factor}
    regimes = [
        {"name": str(i), "dwell_s": [stay[0], sum(stay)], "rates": {"a": a, "b": b}, "spikes": spikes}
        for i, (a, b) in enumerate(rates)
    ]
    scenario = parse_scenario({"tenants": {"a": {}, "b": {"sessions": {"think": 1}}}, "regimes": regimes})
    short, long = scenario.sample(seed, duration), scenario.sample(seed, 2 * duration)
    assert same(short, long.take(np.arange(len(short))))
    assert len(short) == (long.arrival_s < duration).sum()


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ("[tenants.premium]", 'order = "random"\n[tenants.premium]', "order", "shuffled, cycle"),
        ("[tenants.premium]", "orders = 1\n[tenants.premium]", "orders", "expected one of order, tenants"),
        ("shape = 0.5", "shape = 0", "tenants.premium.shape", "expected a number >= 0.01, found 0"),
        ("shape = 0.5", "shape = true", "tenants.premium.shape", "expected a number"),
        ("shape = 0.5", "shape = nan", "tenants.premium.shape", "expected a number"),
        ("shape = 0.5", "shpe = 0.5", "tenants.premium.shpe", "expected one of shape, sessions, slo"),
        ("shape = 0.5", "share = 0.5", "tenants.premium.share", "expected one of shape, sessions, slo"),
        ("shape = 0.5", "priority = 0.5", "tenants.premium.priority", "a whole number"),
        ("shape = 0.5", "shape = 1\nsessions = {}", "tenants.premium.shape", "beside sessions"),
        ("shape = 0.5", "sessions = 3", "tenants.premium.sessions", "expected a table, found 3"),
        ("shape = 0.5", "sessions = { rate = 1 }", "tenants.premium.sessions.rate", "expected one of turns"),
        (
            "shape = 0.5",
            "sessions = { block = 8 }",
            "tenants.premium.sessions.block",
            "expected one of turns",
        ),
        ("shape = 0.5", "sessions = { turns = 0.5 }", "tenants.premium.sessions.turns", "a number >= 1"),
        ("shape = 0.5", 'sessions = { think = "9" }', "tenants.premium.sessions.think", "found '9'"),
        ("shape = 0.5", "sessions = { system = 1.5 }", "tenants.premium.sessions.system", "a whole number"),
        ("shape = 0.5", "sessions = { context = 512 }", "tenants.premium.sessions.context", "than system"),
        ('slo = "mooncake"', 'slo = "none"', "tenants.batch.slo", "expected one of mlperf"),
        ('"arxiv-summarization"', '"none"', "tenants.batch.lengths", "expected azure-conv"),
        ('"arxiv-summarization"', '"absent.csv"', "tenants.batch.lengths", "absent.csv: cannot be read"),
        ('name = "rush"', 'name = "calm"', "regimes[1].name", "found 'calm' again"),
        ('name = "rush"', 'name = ""', "regimes[1].name", "expected a name"),
        ('name = "rush"\n', "", "regimes[1].name", "is missing"),
        ('name = "rush"', 'title = "rush"', "regimes[1].title", "expected one of name, dwell_s"),
        ("dwell_s = [60, 120]\n", "", "regimes[1].dwell_s", "is missing"),
        ("dwell_s = [60, 120]", "dwell_s = 60", "regimes[1].dwell_s", "expected [shortest, longest]"),
        ("dwell_s = [60, 120]", "dwell_s = [60]", "regimes[1].dwell_s", "expected [shortest, longest]"),
        ("dwell_s = [60, 120]", "dwell_s = [60, 50]", "regimes[1].dwell_s", "found [60, 50]"),
        ("dwell_s = [60, 120]", "dwell_s = [0, 50]", "regimes[1].dwell_s", "1 <= shortest"),
        ("dwell_s = [60, 120]", "dwell_s = [60, inf]", "regimes[1].dwell_s", "found [60, inf]"),
        ("dwell_s = [60, 120]", 'dwell_s = ["6", 9]', "regimes[1].dwell_s", "found ['6', 9]"),
        ("rates = { premium = 8.0 }\n", "", "regimes[1].rates", "is missing"),
        ("rates = { premium = 8.0 }", "rates = 8.0", "regimes[1].rates", "expected a table, found 8.0"),
        (
            "{ premium = 8.0 }",
            "{ premum = 8.0 }",
            "regimes[1].rates.premum",
            "expected one of premium, batch",
        ),
        ("{ premium = 8.0 }", "{ premium = -1 }", "regimes[1].rates.premium", "a number >= 0, found -1"),
        ("{ premium = 8.0 }", "{ premium = inf }", "regimes[1].rates.premium", "found inf"),
        ("{ premium = 8.0 }", '{ premium = "8" }', "regimes[1].rates.premium", "found '8'"),
    ],
)
def test_a_bad_table_is_named(old, new, field, reason):
    assert old in PLAIN
    with pytest.raises(InputError) as caught:
        parse_scenario(table(PLAIN.replace(old, new, 1)))
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("spikes", "field", "reason"),
    [
        (6, "spikes", "expected a table"),
        ({"every_s": 60, "length_s": 5}, "spikes.factor", "is missing"),
        ({"every_s": 60, "length_s": 5, "factor": 0}, "spikes.factor", "expected a number > 0, found 0"),
        ({"every_s": 60, "length_s": 60, "factor": 2}, "spikes.length_s", "expected a number < every_s (60)"),
        ({"every_s": 60, "length_s": 0, "factor": 2}, "spikes.length_s", "expected a number > 0"),
        ({"every_s": 0.5, "length_s": 0.1, "factor": 2}, "spikes.every_s", "expected a number >= 1"),
        ({"every_s": 60, "length_s": 5, "factor": 2, "at": 3}, "spikes.at", "expected one of every_s"),
    ],
)
def test_bad_spikes_are_named(spikes, field, reason):
    entry = table(PLAIN)
    entry["regimes"][0]["spikes"] = spikes
    with pytest.raises(InputError) as caught:
        parse_scenario(entry)
    assert caught.value.field == f"regimes[0].{field}"
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tenants": {}}, "tenants"),
        ({"tenants": [1]}, "tenants"),
        ({"tenants": {"premium": 1, "batch": {}}}, "tenants.premium"),
        ({"regimes": []}, "regimes"),
        ({"regimes": {"name": "calm"}}, "regimes"),
        ({"regimes": "calm"}, "regimes"),
        ({"regimes": [3]}, "regimes[0]"),
        ({"order": []}, "order"),
    ],
)
def test_a_table_of_another_form_is_named(change, field):
    with pytest.raises(InputError) as caught:
        parse_scenario({**table(PLAIN), **change})
    assert caught.value.field == field


@pytest.mark.parametrize("missing", ["tenants", "regimes"])
def test_a_missing_part_is_named(missing):
    entry = table(PLAIN)
    del entry[missing]
    with pytest.raises(InputError, match="is missing") as caught:
        parse_scenario(entry)
    assert caught.value.field == missing


def test_parsing_changes_nothing_in_the_table():
    entry = table(SESSIONS)
    before = deepcopy(entry)
    parse_scenario(entry)
    assert entry == before


@pytest.mark.parametrize("header", [False, True])
def test_a_file_has_an_address(tmp_path, capsys, header):
    path, text = tmp_path / "day.toml", PLAIN
    if header:
        text = text.replace("[tenants.", "[workload.tenants.").replace("[[regimes]]", "[[workload.regimes]]")
        text = f"[cell]\nprofile = 'any'\n{text}"
    path.write_text(text)
    workload = open_workload(f"scenario://{path}?duration=900&scale=1.5", seed=9)
    assert same(workload, parse_scenario(table(PLAIN)).scaled(1.5).sample(9, 900))
    again = open_workload(workload.source)
    assert again.source == workload.source
    assert same(again, workload)
    assert len(open_workload(f"scenario://{path}")) == len(parse_scenario(table(PLAIN)).sample(0, 600))
    describe_command(f"scenario://{path}")
    assert "rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("query", "text", "field", "reason"),
    [
        ("rate=1", PLAIN, "rate", "expected one of duration, seed, scale"),
        ("scale=0", PLAIN, "scale", "expected a number > 0"),
        ("duration=0", PLAIN, "duration", "expected a number > 0"),
        ("duration=1e12", PLAIN, "duration", "at most 100,000,000 are drawn"),
        ("duration=1", PLAIN.replace("{ premium", "{ batch = 0.0 } # "), "duration", "no request arrives"),
        ("seed=0", PLAIN.replace("slo", "sla"), "tenants.premium.sla", "expected one of"),
        ("seed=0", "workload = 3", None, "expected a table, found 3"),
        ("seed=0", "[a", None, "cannot be read as TOML"),
    ],
)
def test_what_an_address_cannot_mean_is_said(tmp_path, query, text, field, reason):
    path = tmp_path / "day.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        open_workload(f"scenario://{path}?{query}")
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_an_address_needs_a_file():
    with pytest.raises(InputError, match=r"scenario://FILE\.toml"):
        open_workload("scenario://")


def test_the_documented_table_is_a_scenario():
    section = DOCUMENT.read_text().split("## Scenarios")[1].split("\n## ")[0]
    scenario = parse_scenario(table(section.split("```toml\n")[1].split("```")[0])["workload"])
    assert len(scenario.sample(0, 600)) > 1000
    for name in parameters.names(Conversations):
        assert f"`{name}`" in section
