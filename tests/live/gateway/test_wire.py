"""What a gateway reads of requests and answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve_env.errors import InputError
from llmserve_env.live.gateway.callers import load_tenants
from llmserve_env.live.gateway.wire import RequestBody, _members, _object, as_error
from llmserve_env.live.servers.upstreams import parse_upstream
from llmserve_env.schema import QuantizationTier


@pytest.mark.parametrize(
    ("came", "priority", "goes"),
    [
        ('{"prompt": "p"}', 0, '{"prompt": "p"}'),
        (' { "prompt" :"p" } ', 5, ' {"priority": 5,  "prompt" :"p" } '),
        ("{}", 1, '{"priority": 1}'),
        ('{"priority": -3, "prompt": 1}', 0, '{"priority": 0, "prompt": 1}'),
        ('{"a": 1, "pri\\u006frity" :{"x": [2]}}', 4, '{"a": 1, "pri\\u006frity" :4}'),
        ('{"priority":1,"priority":2}', 3, '{"priority":3,"priority":3}'),
        ('{"priority": 3}', 3, '{"priority": 3}'),
        ('{"a": {"priority": 1}, "b": "\\"priority\\": 1, é"}', 0, None),
        ('{"a": {"priority": 1}}', 2, '{"priority": 2, "a": {"priority": 1}}'),
    ],
)
def test_nothing_but_the_priority_changes(came, priority, goes):
    got = RequestBody(came.encode()).with_priority(priority)
    assert got.decode() == (came if goes is None else goes)
    assert json.loads(got).get("priority", 0) == priority


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{", '{"a"}', '{"a": 1,}', "{} {}", '{"a": 1 "b": 2}', "{'a': 1}", '{"a": nul}', "\ufeff{}"],
)
def test_what_is_no_json_object_is_refused_without_being_quoted(body):
    with pytest.raises(InputError, match=r"^field 'body': expected a JSON object$"):
        RequestBody(body.encode())


MEMBERS = st.dictionaries(
    st.sampled_from(["prompt", "a", "priori", "Priority", ""]) | st.text(max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda each: st.lists(each, max_size=2) | st.dictionaries(st.text(max_size=2), each, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)


@given(MEMBERS, st.sampled_from(["", " ", "\n\t"]), st.sampled_from(["", "}", "{}", "\ufeff", "\x0b"]))
def test_an_object_without_a_priority_is_read_the_short_way_as_the_long_one(members, space, more):
    text = space + json.dumps(members) + space + more
    try:
        short = _object(text)
    except ValueError:
        with pytest.raises((ValueError, StopIteration)):
            _members(text)
    else:
        spans, found = _members(text)
        assert (spans, repr(found)) == ([], repr(short))  # what is no number is not equal to itself


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "12345678"}, 2),
        ({"prompt": [5, 6, 7]}, 3),
        ({"prompt": [[5, 6], [7]]}, 3),
        ({"prompt": ["1234", "12345"]}, 3),
        ({"messages": [{"role": "system", "content": "1234"}, {"role": "user", "content": "1234"}]}, 2),
        ({"messages": [{"content": [{"type": "text", "text": "12345"}, {"type": "image_url"}]}]}, 2),
        ({}, 1),
    ],
)
def test_prompts_are_measured(body, tokens):
    assert RequestBody(json.dumps(body).encode()).prompt_tokens == tokens


@pytest.mark.parametrize(
    ("body", "sequences", "by"),
    [
        ({}, 1, "n"),
        ({"prompt": "p", "n": None, "best_of": None}, 1, "prompt"),
        ({"prompt": [1, 2, 3], "n": 4}, 4, "n"),
        ({"prompt": ["p", "q"], "n": 4.0}, 8, "n"),
        ({"prompt": [[1, 2], [3]], "n": 2, "best_of": 3}, 6, "best_of"),
        ({"prompt": [[[1]], 2, None]}, 3, "prompt"),  # for vLLM to judge
        ({"prompt": ["p", 1], "n": 1}, 2, "prompt"),
        ({"prompt": []}, 1, "prompt"),
        ({"prompt_embeds": ["e", "f", "g"]}, 3, "prompt_embeds"),
        ({"prompt": "p", "prompt_embeds": ["e", "f"]}, 3, "prompt_embeds"),
        ({"input": ["a", "b"]}, 2, "input"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, 1, "input"),
        ({"messages": [{"content": "a"}, {"content": "b"}], "n": 2, "use_beam_search": True}, 2, "n"),
    ],
)
def test_a_request_has_sequences(body, sequences, by):
    found = RequestBody(json.dumps(body).encode())
    assert (found.sequences, found.multiplied_by) == (sequences, by)


@pytest.mark.parametrize("value", ["0", "-1", '"2"', "true", "1.5", "NaN", "Infinity", "[1]", "{}", "-1e9"])
@pytest.mark.parametrize("name", ["n", "best_of"])
def test_a_number_of_sequences_that_is_none_is_refused_by_its_field(name, value):
    with pytest.raises(InputError) as caught:
        RequestBody(f'{{"prompt": "p", "{name}": {value}}}'.encode())
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("opens", "closes", "depth"), [("[", "]", 600), ('{"content": ', "}", 600), ('[{"content": ', "}]", 300)]
)
def test_deep_prompts_are_for_the_upstream_to_refuse(opens, closes, depth):
    found = RequestBody(f'{{"prompt": {opens * depth}1{closes * depth}}}'.encode())
    assert (found.sequences, found.prompt_tokens) == (1, 1)


def test_of_what_is_sent_twice_the_last_counts_as_for_engines():
    assert RequestBody(b'{"n": 1, "n": 5}').sequences == 5


def test_errors_that_are_none_get_a_form():
    assert json.loads(as_error(500, b"\xff"))["error"]["code"] == 500
    assert json.loads(as_error(400, b"[" * 100_000))["error"]["code"] == 400
    good = b'{ "error": {"message": "m"} }'
    assert as_error(400, good) is good


def test_upstreams_from_the_command_line():
    upstream = parse_upstream("http://user:word@host:8000/v1/,tier=INT8,speculation=3,key=sesame")
    assert upstream.url == "http://user:word@host:8000"
    assert (upstream.tier, upstream.speculation, upstream.key) == (QuantizationTier.INT8, 3, "sesame")
    assert upstream.shown_url == "http://host:8000"
    assert not any(secret in repr(upstream) for secret in ("word", "sesame"))
    assert parse_upstream("https://host/x").tier is None


@pytest.mark.parametrize(
    "text",
    [
        "host:8000",
        "ftp://host",
        "http://",
        "http://h?q",
        "http://h,tier=FP8",
        "http://h,speculation=9",
        "http://h,speculation=x",
        "http://h,depth=1",
        "http://h,tier",
        "http://h,tier=FP16,tier=INT8",
    ],
)
def test_upstreams_that_cannot_be_are_refused(text):
    with pytest.raises(InputError) as caught:
        parse_upstream(text)
    assert caught.value.field == "upstream"


FILE = """
header = "X-Customer"

