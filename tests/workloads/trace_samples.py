"""A few invented rows in each public format."""

from __future__ import annotations

import json

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:00:00.5000000,100,10
2023-11-16 18:00:01.2500001,200,20
2023-11-16 18:00:03.0000000,300,30
"""

AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.500000+00:00,100,10
2024-05-10 00:00:01.250000+00:00,200,20
2024-05-10 02:00:03.000000+02:00,300,30
"""

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,100,10,110,Conversation log
45,GPT-4,200,0,200,API log
118,GPT-4,300,30,330,API log
"""

MOONCAKE = "\n".join(
    json.dumps(row)
    for row in (
        {"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 1200, "output_length": 20, "hash_ids": [0, 2, 3]},
        {"timestamp": 6000, "input_length": 1300, "output_length": 30, "hash_ids": [0, 2, 4]},
    )
)

LLMSERVINGSIM_TSV = "input_toks\toutput_toks\tarrival_time_ns\n100\t10\t500000000\n200\t20\t1250000000\n"

LLMSERVINGSIM_JSONL = "\n".join(
    json.dumps(row)
    for row in (
        {"input_toks": 40, "output_toks": 10, "arrival_time_ns": 0, "input_tok_ids": list(range(40))},
        {
            "input_toks": 36,
            "output_toks": 20,
            "arrival_time_ns": 1_250_000_000,
            "input_tok_ids": [*range(20), *range(100, 116)],
        },
        {
            "input_toks": 16,
            "output_toks": 5,
            "arrival_time_ns": 2_000_000_000,
            "input_tok_ids": list(range(16, 32)),
        },
    )
)

SESSIONS = json.dumps(
    {"session_id": "a", "arrival_time_ns": 0, "sub_requests": [{"input_toks": 5, "output_toks": 5}]}
)

MEASURED = "\n".join(
    json.dumps(row)
    for row in (
        {"request_id": "r1", "input_toks": 200, "output_toks": 20, "arrival_time": 1e9, "queued_ts": 50.75},
        {"request_id": "r0", "input_toks": 100, "output_toks": 10, "arrival_time": 1e9, "queued_ts": 50.0},
    )
)

PLAIN = "arrival_s,prompt_tokens,output_tokens,tenant,request_id\n0.5,100,10,gold,a\n1.25,200,20,iron,b\n"

SHORT = "arrival_s,prompt,output\n0.5,100,10\n1.25,200,20\n"

VIDUR = "arrived_at,request_num_prefill_tokens,request_num_decode_tokens\n0.0,100,10\n1.25,200,20\n"

LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n100,10,110,10.0\n300,30,330,10.0\n"

SERVEGEN = """client,window_start_s,rate_rps,cv,pattern,shape,scale
0,0,2.0,1.2,Gamma,0.7,0.7
1,0,1.0,1.5,Weibull,0.6,0.6
0,600,4.0,1.2,Gamma,0.7,0.3
"""

QUANTILES = """model,client,rate,field,mean,p10,p50,p90,p99,max
m,0,2.0,input_tokens,100,50,100,150,200,300
m,0,2.0,output_tokens,10,5,10,15,20,30
m,1,1.0,input_tokens,1000,500,1000,1500,2000,3000
m,1,1.0,output_tokens,100,50,100,150,200,300
"""

TRACES = {
    "azure-2023": AZURE_2023,
    "azure-2024": AZURE_2024,
    "burstgpt": BURSTGPT,
    "mooncake": MOONCAKE,
    "llmservingsim-tsv": LLMSERVINGSIM_TSV,
    "llmservingsim-jsonl": LLMSERVINGSIM_JSONL,
    "measured": MEASURED,
    "plain": PLAIN,
    "short": SHORT,
    "vidur": VIDUR,
}
