"""`llmserve demo` writes what it says."""

from __future__ import annotations

import csv
import json

from llmserve_env.cli import main


def test_demo_writes_its_files(tmp_path, capsys):
    out = tmp_path / "a" / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 2
    names = ["summary.json", "picture.png", *(f"requests-{profile}.csv" for profile in summary)]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert all(f"wrote {out / name}" in told for name in names)
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    for profile, found in summary.items():
        with (out / f"requests-{profile}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        count = found["requests"]
        assert len(rows) == count["total"] == count["completed"] + count["failed"] + count["cancelled"]
        assert sum(row["status"] == "completed" for row in rows) == count["completed"]
        # near capacity: some promises are kept and some are not
        assert all(0.2 < tenant["attainment"] < 1 for tenant in found["tenants"].values())
    for label in ("TTFT", "TPOT", "in SLO: premium", "throughput", "KV occupancy", "preemptions"):
        assert label in told


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    assert "taken: cannot be made" in capsys.readouterr().err
