"""Traces as people have them: other names, units, clocks and kinds of files; nothing is silently wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.workloads import load, load_lengths, open_reported, open_workload

EPOCH = 1_731_000_000


def write(tmp_path, text, name="trace.txt"):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def lines(*rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def mooncake(*times, **more):
    return lines(*({"timestamp": time, "input_length": 40, "output_length": 4} | more for time in times))


# ---------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize(
    "text",
    [
        mooncake(EPOCH * 1000 + 250, EPOCH * 1000 + 2250),
        mooncake(EPOCH, EPOCH + 2),
        f"arrival_s,prompt_tokens,output_tokens\n{EPOCH}.25,40,4\n{EPOCH + 2}.25,40,4\n",
        f"arrival_s,prompt_tokens,output_tokens\n{EPOCH}250,40,4\n{EPOCH + 2}250,40,4\n",
        f"input_toks\toutput_toks\tarrival_time_ns\n40\t4\t{EPOCH}000000001\n40\t4\t{EPOCH + 2}000000001\n",
        f"TIMESTAMP,ContextTokens,GeneratedTokens\n{EPOCH}000,40,4\n{EPOCH + 2}000,40,4\n",
        "arrival_s,prompt_tokens,output_tokens\n2025-03-01T10:00:00Z,40,4\n2025-03-01T12:00:02+02:00,40,4\n",
    ],
)
def test_times_of_a_clock_begin_with_the_first_request(tmp_path, text):
    workload, _ = load(write(tmp_path, text), jitter_s=0)
    assert workload.arrival_s == pytest.approx([0, 2], abs=1e-6)


def test_nanoseconds_of_a_second_are_no_unix_time(tmp_path):
    text = "input_toks\toutput_toks\tarrival_time_ns\n40\t4\t1731000000\n40\t4\t3731000000\n"
    workload, report = load(write(tmp_path, text))
    assert workload.arrival_s == pytest.approx([1.731, 3.731])
    assert report.guesses == ()


def test_a_trace_of_two_months_keeps_its_times(tmp_path):
    text = "Timestamp,Model,Request tokens,Response tokens\n3,a,40,4\n5200000,a,40,4\n"
    assert load(write(tmp_path, text))[0].arrival_s.tolist() == [3, 5_200_000]


# ----------------------------------------------------------------------------------------------- units


def test_seconds_under_mooncakes_keys_are_told(tmp_path, capsys):
    path = write(tmp_path, mooncake(*sorted([*range(1000)] * 2)))
    workload, report = load(path, jitter_s=0)
    assert workload.duration_s == 999
    (guess,) = report.guesses
    assert "taken as seconds" in guess
    assert "time_unit=" in guess
    assert str(path) in capsys.readouterr().err
    meant, report = open_reported(f"trace://{path}?time_unit=ms&jitter=0")
    assert meant.duration_s == pytest.approx(0.999)
    assert report.guesses == ()


def test_fractions_of_what_should_be_milliseconds_are_doubted(tmp_path):
    path = write(tmp_path, mooncake(0.5, 61.25, 120.75))
    assert load(path)[1].guesses
    assert open_workload(f"trace://{path}?time_unit=s").arrival_s.tolist() == [0.5, 61.25, 120.75]


def test_fine_times_are_not_spread(tmp_path):
    times = [10_000 * burst + number for burst in range(6) for number in range(10)]
    workload, report = load(write(tmp_path, mooncake(*times)))
    assert workload.arrival_s * 1e3 == pytest.approx(times)
    assert report.notes == ()


@pytest.mark.parametrize(("step_ms", "spread_s"), [(3000, 3.0), (1000, 1.0), (500, 0.0)])
def test_times_are_spread_as_far_as_they_are_coarse_and_stay_in_order(tmp_path, step_ms, spread_s):
    times = [step_ms * (number // 20) for number in range(400)]
    path = write(
        tmp_path,
        lines(
            *({"timestamp": time, "input_length": 1 + i, "output_length": 1} for i, time in enumerate(times))
        ),
    )
    workload, _ = load(path)
    moved = workload.arrival_s - np.array(times) / 1e3
    assert workload.prompt_tokens.tolist() == list(range(1, 401))
    assert (moved >= 0).all()
    assert moved.max() <= spread_s
    assert moved.max() > 0.9 * spread_s or spread_s == 0


def test_bailians_keys_are_seconds_and_blocks_of_16(tmp_path):
    rows = [
        {
            "chat_id": 1,
            "parent_chat_id": -1,
            "timestamp": 0.75,
            "input_length": 40,
            "output_length": 9,
            "type": "search",
            "turn": 1,
            "hash_ids": [1, 2, 3],
        },
        {
            "chat_id": 2,
            "parent_chat_id": 1,
            "timestamp": 90.5,
            "input_length": 60,
            "output_length": 9,
            "type": "text",
            "turn": 2,
            "hash_ids": [1, 2, 4, 5],
        },
    ]
    workload, _ = load(write(tmp_path, lines(*rows)))
    assert workload.arrival_s.tolist() == [0.75, 90.5]
    assert workload.prefix_block_tokens == 16
    assert [tenant.name for tenant in workload.tenants] == ["search", "text"]


def test_blocks_of_another_size_are_found_by_their_number(tmp_path):
    rows = [
        {"timestamp": 250 * i, "input_length": tokens, "output_length": 4, "hash_ids": list(range(blocks))}
        for i, (tokens, blocks) in enumerate([(2048, 2), (1025, 2), (5000, 5)])
    ]
    path = write(tmp_path, lines(*rows))
    workload, report = load(path)
    assert workload.prefix_block_tokens == 1024
    assert any("blocks of 1024" in guess for guess in report.guesses)
    assert open_workload(f"trace://{path}?block_tokens=256").prefix_block_tokens == 256
    with pytest.raises(InputError, match="block_tokens=N says"):
        open_workload(f"trace://{path}?block_tokens=4096&jitter=0")


# ----------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "array", "nested"])
def test_named_columns_read_any_file(tmp_path, kind):
    rows = [(1500, 7, 3, "ann"), (2750, 9, 4, "bob")]
    names = ["created_at_ms", "ISL", "OSL", "who"]
    if kind in {"csv", "tsv"}:
        sign = {"csv": ",", "tsv": "\t"}[kind]
        text = "\n".join(sign.join(map(str, row)) for row in [names, *rows])
    else:
        objects = [dict(zip(names, row, strict=True)) for row in rows]
        if kind == "nested":
            objects, names = [{"r": each} for each in objects], [f"r.{name}" for name in names]
        text = json.dumps(objects, indent=1) if kind == "array" else lines(*objects)
    columns = ",".join(
        f"{target}:{name}"
        for target, name in zip(("arrival_s", "prompt_tokens", "output_tokens", "tenant"), names, strict=True)
    )
    workload = open_workload(f"trace://{write(tmp_path, text)}?columns={columns}")
    assert workload.arrival_s.tolist() == [1.5, 2.75]
    assert workload.prompt_tokens.tolist() == [7, 9]
    assert [tenant.name for tenant in workload.tenants] == ["ann", "bob"]
    assert np.array_equal(open_workload(workload.source).arrival_s, workload.arrival_s)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("columns=arrival_s:a,prompt_tokens:b", "expected output_tokens:COLUMN, too"),
        ("columns=arrival_s:a,prompt_tokens:b,output_tokens:d", "no such column or key; there are 'a, b, c'"),
        ("columns=start:a,prompt_tokens:b,output_tokens:c", "expected one of arrival_s, prompt_tokens"),
        ("columns=arrival_s", "expected TARGET:COLUMN"),
        ("time_unit=minutes", "expected one of s, ms, us, ns, found 'minutes'"),
        ("block_tokens=0", "expected a whole number >= 1"),
    ],
)
def test_what_cannot_be_meant_of_columns_is_said(tmp_path, query, message):
    path = write(tmp_path, "a,b,c\n1,2,3\n")
    with pytest.raises(InputError) as caught:
        open_workload(f"trace://{path}?{query}")
    assert message in str(caught.value)


def test_an_unknown_file_is_told_how_to_be_read(tmp_path):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, lines({"timestamp": 1, "input_length": 3})))
    assert "It would be Mooncake JSONL with 'output_length'" in str(caught.value)
    assert "columns=arrival_s:COLUMN" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "arrival_s", "prompt", "output"),
    [
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,7,3\n2,9,4\n", [0.5, 2], [7, 9], [3, 4]),
        (
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
            "0,2,0,0.5,1,7,3\n1,2,0,2,1,9,4\n",
            [0.5, 2],
            [7, 9],
            [3, 4],
        ),
        (
            "request_id,timestamp,input_tokens,output_tokens\n0,0.5,7,3\n1,2.25,9,4\n",
            [0.5, 2.25],
            [7, 9],
            [3, 4],
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n0.5,7,3\n2,9,4\n", [0.5, 2], [7, 9], [3, 4]),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens\n1,m,7,3,10\n2,m,9,4,13\n",
            [1, 2],
            [7, 9],
            [3, 4],
        ),
        (
            lines(
                {"timestamp": 500, "requests": [{"Prompt Length": 7, "Output Length": 3, "prompt": "x"}]},
                {
                    "timestamp": 900,
                    "requests": [
                        {"Prompt Length": 9, "Output Length": 4, "prompt": "y"},
                        {"Prompt Length": 1, "Output Length": 1, "prompt": "z"},
                    ],
                },
            ),
            [0.5, 0.9, 0.9],
            [7, 9, 1],
            [3, 4, 1],
        ),
        (
            "input_toks\toutput_toks\tarrival_time_ns\tinput_tok_ids\n"
            "2\t3\t0\t[5, 6]\n2\t4\t1000000000\t[5, 7]\n",
            [0, 1],
            [2, 2],
            [3, 4],
        ),
    ],
    ids=["vidur", "splitwise", "timed", "azure", "burstgpt", "aibrix", "llmservingsim"],
)
def test_public_formats_are_recognised(tmp_path, text, arrival_s, prompt, output):
    workload, _ = load(write(tmp_path, text))
    assert workload.arrival_s == pytest.approx(arrival_s)
    assert workload.prompt_tokens.tolist() == prompt
    assert workload.output_tokens.tolist() == output


def test_later_turns_of_sessions_are_told_apart(tmp_path):
    path = write(
        tmp_path,
        lines(
            {"session_id": "a", "timestamp": 250, "input_length": 7, "output_length": 3},
            {"session_id": "a", "delay": 400, "input_length": 9, "output_length": 4},
        ),
    )
    with pytest.raises(InputError, match="later turn of a session") as caught:
        load(path)
    assert caught.value.line == 2
    workload, report = load(path, skip_bad_rows=True)
    assert (len(workload), report.bad_rows) == (1, 1)


# ------------------------------------------------------------------------------------------- documents


VLLM = {
    "backend": "vllm", "completed": 2, "input_lens": [7, 9, 8], "output_lens": [3, 4, 0],
    "start_times": [5001.5, 5002.25, 5003.0], "itls": [[0.01], [0.01], []], "errors": ["", "", "timed out"],
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_a_result_of_vllms_benchmark_is_replayed(tmp_path, indent):
    workload, report = load(write(tmp_path, json.dumps(VLLM, indent=indent)))
    assert workload.arrival_s.tolist() == [0, 0.75]
    assert workload.prompt_tokens.tolist() == [7, 9]
    assert report.failed_requests == 1


def test_a_result_without_start_times_has_lengths(tmp_path):
    path = write(
        tmp_path,
        {name: value for name, value in VLLM.items() if name != "start_times"} | {"output_lens": [3, 4, 5]},
    )
    with pytest.raises(InputError, match="lengths but no arrival times"):
        load(path)
    assert load_lengths(path).prompt_tokens.tolist() == [7, 9, 8]


def test_aiperfs_records_are_replayed_without_the_warm_up(tmp_path):
    def record(second, prompt, output, phase="profiling", **more):
        metrics = {"input_sequence_length": {"value": prompt, "unit": "tokens"}}
        if output:
            metrics["output_sequence_length"] = {"value": output, "unit": "tokens"}
        start = (EPOCH + second) * 10**9
        return {"metadata": {"request_start_ns": start, "benchmark_phase": phase}, "metrics": metrics} | more

    rows = [
        record(0, 5, 5, "warmup"),
        record(10, 7, 3),
        record(12, 9, None, error={"code": 500}),
        record(13, 8, 4),
    ]
    workload, report = load(write(tmp_path, lines(*rows)))
    assert workload.arrival_s == pytest.approx([0, 3])
    assert workload.prompt_tokens.tolist() == [7, 8]
    assert report.failed_requests == 2


@pytest.mark.parametrize("timed", [True, False])
def test_a_guidellm_report_is_replayed(tmp_path, timed):
    def request(second, prompt, output):
        start = EPOCH + second
        when = {"info": {"timings": {"request_start": start}}} if timed else {"request_start_time": start}
        return {"prompt_tokens": prompt, "output_tokens": output} | when

    runs = [
        {"requests": {"successful": [request(0, 7, 3), request(2, 9, 4)], "errored": []}},
        {"requests": {"successful": [request(60, 8, 5)], "errored": []}},
    ]
    workload, _ = load(write(tmp_path, {"args": {}, "benchmarks": runs}))
    assert workload.arrival_s == pytest.approx([0, 2, 60])
    assert workload.prompt_tokens.tolist() == [7, 9, 8]


def test_a_genai_perf_export_is_replayed_with_estimated_lengths(tmp_path):
    payload = json.dumps({"messages": [{"role": "user", "content": "x" * 80}]})
    requests = [
        {
            "timestamp": (EPOCH + i) * 10**9,
            "request_inputs": {"payload": payload},
            "response_timestamps": [1, 2, 3],
        }
        for i in range(2)
    ]
    workload, report = load(write(tmp_path, {"experiments": [{"requests": requests}]}))
    assert workload.prompt_tokens.tolist() == [20, 20]
    assert workload.output_tokens.tolist() == [3, 3]
    assert report.guesses


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_like_lines_and_faults_have_theirs(tmp_path, indent):
    rows = [{"arrival_s": i, "prompt_tokens": 7, "output_tokens": 3} for i in range(3)]
    assert load(write(tmp_path, json.dumps(rows, indent=indent)))[0].arrival_s.tolist() == [0, 1, 2]
    rows[1]["prompt_tokens"] = -1
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, json.dumps(rows, indent=indent)))
    assert (caught.value.line, caught.value.field) == (7 if indent else 1, "prompt_tokens")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": 1,\n "b": {}\n}', "a JSON document with the keys a, b, and no rows"),
        ('{\n "a": 1,\n', "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("[{}", "the array does not end"),
        ("[{} {}]", "expected a comma"),
        ("[{}] []", "something follows the array"),
        ("[" * 100_000, "not usable JSON"),
        ('{"requests": [1]}', "expected a list of objects in 'requests'"),
    ],
)
def test_json_of_another_kind_is_named(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert message in str(caught.value)


def test_sharegpts_conversations_give_lengths(tmp_path, capsys):
    def said(*turns):
        return {"id": "i", "conversations": [{"from": who, "value": "x" * size} for who, size in turns]}

    path = write(
        tmp_path,
        [said(("human", 40), ("gpt", 80)), said(("gpt", 9)), said(("gpt", 8), ("human", 8), ("gpt", 4))],
    )
    lengths = load_lengths(path)
    assert (lengths.prompt_tokens.tolist(), lengths.output_tokens.tolist()) == ([10, 2], [20, 1])
    assert "2 conversations, 1 without a question" in capsys.readouterr().err
    with pytest.raises(InputError, match="poisson://"):
        load(path)
