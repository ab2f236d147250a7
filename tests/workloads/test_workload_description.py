"""The statistics, on workloads whose values are known by hand; the picture and the command."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import trace_samples

from llmserve_env.commands.workload import workload as command
from llmserve_env.errors import InputError
from llmserve_env.report.figures import new_figure
from llmserve_env.workloads import Workload, describe, open_workload, picture
from llmserve_env.workloads.description import window_counts


def requests(arrival_s, prompt=None, output=None, **others) -> Workload:
    n = len(arrival_s)
    return Workload(
        arrival_s=np.array(arrival_s, float),
        prompt_tokens=np.ones(n, np.int32) if prompt is None else prompt,
        output_tokens=np.ones(n, np.int32) if output is None else output,
        tenant=np.zeros(n, np.int16),
        **others,
    )


def test_regular_arrivals():
    facts = describe(requests(np.arange(0, 130, 0.5)))
    assert facts.rate_rps == pytest.approx(260 / 129.5)
    assert facts.gap_cv == 0
    assert [scale.dispersion for scale in facts.scales] == [0, 0, 0]
    assert [scale.peak_to_mean for scale in facts.scales] == [1, 1, 1]
    assert facts.traffic == "steady"


def test_counts_leave_out_a_partial_window():
    # Ten a second for 2 s, then 30 in the third, and one request after 3.5 s.
    arrival_s = np.concatenate([np.arange(20) / 10, 2 + np.arange(30) / 30, [3.5]])
    assert window_counts(arrival_s, 1.0).tolist() == [10, 10, 30]
    scale = describe(requests(arrival_s)).scales[0]
    counts = np.array([10, 10, 30])
    assert scale.dispersion == pytest.approx(counts.var() / counts.mean())
    assert scale.peak_to_mean == pytest.approx(1.8)


def test_windows_begin_with_the_first_arrival():
    assert window_counts(np.array([100.0, 100.5, 101.5, 103.0]), 1.0).tolist() == [2, 1, 0]


def test_lengths():
    tokens = np.arange(1, 102, dtype=np.int32)
    facts = describe(requests(np.arange(101.0), prompt=tokens, output=tokens[::-1]))
    assert (facts.prompt.mean, facts.prompt.p50, facts.prompt.p90, facts.prompt.p99) == (51, 51, 91, 100)
    assert facts.prompt.max == 101
    assert facts.length_correlation == pytest.approx(-1)


def test_traffic_classes():
    assert describe(open_workload("poisson://?rate=8")).traffic == "steady"
    assert describe(open_workload("poisson://?rate=0.01&duration=100000")).traffic == "sparse"
    assert describe(open_workload("gamma://?shape=0.2")).traffic == "bursty"
    slow_waves = describe(open_workload("mmpp://?rates=6,15&dwells=200,200&duration=5000"))
    assert slow_waves.gap_cv < 1.5
    assert slow_waves.traffic == "bursty"


@pytest.mark.parametrize("arrival_s", [[0.0], [3.0, 3.0, 3.0], [0.0, 1.0]])
def test_too_little_to_tell(arrival_s):
    facts = describe(requests(arrival_s))
    assert facts.traffic == "undetermined"
    assert facts.length_correlation is None
    assert "undetermined" in facts.as_table()
    with pytest.raises(InputError, match="no request"):
        describe(requests([]))


def test_prefix_reuse():
    reuse = describe(
        requests(
            [0, 1, 2, 3],
            prefix_block_tokens=16,
            prefix_offsets=[0, 2, 5, 6, 6],
            prefix_ids=[1, 2, 1, 2, 3, 2],
        )
    ).prefix_reuse
    assert reuse.hit_share == pytest.approx(2 / 6), "id 2 at depth 0 is another block than id 2 at depth 1"
    assert reuse.mostly_hit_share == pytest.approx(1 / 4)


def test_a_block_twice_in_one_prompt_is_no_reuse():
    reuse = describe(
        requests([0], prefix_block_tokens=16, prefix_offsets=[0, 2], prefix_ids=[5, 5])
    ).prefix_reuse
    assert reuse.hit_share == 0


def test_command_prints_and_writes(tmp_path, capsys):
    picture, numbers = tmp_path / "w.png", tmp_path / "w.json"
    command("gamma://?duration=120&tenants=premium-standard", picture=picture, json=numbers, seed=3)
    printed = capsys.readouterr().out
    assert "inter-arrival CV" in printed
    assert "premium" in printed
    content = json.loads(numbers.read_text())
    facts = describe(open_workload("gamma://?duration=120&tenants=premium-standard&seed=3"))
    assert content["gap_cv"] == facts.gap_cv
    assert content["load"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.png"], (
        "no temporary file is left"
    )


def test_command_reports_a_trace(tmp_path, capsys):
    trace, numbers = tmp_path / "trace.csv", tmp_path / "w.json"
    trace.write_text(trace_samples.BURSTGPT + "x,ChatGPT,1,1,2,API log\n")
    command(str(trace), json=numbers, skip_bad_rows=True)
    assert "1 failed requests dropped; 1 bad rows skipped" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["load"]["bad_rows"] == 1


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a workload: its axes by their titles."""

    def draw(workload):
        with new_figure((9.0, 6.2)) as figure, monkeypatch.context() as patched:
            patched.setattr(picture, "picture_file", lambda path, size: nullcontext(figure))
            picture.draw(workload, describe(workload), tmp_path / "none.png")
            return {axes.get_title("left"): axes for axes in figure.axes}

    return draw


