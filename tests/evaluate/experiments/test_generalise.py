"""What a policy keeps elsewhere: fits to real traffic, the search for another constant, and the report."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evaluate.experiments.generalise as module
from evaluate.constants import first_tries, search_constants
from evaluate.evaluate import measure
from evaluate.experiments.generalise import Arguments, main
from evaluate.experiments.generalise_report import CONSTANT, Place, advantage_kept, rows_of
from evaluate.fit import SEEDS, fit_servegen, fit_trace, mean_load, tokens, write_tenants
from evaluate.jobs import Setting
from evaluate.scores import setting_name
from llmserve_env.actions import to_action
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.tuned import tuned_constant
from llmserve_env.errors import InputError
from llmserve_env.play import play
from llmserve_env.report.stats import Interval, paired_difference
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import TRAINING_SEEDS, load_task
from llmserve_env.workloads import open_workload

OWN = Setting(task="static_workload")
TASK = load_task("static_workload")


def test_an_agent_keeps_all_of_its_advantage_where_nothing_changed():
    mine, base = np.array([0.5, 0.7, 0.9, 0.6]), np.array([0.4, 0.5, 0.8, 0.3])
    assert advantage_kept((mine, base), (mine, base)) == Interval(1.0, 1.0, 1.0)


def test_the_share_kept_is_of_means_and_of_pairs():
    base = np.zeros(4)
    own = np.array([0.1, 0.2, 0.3, 0.4])
    found = advantage_kept((own / 2 + 0.5, base + 0.5), (own, base))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    lost = advantage_kept((base - 0.05, base), (own, base))
    assert lost.estimate == pytest.approx(-0.2)
    assert lost.low < -0.2 < lost.high < 0
    assert advantage_kept((own, base), (np.array([0.1, -0.2, 0.1, 0.1]), base)) is None


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rng = np.random.default_rng(0)
    rows = [f"{i * 0.5},{rng.integers(100, 3000)},{rng.integers(10, 500)}" for i in range(2000)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    return path


def test_a_trace_is_played_at_the_tasks_load_by_its_tenants(trace, tmp_path):
    task = load_task("bursty_workload")
    fit = fit_trace(task, trace, write_tenants(task, tmp_path / "tenants"))
    assert fit.stretches * fit.pace * tokens(open_workload(str(trace))) / 1000 == pytest.approx(
        mean_load(task), rel=0.01
    )
    assert fit.stretches == 7
    changed = load_task("bursty_workload", workload=fit.workload, horizon_s=500.0)
    assert changed.tenants == task.tenants
    parts = [changed.requests(seed) for seed in range(3)]
    assert len({part.prompt_tokens.tobytes() for part in parts}) == 3, "other stretches for other seeds"
    assert sum(map(tokens, parts)) / 1500 == pytest.approx(mean_load(task), rel=0.05)
    part = parts[0]
    of = {tenant.name: part.tenant == i for i, tenant in enumerate(part.tenants)}
    assert part.prompt_tokens[of["writing"]].mean() < part.prompt_tokens[of["chat"]].mean()
    assert set(np.unique(part.tenant)) >= {0, 2}


def test_clients_are_played_at_the_tasks_load(tmp_path):
    clients, quantiles = tmp_path / "clients.csv", tmp_path / "quantiles.csv"
    head = "client,window_start_s,rate_rps,cv,pattern,shape,scale"
    rows = [f"{client},{600 * i},{20 + i},1,Gamma,1,1" for i in range(100) for client in (0, 1)]
    clients.write_text("\n".join([head, *rows]))
    laws = [
        f"m,{client},1,{name},1,50,{100 * (client + 1)},200,250,300"
        for client in (0, 1)
        for name in ("input_tokens", "output_tokens")
    ]
    quantiles.write_text("\n".join(["model,client,rate,field,mean,p10,p50,p90,p99,max", *laws]))
    fit = fit_servegen(TASK, clients, quantiles, "m", write_tenants(TASK, tmp_path / "tenants"))
    changed = load_task("static_workload", workload=fit.workload)
    drawn = [changed.requests(seed) for seed in range(20)]
    load = sum(map(tokens, drawn)) / (20 * TASK.horizon_s)
    assert load == pytest.approx(mean_load(TASK), rel=0.3), "the mean of the table; stretches differ"
    assert len({len(each) for each in drawn}) > 10


def test_tenants_of_a_task_are_written_with_what_they_send(tmp_path):
    task = load_task("adversarial_multitenant")
    mix = write_tenants(task, tmp_path)
    before = mix.stat().st_mtime_ns
    workload = open_workload(f"poisson://?requests=20000&tenants={mix}")
    drawn = [task.requests(seed) for seed in SEEDS]
    shares = sum(np.bincount(each.tenant, minlength=5) for each in drawn) / sum(map(len, drawn))
    assert np.bincount(workload.tenant, minlength=5) / 20000 == pytest.approx(shares, abs=0.01)
    assert workload.tenants == task.tenants
    assert write_tenants(task, tmp_path).stat().st_mtime_ns == before


def test_tries_begin_with_what_was_tuned_and_lie_on_the_grid():
    tries = first_tries(TASK, 20)
    assert len(tries) == 20
    assert to_action(tries[0]) == tuned_constant("static_workload")
    assert to_action(tries[1]) == TASK.start
    assert (TASK.grid.actions(TASK.grid.indices(tries[1:])) == tries[1:]).all()
    changed = [sum(row[name] != tries[0][name] for name in row.dtype.names) for row in tries[2:12]]
    assert max(changed) <= 2


def test_a_constant_is_searched_on_training_seeds_and_scored_on_others(tmp_path):
    setting, seeds = Setting(task="static_workload", load=2.0), list(TRAINING_SEEDS[900:903])
    found = search_constants([setting], seeds, 8, tmp_path)[setting]
    task = setting.open()
    played = play(ConstantAgent(ServeAction(**found.action), "c"), task, seeds)
    assert found.scores.tolist() == played.scores.tolist()
    tuned = play(ConstantAgent(tuned_constant(task.id), "c"), task, range(12)).scores.mean()
    assert found.tuning_score >= tuned, "it was among them"
    (path,) = tmp_path.glob("*.json")
    state = json.loads(path.read_text())
    state["scores"][str(seeds[0])] = 0.5
    path.write_text(json.dumps(state))
    again = search_constants([setting], seeds, 8, tmp_path)[setting]
    assert again.scores[0] == 0.5, "nothing is searched twice"
    with pytest.raises(InputError, match="another setting, size or version"):
        search_constants([setting], seeds, 4, tmp_path)


def test_every_place_has_a_file_of_its_own():
    places = [
        *(Setting(task="static_workload", load=load) for load in (0.5, 0.75, 1.0, 1.5, 2.0)),
        *(Setting(task="static_workload", profile=f"h100-llama-{size}") for size in ("3.1-8b", "3.3-70b")),
        Setting(task="static_workload", workload="poisson://?rate=1"),
    ]
    assert len({setting_name(place) for place in places}) == len(places)
    assert setting_name(places[5]) == "static_workload@profile=h100-llama-3.1-8b"


def test_rows_compare_with_the_carried_constant(tmp_path):
    seeds = list(TRAINING_SEEDS[900:904])
    places = [Place("the task itself", OWN), Place("half", Setting(task="static_workload", load=0.5))]
    agents = {CONSTANT: CONSTANT, "one": "defaults", "two": "random"}
    found = measure(agents, [place.setting for place in places], seeds, tmp_path, official=False)
    own, half = rows_of(places, found, {}, ["one", "two"], seeds)
    mean = (found["one", OWN].of(seeds) + found["two", OWN].of(seeds)) / 2
    assert own.gain == paired_difference(mean, found[CONSTANT, OWN].of(seeds))
    assert own.kept is None, "they are behind the constant: there is nothing to keep"
    assert half.gains["one"] == paired_difference(
        found["one", places[1].setting].of(seeds), found[CONSTANT, places[1].setting].of(seeds)
    )
    assert rows_of(places, found, {}, ["one", "nobody"], seeds) == []


def test_the_report_is_written_and_goes_on(trace, tmp_path, capsys, monkeypatch):
    arguments = Arguments(
        policies=("one=reactive",),
        references=("defaults",),
        tasks=("static_workload",),
        azure=trace,
        profiles=("rtxpro6000-llama-3.1-8b", "h100-llama-3.1-8b"),
        loads=(1.0, 2.0),
        episodes=2,
        constants=4,
        jobs=1,
        out=tmp_path / "out",
        first_seed=900,
        other_seeds=True,
    )
    main(arguments)
    text = (tmp_path / "out" / "generalise.md").read_text()
    output = capsys.readouterr()
    assert text in output.out
    assert "without --mooncake" in output.err
    assert "not seeds of evaluation" in text
    labels = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    places = ["the task itself", "2 times the load", "on h100-llama-3.1-8b", "traffic of Azure"]
    assert [label for label in labels if label in places] == [*places, *places, places[-1]]
    assert str(tmp_path) not in text + (tmp_path / "out" / "generalise.json").read_text()
    assert (tmp_path / "out" / "generalise.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "out" / "generalise.json").read_text())
    rows = content["tasks"]["static_workload"]
    assert [row["place"] for row in rows] == places
    assert rows[3]["fit"]["stretches"] == 2

    def no_search(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr("evaluate.constants._search", no_search)
    main(arguments)
    assert (tmp_path / "out" / "generalise.md").read_text() == text
    with pytest.raises(InputError) as caught:
        main(module.Arguments(**{**vars(arguments), "servegen": trace}))
    assert caught.value.field == "servegen_lengths"
