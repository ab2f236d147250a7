"""`llmserve bench`: what it counts and what it refuses; its timings are for benchmarks/."""

from __future__ import annotations

import pytest

from llmserve_env.cli import main
from llmserve_env.commands.bench import _replay


def test_replay_serves_every_request():
    row = _replay("h100-llama-3.1-8b", "poisson://?rate=5&requests=200&seed=1", 1000, 2, 1)
    assert (row["requests"], row["engines"]) == (1000, 2)
    assert row["iterations"] > 1000
    assert row["requests_per_s"] == pytest.approx(1000 / row["seconds"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--runs", "0"], "runs"),
        (["--requests", "0"], "requests"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--profile", "h900"], "h900"),
        (["--json", "missing/speed.json"], "missing"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(arguments, named, capsys):
    assert main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err
