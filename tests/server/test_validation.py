"""OpenEnv's validators, and the project's own checks before a submission, against a running server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from openenv.cli._validation import validate_running_environment
from openenv.validation.graders import Subject
from openenv.validation.graders.runtime import (
    ObservationSchemaGrader,
    RewardWellFormedGrader,
    StateContractGrader,
)
from openenv.validation.runtime.collector import collect_runtime_evidence
from openenv.validation.types import CheckStatus

# OpenEnv's collector connects in a way that the websockets library of its choice no longer likes.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")

ROOT = Path(__file__).parents[2]
GRADERS = (RewardWellFormedGrader(), ObservationSchemaGrader(), StateContractGrader())
SERVER_CHECKS = (
    "/health /metadata /schema /tasks",
    "/reset /step /state /log /grader",
    "the same seed, the same episode",
    "errors 404 409 413 422",
    "/mcp",
    "/baseline",
    "/ws",
    "openenv validate --url",
    "OpenEnv's runtime graders",
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of scripts/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import checkout_checks
    import checks
    import pre_submission_check
    import server_checks

    return SimpleNamespace(
        checkout=checkout_checks, checks=checks, server=server_checks, pre_submission=pre_submission_check
    )


@pytest.fixture
def subject(scripts: SimpleNamespace, server_url: str) -> Subject:
    """A server that OpenEnv's collector has played the shipped plan on."""
    manifest, plan = scripts.checkout.read_manifest(ROOT)
    evidence = collect_runtime_evidence(server_url, plan, episode_timeout_s=60)
    assert evidence.failure_reason is None
    outputs = {"image_ref": None, "running": None, "outputs_dir": ROOT}
    return Subject(root=ROOT, manifest=manifest, runtime_evidence=evidence, **outputs)


def test_validate_url_finds_an_openenv_server(server_url):
    report = validate_running_environment(server_url)
    assert [found["id"] for found in report["criteria"] if not found["passed"]] == []
    assert report["summary"]["total_count"] == 6
    assert report["mode"] == "simulation"


@pytest.mark.parametrize("grader", GRADERS, ids=lambda grader: grader.check_id)
def test_runtime_grader_passes(subject, grader):
    result = grader.run(subject)
    assert result.status is CheckStatus.PASS, result.evidence


def test_the_graders_would_notice(subject):
    manifest = subject.manifest
    narrow = manifest.model_copy(update={"reward": manifest.reward.model_copy(update={"range": (0.0, 1e-6)})})
    assert RewardWellFormedGrader().run(replace(subject, manifest=narrow)).status is CheckStatus.FAIL
    exchanges = subject.runtime_evidence.exchanges
    lost = replace(subject.runtime_evidence, exchanges=exchanges[:2] + exchanges[4:])  # a step and its state
    assert StateContractGrader().run(replace(subject, runtime_evidence=lost)).status is CheckStatus.FAIL
    renamed = (row.response_json.replace("queue_depth", "depth") for row in exchanges)
    rows = tuple(replace(row, response_json=text) for row, text in zip(exchanges, renamed, strict=True))
    wrong = replace(subject.runtime_evidence, exchanges=rows)
    assert ObservationSchemaGrader().run(replace(subject, runtime_evidence=wrong)).status is CheckStatus.FAIL


@pytest.mark.parametrize("name", SERVER_CHECKS)
def test_the_server_passes_the_check(scripts, server_url, name):
    checks = dict(scripts.server.server_checks(server_url, ROOT))
    assert checks[name]()


def test_every_check_is_tested(scripts):
    # The page has tests of its own, in a browser.
    names = [name for name, _ in scripts.server.server_checks("http://127.0.0.1", ROOT)]
    assert set(names) == {*SERVER_CHECKS, "/web and /docs"}


def test_a_failed_check_does_not_stop_the_others(scripts, capsys):
    def fails() -> str:
        raise scripts.checks.Problem("port 80 is taken")

    def breaks() -> str:
        raise KeyError("reward")

    rows = scripts.checks.run_checks([("a", fails), ("b", breaks), ("c", lambda: "well")])
    assert [(row.name, row.passed) for row in rows] == [("a", False), ("b", False), ("c", True)]
    lines = capsys.readouterr().out.splitlines()
    assert "port 80 is taken" in lines[0]
    assert "KeyError: 'reward'" in lines[1]


def test_the_exit_status_says_that_a_check_failed(scripts, capsys):
    nobody = scripts.pre_submission.Arguments(space_url="http://127.0.0.1:9")
    assert scripts.pre_submission.main(nobody) == 1
    assert "0 of 10 checks pass" in capsys.readouterr().out