def bars(axes):
    """Left edge, width and height of the bars of a histogram."""
    return np.array([(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.containers[0]]).T


def test_the_picture_shows_what_the_workload_holds(drawn):
    workload = open_workload("gamma://?requests=400&shape=0.3")
    facts, shown = describe(workload), drawn(workload)
    since, gaps = workload.arrival_s - workload.arrival_s[0], np.diff(workload.arrival_s)

    rates = [part.get_data() for part in shown["Arrivals"].patches]
    assert [rate.edges[1] for rate in rates] == [1, 2]  # s
    for rate in rates:
        counted = rate.values * np.diff(rate.edges)
        expected = [((since >= low) & (since < low + rate.edges[1])).sum() for low in rate.edges[:-1]]
        np.testing.assert_allclose(counted, expected)
    (mean,) = shown["Arrivals"].lines
    assert set(mean.get_ydata()) == {facts.rate_rps}

    left, width, share = bars(shown["Inter-arrival times"])
    for edge, size, found in zip(left, width, share, strict=True):
        assert found == pytest.approx(((gaps >= edge) & (gaps < edge + size)).mean())
    assert share.sum() == pytest.approx(1, abs=2 / len(gaps))  # but for the least gap
    (poisson,) = [part for part in shown["Inter-arrival times"].patches if hasattr(part, "get_data")]
    edges = np.append(left, left[-1] + width[-1])
    np.testing.assert_allclose(poisson.get_data().values, -np.diff(np.exp(-edges / gaps.mean())))

    for title, tokens, statistics in (
        ("Prompt lengths", workload.prompt_tokens, facts.prompt),
        ("Output lengths", workload.output_tokens, facts.output),
    ):
        left, width, share = bars(shown[title])
        assert share.sum() == pytest.approx(1)
        assert (left[0], left[-1] + width[-1]) == pytest.approx((tokens.min(), tokens.max() + 1))
        assert [line.get_xdata()[0] for line in shown[title].lines] == [statistics.p50, statistics.p99]
        assert [text.get_text().split()[0] for text in shown[title].texts] == ["p50", "p99"]


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_a_picture_of_hardly_anything(tmp_path, drawn, requests):
    source, path = f"poisson://?requests={requests}&lengths=fixed:5,6", tmp_path / "w.png"
    command(source, picture=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    shown = drawn(open_workload(source))
    assert bool(shown["Inter-arrival times"].patches) == (requests > 1)
    for title, length in (("Prompt lengths", 5), ("Output lengths", 6)):
        left, width, share = bars(shown[title])
        assert share.tolist() == [1]
        assert left[0] < length < left[0] + width[0]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_repeatable(tmp_path, suffix):
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    command("gamma://?requests=400", picture=first)
    command("gamma://?requests=400", picture=second)
    assert first.read_bytes() == second.read_bytes()


def test_command_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(InputError, match="ending in png, svg, pdf"):
        command("poisson://?requests=5", picture=tmp_path / "w.txt")
    with pytest.raises(InputError, match="cannot be written"):
        command("poisson://?requests=5", json=tmp_path / "absent" / "w.json")
