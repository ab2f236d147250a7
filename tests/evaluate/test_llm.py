"""Language models among the agents, behind a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live.endpoint_server import ChatEndpoint, Reply, chat, serving

import evaluate.experiments.showdown_report as report
from evaluate.evaluate import agent_labels, measure
from evaluate.experiments.showdown import Arguments, main
from evaluate.jobs import Setting
from evaluate.llm import play_llm
from evaluate.scores import read_scores
from llmserve_env import tasks
from llmserve_env.agents.constant import ConstantAgent
from llmserve_env.agents.find import find_agent
from llmserve_env.agents.llm_settings import llm_settings
from llmserve_env.errors import InputError
from llmserve_env.play import play
from llmserve_env.schema import ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, load_task

CHOICE = {
    "batch_cap": 64,
    "kv_budget_fraction": 0.75,
    "speculation_depth": 2,
    "quantization_tier": "INT8",
    "priority_routing": True,
}
WINDOWS = 6


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ("MODEL", "BASE_URL", "API_KEY"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


@pytest.fixture
def short(tmp_path):
    """static_workload with episodes of six windows."""
    text = (Path(tasks.__file__).parent / "static_workload.toml").read_text()
    text = text.replace("horizon_s = 300.0", "horizon_s = 6.0")
    path = tmp_path / "static_workload.toml"
    path.write_text(text)
    assert load_task(path).windows == WINDOWS
    return str(path)


@pytest.fixture
def endpoint():
    answers = ChatEndpoint(lambda i, body: chat(json.dumps(CHOICE)))
    with serving(answers) as url:
        yield answers, url


def test_a_model_scores_what_its_choices_score(short, endpoint):
    answers, url = endpoint
    task, seeds = load_task(short), list(EVALUATION_SEEDS[:2])
    found = play_llm(f"llm:tiny@{url}", task, seeds)
    same = play(ConstantAgent(ServeAction(**CHOICE), "same"), task, seeds)
    assert found.scores.tolist() == pytest.approx(same.scores.tolist(), abs=1e-12)
    assert found.requests.tolist() == same.requests.tolist()
    assert [each["calls"] for each in found.usage] == [WINDOWS, WINDOWS]
    assert {body["model"] for body in answers.requests} == {"tiny"}


def test_a_model_plays_side_by_side_and_behind_a_shield_as_agents_do(short, endpoint):
    answers, url = endpoint
    task, seeds = load_task(short), list(EVALUATION_SEEDS[:2])
    found = play(find_agent(f"llm:tiny@{url}", task), task, seeds)
    assert found.scores.tolist() == play_llm(f"llm:tiny@{url}", task, seeds).scores.tolist()
    assert len(answers.requests) == 4 * WINDOWS
    shield = find_agent(f"shielded:llm:tiny@{url}", task)
    assert shield.name == "shielded:llm:tiny"
    play(shield, task, seeds[:1])
    assert shield.windows.tolist() == [WINDOWS]


def test_a_showdown_marks_what_a_model_played(short, endpoint, tmp_path, monkeypatch):
    answers, url = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    out, plays = tmp_path / "out", f"llm:tiny@{url}?windows_per_call=3&history=2"
    arguments = Arguments(("best-constant", plays), (short,), 4, llm_episodes=2, jobs=1, out=out)
    main(arguments)
    seeds = EVALUATION_SEEDS[:4]
    scores = read_scores(out / "static_workload" / "llm-tiny.json")
    assert scores.seeds == list(seeds[:2])
    assert scores.llm["model"] == "tiny"
    assert scores.llm["endpoint"] == url
    assert (scores.llm["windows_per_call"], scores.llm["history"]) == (3, 2)
    assert scores.llm["prompt"]
    assert "sk-secret" not in (out / "static_workload" / "llm-tiny.json").read_text()
    assert [scores.usage[str(seed)]["calls"] for seed in seeds[:2]] == [2, 2]
    assert len(answers.requests) == 4
    text = (out / "showdown.md").read_text()
    assert "on the seeds named here only" in text
    row = next(line for line in text.splitlines() if "| llm:tiny | tiny |" in line)
    assert f"| 2: {seeds[0]} to {seeds[1]} |" in row
    assert row.endswith("| 4 | 0 | 440 |"), "110 tokens a call"
    assert not any(line.startswith("| llm:tiny |") for line in text.splitlines()), "in no table of all seeds"
    main(arguments)
    assert len(answers.requests) == 4, "what was played is not paid for again"
    report.main(report.Arguments(out))
    assert (out / "showdown.md").read_text() == text
    main(Arguments(("best-constant", plays), (short,), 4, llm_episodes=4, jobs=1, out=out))
    assert any(line.startswith("| llm:tiny |") for line in (out / "showdown.md").read_text().splitlines())


def test_unusable_answers_are_counted(short, tmp_path):
    with serving(ChatEndpoint(lambda i, body: chat("no idea") if i % 2 else Reply("<html>"))) as url:
        setting = Setting(task=short)
        found = measure({"m": f"llm:m@{url}?max_retries=0"}, [setting], EVALUATION_SEEDS[:1], tmp_path)
    usage = found["m", setting].usage[str(EVALUATION_SEEDS[0])]
    assert usage["fallbacks"] == {"malformed": WINDOWS // 2, "not_json": WINDOWS // 2}


def test_other_settings_are_not_gone_on_with(short, endpoint, tmp_path):
    _, url = endpoint
    measure({"m": f"llm:m@{url}"}, [Setting(task=short)], EVALUATION_SEEDS[:1], tmp_path)
    with pytest.raises(InputError) as caught:
        measure({"m": f"llm:m@{url}?history=1"}, [Setting(task=short)], EVALUATION_SEEDS[:1], tmp_path)
    assert caught.value.field == "plays"


def test_addresses():
    found = llm_settings("llm:org/model-8b@https://host/v1?temperature=null&windows_per_call=6")
    assert (found.model, found.endpoint) == ("org/model-8b", "https://host/v1")
    assert (found.temperature, found.windows_per_call) == (None, 6)
    assert agent_labels(["llm:org/m@http://h/v1?history=2", "mine=llm:m@http://h/v1?history=2"]) == {
        "llm:org/m": "llm:org/m@http://h/v1?history=2",
        "mine": "llm:m@http://h/v1?history=2",
    }
    for wrong, field in (
        ("llm:", "agents"),
        ("llm:m@http://user:password@host/v1", "agents"),
        ("llm:m@http://h/v1?api_key=x", "agents"),
        ("llm:m@http://h/v1?history=many", "history"),
        ("llm:m@http://h/v1?history=0", "history"),
        ("llm:m", "endpoint"),
    ):
        with pytest.raises(InputError) as caught:
            llm_settings(wrong)
        assert caught.value.field == field
