"""What docs/hardware-datacentre.md says of measured engines, from `benchmarks/engine_points.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine_points.py"


@pytest.fixture(scope="module")
def table(shared_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("points") / "table.json"
    folder = shared_data / "ground_truth" / "engine_points"
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "--json", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(done.stdout.splitlines()) - 3
    return {(row["profile"], row["tier"], row["engine"].split()[0]): row for row in rows}


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("profile", "tier", "engine", "points", "median", "p90"),
    [
        ("h100-llama-3.1-8b", "FP16", "trtllm", 42, 5, 10),
        ("h100x4-llama-3.1-70b", "INT8", "vllm", 15, 7, 12),
        ("h200-llama-3.1-8b", "INT8", "sglang", 15, 12, 25),
        ("a100-llama-3.1-8b", "INT8", "TensorRT-LLM", 4, 12, 15),
    ],
)
def test_profiles_are_near_engines_of_their_time(table, profile, tier, engine, points, median, p90):
    row = table[profile, tier, engine]
    assert row["points"] == points
    assert row["median_abs_percent"] < median
    assert row["p90_abs_percent"] < p90


@pytest.mark.needs_shared
def test_engines_of_2024_are_slower_than_the_profiles(table):
    for profile in ("a100-llama-3.1-8b", "h100-llama-3.1-8b"):
        assert -35 < table[profile, "FP16", "vLLM"]["bias_percent"] < -10


@pytest.mark.needs_shared
def test_the_h200_runs_without_prefills_agree_when_prefills_are_left_out(table):
    row = table["h200-llama-3.1-8b", "INT8", "vllm"]
    assert row["bias_percent"] > 50
    assert abs(row["alone_bias_percent"]) < 5
