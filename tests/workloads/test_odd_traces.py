"""Files that are nearly right: what is odd about them is mended, told or refused, never silently wrong."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from llmserve_env.errors import InputError
from llmserve_env.tasks import load_task
from llmserve_env.workloads import describe, load, load_lengths, open_reported, open_workload
from llmserve_env.workloads.overlay import MAX_STRETCHES, overlaid
from llmserve_env.workloads.workload import Workload

EPOCH = 1_731_000_000
HEADER = "arrival_s,prompt_tokens,output_tokens\n"
WINDOWS = "client,window_start_s,rate_rps,cv,pattern,shape,scale\n"


def write(tmp_path, text, name="trace.txt"):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def lines(*rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


# ---------------------------------------------------------------------------------------------- times


def test_milliseconds_that_may_be_seconds_are_told(tmp_path):
    rows = [{"timestamp": 2 * i, "input_length": 9, "output_length": 4} for i in range(60)]
    path = write(tmp_path, lines(*rows))
    assert "as seconds 0.5 requests/s" in load(path)[1].guesses[0]
    assert load(path)[0].duration_s == pytest.approx(0.118)
    workload, report = open_reported(f"trace://{path}?time_unit=s")
    assert (workload.duration_s, report.guesses) == (118, ())


@pytest.mark.parametrize(
    ("header", "times"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", (45246.760416, 45246.760428)),  # a spreadsheet's days
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", (0, 250)),
        ("timestamp,input_tokens,output_tokens\n", (0.5, 250.75)),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n", (0, 2500)),
        ("arrival_timestamp,prompt_size,token_size\n", (0.001, 0.0011)),
    ],
)
def test_rates_that_are_hardly_meant_are_told(tmp_path, header, times):
    path = write(tmp_path, header + "".join(f"{time},9,4\n" for time in times))
    assert "time_unit=" in load(path)[1].guesses[0]
    assert open_reported(f"trace://{path}?time_unit=ms")[1].guesses == ()


@pytest.mark.parametrize("header", [HEADER, "timestamp,input_tokens,output_tokens\n"])
def test_zeros_among_unix_times_are_bad_rows(tmp_path, header):
    rows = [f"{EPOCH + i},9,4" for i in range(20)]
    rows[3] = "0,9,4"
    path = write(tmp_path, header + "\n".join(rows))
    with pytest.raises(InputError, match="expected a Unix time as in other rows, found 0") as caught:
        load(path)
    assert caught.value.line == 5
    workload, report = load(path, skip_bad_rows=True)
    assert (workload.duration_s, report.bad_rows) == (19, 1)


def test_a_unit_that_has_always_been_the_same_is_kept_after_days(tmp_path):
    start = 11 * 86_400 * 10**9  # as microseconds it would be a Unix time
    text = f"input_toks\toutput_toks\tarrival_time_ns\n9\t4\t{start}\n9\t4\t{start + 10**9}\n"
    workload, report = load(write(tmp_path, text))
    assert (workload.arrival_s.tolist(), report.guesses) == ([0, 1], ())


@pytest.mark.parametrize("offsets", [("+00", "+00"), (" UTC", "Z"), ("+0000", " +00:00")])
def test_times_of_day_have_offsets_as_databases_write_them(tmp_path, offsets):
    one, two = offsets
    text = HEADER + f"2025-03-01 10:00:00.5{one},9,4\n2025-03-01 10:00:02{two},9,4\n"
    assert load(write(tmp_path, text))[0].arrival_s.tolist() == [0, 1.5]


def test_times_of_day_with_and_without_offsets_do_not_mix(tmp_path):
    path = write(tmp_path, HEADER + "2025-03-01 10:00:00,9,4\n2025-03-01 11:00:01+01:00,9,4\n")
    with pytest.raises(InputError, match="expected a UTC offset as in other rows") as caught:
        load(path)
    assert caught.value.line == 2


def test_what_was_told_and_is_of_no_use_is_noted(tmp_path):
    path = write(tmp_path, HEADER + "2025-03-01 10:00:00,9,4\n")
    _, report = open_reported(f"trace://{path}?time_unit=ms&block_tokens=16")
    assert len(report.notes) == 2
    with pytest.raises(InputError, match="expected tenants"):
        open_workload(f"trace://{path}?assign=lengths")


@pytest.mark.parametrize("last", ["1e9", "1e12"])
def test_a_far_last_request_takes_no_memory(tmp_path, last):
    workload, _ = load(write(tmp_path, HEADER + f"0,9,4\n{last},9,4\n"))
    found = describe(workload)
    assert found.traffic == "sparse"
    assert found.scales[0].dispersion is None
    found.as_table()


@pytest.mark.parametrize(
    ("last", "query", "message"),
    [
        ("1.1e12", "", "time_unit="),
        ("1e300", "", "time_unit="),
        ("9", "?jitter=1e300", "time_unit="),
        ("9", "?scale=1e-200", "arrival_s"),
    ],
)
def test_times_that_cannot_be_meant_are_refused(tmp_path, last, query, message):
    path = write(tmp_path, HEADER + f"0,9,4\n{last},9,4\n")
    with pytest.raises(InputError, match=message):
        open_workload(f"trace://{path}{query}")


# ---------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("begin", ["", "sep=;\n", "\n"])
def test_semicolons_part_cells(tmp_path, begin):
    text = begin + (HEADER + "0.5,9,4\n2,7,3\n").replace(",", ";")
    workload, _ = load(write(tmp_path, text))
    assert workload.prompt_tokens.tolist() == [9, 7]


def test_two_columns_of_a_name_are_refused_where_they_are_read(tmp_path):
    text = "arrival_s,prompt_tokens,note,output_tokens,prompt_tokens,note\n0,9,a,4,8,b\n"
    with pytest.raises(InputError, match="is the name of two columns") as caught:
        load(write(tmp_path, text))
    assert (caught.value.line, caught.value.field) == (1, "prompt_tokens")
    assert len(load(write(tmp_path, text.replace("prompt_tokens,note\n", "other,note\n")))[0]) == 1


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEADER.replace("\n", ",note\n") + '0,9,4,"a\n1,9,4,b\n2,9,4,c\n', 2, "a quote that does not end"),
        (HEADER + "0\x1f9,4\n", None, "control character"),
    ],
)
def test_what_would_swallow_rows_or_cells_is_refused(tmp_path, text, line, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, text))
    assert caught.value.line == line


def test_quotes_may_follow_a_space(tmp_path):
    text = 'arrival_s, "prompt_tokens", "output_tokens"\n0, "9", 4\n'
    assert load(write(tmp_path, text))[0].prompt_tokens.tolist() == [9]


def test_a_cell_may_hold_a_long_list(tmp_path):
    ids = list(range(100_000, 130_000))
    text = f'input_toks,output_toks,arrival_time_ns,input_tok_ids\n30000,4,0,"{ids}"\n'
    assert len(load(write(tmp_path, text))[0].prefix_ids) == 30_000 // 16


# ------------------------------------------------------------------------------------------------ JSON


def test_keys_that_the_first_row_lacks_are_read(tmp_path):
    row = {"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 4}
    workload, _ = load(write(tmp_path, lines(row, row | {"tenant": "ann", "request_id": "r"})))
    assert [workload.tenants[index].name for index in workload.tenant] == ["default", "ann"]
    assert workload.request_ids == ()


def test_aiperfs_records_may_begin_with_a_failed_one(tmp_path):
    def record(second, metrics, **more):
        start = (EPOCH + second) * 10**9
        return {"metadata": {"request_start_ns": start}, "metrics": metrics, "error": None} | more

    lengths = {"input_sequence_length": {"value": 9}, "output_sequence_length": {"value": 4}}
    rows = [record(0, {"error_isl": {"value": 9}}, error={"code": 500}), record(2, lengths)]
    workload, report = load(write(tmp_path, lines(*rows)))
    assert (len(workload), report.failed_requests) == (1, 1)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_document_may_wrap_its_rows(tmp_path, indent):
    rows = [{"arrival_s": i, "prompt_tokens": 9, "output_tokens": 4} for i in range(2)]
    workload, _ = load(write(tmp_path, json.dumps({"requests": rows}, indent=indent)))
    assert workload.arrival_s.tolist() == [0, 1]


@pytest.mark.parametrize("ids", [[2**64 - 1, 2**64 - 2], ["a9", "b7"]])
def test_blocks_have_any_names(tmp_path, ids):
    rows = [
        {"timestamp": at, "input_length": 1000, "output_length": 4, "hash_ids": found}
        for at, found in ((0, ids), (250, ids[:1] + ids[:1]))
    ]
    workload, _ = load(write(tmp_path, lines(*rows)))
    assert workload.prefix_ids.tolist() == [0, 1, 0, 0]


def test_a_damaged_first_line_is_a_bad_row(tmp_path):
    row = {"arrival_s": 1, "prompt_tokens": 9, "output_tokens": 4}
    path = write(tmp_path, '{"arrival_s": 0, "prompt\n' + lines(row, row))
    with pytest.raises(InputError) as caught:
        load(path)
    assert caught.value.line == 1
    workload, report = load(path, skip_bad_rows=True)
    assert (len(workload), report.bad_rows) == (2, 1)


def test_numbers_of_blocks_that_say_no_size_are_told(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 4, "hash_ids": [1, 9]},
        {"timestamp": 250, "input_length": 2000, "output_length": 4, "hash_ids": [1, 2, 3]},
    ]
    assert any("block_tokens=N" in guess for guess in load(write(tmp_path, lines(*rows)))[1].guesses)


@pytest.mark.parametrize("text", ["[]", "{}", "{}\n{}"])
def test_json_without_rows_is_said(tmp_path, text):
    with pytest.raises(InputError, match="holds no rows"):
        load(write(tmp_path, text))


# --------------------------------------------------------------------------------------------- results


def result(first_s, **more):
    return {
        "backend": "vllm",
        "input_lens": [9, 7],
        "output_lens": [4, 3],
        "start_times": [first_s, first_s + 1.0],
    } | more


def test_results_that_were_appended_are_replayed(tmp_path):
    workload, _ = load(write(tmp_path, lines(result(5000.0), result(5010.0))))
    assert workload.arrival_s.tolist() == [0, 1, 10, 11]
    assert workload.prompt_tokens.tolist() == [9, 7, 9, 7]
    path = write(tmp_path, lines(result(5000.0), result(5010.0, output_lens=[4])))
    with pytest.raises(
        InputError, match="expected lists of one length, input_lens and output_lens"
    ) as caught:
        load(path)
    assert caught.value.line == 2


def test_a_result_without_times_of_its_own_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected the time at which it was sent, found 0"):
        load(write(tmp_path, result(0.0, start_times=[0.0, 0.0])))
    summary = {"completed": 3, "total_input_tokens": 9, "total_output_tokens": 9}
    with pytest.raises(InputError, match="--save-detailed"):
        load(write(tmp_path, summary))


@pytest.mark.parametrize(
    "rows",
    [
        [{"number_input_tokens": 9, "number_output_tokens": n} for n in (4, 0)],
        {"input_lens": [9, 9], "output_lens": [4, 0], "ttfts": [0.1, 0.0]},
    ],
)
def test_lengths_of_failed_requests_are_left_out(tmp_path, rows):
    assert load_lengths(write(tmp_path, rows)).output_tokens.tolist() == [4]


def test_lengths_without_times_are_told_of_columns(tmp_path):
    path = write(tmp_path, "created,prompt_tokens,output_tokens\n1,9,4\n")
    with pytest.raises(InputError, match="columns=arrival_s:COLUMN"):
        load(path)
    assert load_lengths(write(tmp_path, lines({"input_length": 9, "output_length": 4}))).prompt_tokens == [9]


def test_older_guidellm_reports_are_replayed(tmp_path):
    rows = [{"start_time": EPOCH + at, "prompt_tokens": 9, "output_tokens": 4} for at in (0.25, 2.0)]
    workload, report = load(write(tmp_path, {"benchmarks": [{"requests": {"successful": rows}}]}))
    assert (report.format, workload.arrival_s.tolist()) == ("GuideLLM report", [0, 1.75])


def test_vidurs_gaps_add_up_by_the_requests_numbers(tmp_path):
    text = (
        "Request Id,request_inter_arrival_delay,request_num_prefill_tokens,request_num_decode_tokens\n"
        "2,0.5,8,2\n0,,9,4\n1,2.0,7,3\n"
    )
    workload, _ = load(write(tmp_path, text))
    assert workload.arrival_s.tolist() == [0, 2, 2.5]
    assert workload.prompt_tokens.tolist() == [9, 7, 8]


# ----------------------------------------------------------------------------------- addresses, episodes


@pytest.mark.parametrize("name", [b"\xff.csv", b"a b&c=1?#%+.csv"])
@pytest.mark.parametrize("query", ["", "?seed=3&jitter=2"])
def test_a_source_opens_the_same_file(tmp_path, monkeypatch, name, query):
    monkeypatch.chdir(tmp_path)
    path = os.fsdecode(name)
    (tmp_path / path).write_text(HEADER + "0,9,4\n2,7,3\n")
    opened = open_workload(path, seed=3 if query else None)
    again = open_workload(opened.source)
    assert np.array_equal(again.arrival_s, opened.arrival_s)
    assert again.source == opened.source


def test_a_path_like_an_address_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:").mkdir()
    (tmp_path / "a:" / "trace.csv").write_text(HEADER + "0,9,4\n")
    opened = open_workload("trace://a%3A//trace.csv")
    assert open_workload(opened.source).source == opened.source


def test_a_stretch_is_what_lies_in_it_round_the_end():
    rng = np.random.default_rng(3)
    arrival_s = np.sort(np.round(rng.uniform(0, 100, 300), 1))
    trace = Workload(arrival_s, np.arange(1, 301), np.ones(300), np.zeros(300))
    for duration_s in (0.3, 40.0, 99.9):
        found = overlaid(trace, 7, seed=5, duration_s=duration_s)
        period_s = trace.duration_s * 300 / 299
        starts_s = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(2**31 + 3,))).uniform(
            0.0, period_s, 7
        )
        times = (arrival_s - starts_s[:, None]) % period_s
        stretch, index = np.nonzero(times < duration_s)
        order = np.argsort(times[stretch, index], kind="stable")
        assert np.array_equal(found.arrival_s, times[stretch, index][order])
        assert np.array_equal(found.prompt_tokens, trace.prompt_tokens[index[order]])


def test_stretches_are_bounded(tmp_path):
    path = write(tmp_path, HEADER + "".join(f"{i},9,4\n" for i in range(2000)))
    with pytest.raises(InputError, match="100,000"):
        open_workload(f"trace://{path}?overlay={MAX_STRETCHES + 1}")
    with pytest.raises(InputError, match="at most 100,000,000 are played"):
        open_workload(f"trace://{path}?overlay={MAX_STRETCHES}")


@pytest.mark.parametrize(
    ("table", "query"),
    [
        ("0,0,2,1,Gamma,0.7,1\n0,1800,2,1,Gamma,0.7,1\n", "?requests=1500"),
        ("0,0,0,1,Gamma,0.7,1\n", "?requests=3"),
        ("0,0.5,2,1,Gamma,0.7,1\n1,100,2,1,Gamma,0.7,1\n1,700.25,2,1,Gamma,0.7,1\n", ""),
        ("0,0,2,1,Weibull,1e-300,1\n1,0,2,1,Gamma,1e300,1\n1,600,2,1,Gamma,1e-300,1\n", ""),
        (f"0,{EPOCH},2,1,Gamma,0.7,1\n0,{EPOCH + 600},2,1,Gamma,0.7,1\n", ""),
    ],
    ids=["fewer-than-asked", "silent", "windows-apart", "extreme-shapes", "unix-times"],
)
def test_every_servegen_table_gives_episodes(tmp_path, table, query):
    path = write(tmp_path, WINDOWS + table, "clients.csv")
    task = load_task("static_workload", workload=f"servegen://{path}{query}", horizon_s=10.0)
    counts = [len(task.requests(seed)) for seed in range(30)]
    assert max(counts) > 5 or ",0,1,Gamma" in table