[[tenants]]
name = "paid"
key = "k-paid"
priority = 0
weight = 3
ttft_slo_s = 0.5
tpot_slo_s = 0.05

[[tenants]]
name = "free"
value = "free"
priority = 2
"""


def test_tenants_from_a_file(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE, encoding="utf-8")
    tenants = load_tenants(path)
    paid, free = tenants.all
    assert (paid.name, paid.weight, paid.ttft_slo_s, paid.tpot_slo_s) == ("paid", 3, 0.5, 0.05)
    assert (free.priority, free.ttft_slo_s) == (2, 2.0)
    assert tenants.of([(b"authorization", b"bearer k-paid"), (b"x-customer", b"free")]) == (0, True)
    assert tenants.of([(b"authorization", b"Bearer k-other"), (b"x-customer", b"free")]) == (1, False)
    assert tenants.of([(b"authorization", b"Basic k-paid")]) == (None, False)
    path.write_text(FILE + '[[tenants]]\nname = "rest"', encoding="utf-8")
    assert load_tenants(path).of([]) == (2, False)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("priority = 2", 'priority = "high"'), "tenants.1.priority"),
        (("weight = 3", "weight = 0"), "tenants.0.weight"),
        (("weight = 3", "wait = 3"), "tenants.0.wait"),
        (('name = "free"', 'name = "paid"'), "tenants.name"),
        (('value = "free"', 'key = "k-paid"'), "tenants.key"),
        (('value = "free"', 'key = ["k-paid"]'), "tenants.1.key"),
        (('value = "free"', '[[tenants]]\nname = "other"'), "tenants"),
        (("[[tenants]]", "tenants"), None),
    ],
)
def test_files_of_tenants_that_cannot_be_are_refused(tmp_path, change, field):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE.replace(*change), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_tenants(path)
    assert caught.value.file == str(path)
    assert caught.value.field == field
    assert "k-paid" not in str(caught.value)
