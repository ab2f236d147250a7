"""What several upstreams tell, as one: what cannot be read of one is left out, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llmserve_env.live.gateway.several.metrics import merge_metrics

from ..vllm_server import metrics

GOOD = """# HELP requests Requests {so far} "x".
# TYPE requests counter
requests_total{a="b"} 3.0 1700000000000
requests_total{a="\\"}\\\\,c=",} NaN
# TYPE up gauge
up +Inf
up{} 1e3
"""


def samples(text):
    return [
        (sample.name, sample.labels, str(sample.value), sample.timestamp)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


@pytest.mark.parametrize("text", [GOOD, metrics("0.32-busy-2"), metrics("0.10"), metrics("0.6")])
def test_samples_are_those_of_the_servers_with_a_label(text):
    merged, unread = merge_metrics({"http://a": text, 'http://"b\\': text})
    assert unread == {}
    for upstream in ("http://a", 'http://"b\\'):
        of_one = [each for each in samples(merged) if each[1]["upstream"] == upstream]
        without = [
            (name, {k: v for k, v in labels.items() if k != "upstream"}, *rest)
            for name, labels, *rest in of_one
        ]
        assert sorted(map(str, without)) == sorted(map(str, samples(text)))
    assert merged.count("# TYPE ") == text.count("# TYPE ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("<html>login</html>", "1 line(s) of no metrics"),
        ("up", "1 line(s) of no metrics"),
        ("up1", "1 line(s) of no metrics"),
        ("up{a=1} 1", "1 line(s) of no metrics"),
        ('up{a="b"c="d"} 1', "1 line(s) of no metrics"),
        ('up{a="b} 1', "1 line(s) of no metrics"),
        ("up many", "1 line(s) of no metrics"),
        ("up 1_0", "1 line(s) of no metrics"),
        ("up \N{ARABIC-INDIC DIGIT ONE}", "1 line(s) of no metrics"),
        ("# TYPE up speed", None),
        ("# TYPE", None),
        ("#", None),
    ],
)
def test_a_line_that_is_none_is_left_out_and_the_others_stay(line, said):
    merged, unread = merge_metrics({"a": f"{line}\n{GOOD}{line}\n".removesuffix(f"{line}\n"), "b": GOOD})
    assert unread == ({} if said is None else {"a": said})
    assert merged == merge_metrics({"a": GOOD, "b": GOOD})[0]


@pytest.mark.parametrize("text", ["", "<html>login</html>", "\ufffd\ufffd garbage", "# TYPE up gauge\n"])
def test_a_text_without_metrics_is_left_out(text):
    assert merge_metrics({"a": text, "b": GOOD})[1] == {"a": "no metrics"}
    assert samples(merge_metrics({"a": text, "b": GOOD})[0]) == samples(merge_metrics({"b": GOOD})[0])


@settings(max_examples=50)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(GOOD.splitlines()), st.text(st.sampled_from('up{}="\\,#1 \t\r\n'), max_size=12)
        )
    )
)
def test_whatever_is_told_the_whole_can_be_read(lines):
    merged, _ = merge_metrics({"a": "\n".join(lines), "b": GOOD})
    assert len([each for each in samples(merged) if each[1]["upstream"] == "b"]) == 4


def test_a_label_that_is_there_already_is_renamed():
    once = merge_metrics({"inner": 'up{upstream="x,upstream=y"} 1'})[0]
    assert once == 'up{upstream="inner",exported_upstream="x,upstream=y"} 1\n'
    twice = merge_metrics({"outer": once})[0]
    assert samples(twice)[0][1] == {
        "upstream": "outer",
        "exported_exported_upstream": "inner",
        "exported_upstream": "x,upstream=y",
    }
