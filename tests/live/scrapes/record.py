"""Record what a real vLLM answers: metrics at rest, under load and after a restart, and what `doctor` asks.

    python tests/live/scrapes/record.py FOLDER

FOLDER is what `scripts/vllm_cpu.sh setup` made. The cache is so small (160 blocks of 32 tokens) that requests
are preempted. The idle server's text is whole but for metrics of Python, of the process and of the web
framework; of the others only what is read is kept.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

HERE = Path(__file__).parent
URL = "http://127.0.0.1:8107"
FLAGS = """
    --served-model-name tiny --host 127.0.0.1 --port 8107 --dtype bfloat16 --max-model-len 2048
    --enforce-eager --block-size 32 --num-gpu-blocks-override 160 --max-num-seqs 24
    --scheduling-policy priority
"""
KEPT = """
    process_start_time_seconds vllm:num_requests_ vllm:kv_cache_usage vllm:num_preemptions
    vllm:prompt_tokens_total vllm:generation_tokens vllm:prefix_cache vllm:spec_decode_num_
    vllm:request_success vllm:admission_rejections vllm:time_to_first vllm:inter_token vllm:e2e_request
    vllm:request_queue_time vllm:cache_config
"""
SPECULATION = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4})


def start(folder: Path) -> subprocess.Popen[bytes]:
    bin_ = folder / "venv" / "bin"
    environment = os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [bin_ / "vllm", "serve", folder / "model", *FLAGS.split()]
    command += ["--speculative-config", SPECULATION]
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    while server.poll() is None:
        try:
            if httpx.get(f"{URL}/health").status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit("vLLM did not start")


def stop(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def complete(index: int) -> None:
    draw = random.Random(index)
    prompt = [draw.randrange(4, 4096) for _ in range(draw.randint(40, 160))] * draw.choice((1, 2))
    tokens = draw.randint(60, 200)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": index % 4 > 0, "priority": index % 2}
    try:
        with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=300) as response:
            for count, _ in enumerate(response.iter_lines()):
                if index % 10 == 9 and count > 20:
                    return  # a client that goes away
    except httpx.TransportError:
        pass  # the server was killed


def scrape(name: str) -> None:
    text = httpx.get(f"{URL}/metrics", timeout=60).text
    kept = ["process_start_time_seconds", "vllm:"] if name == "idle" else KEPT.split()
    ours = [line for line in text.splitlines() if any(each in line for each in kept)]
    (HERE / f"vllm-0.32-{name}.txt").write_text("\n".join(ours) + "\n")


def answers(folder: Path) -> None:
    ask = {"model": "tiny", "prompt": "a b", "max_tokens": 3, "ignore_eos": True, "stream": True}
    ask |= {"stream_options": {"include_usage": True}, "priority": 1}
    found = {path: httpx.get(URL + path, timeout=120) for path in ("/health", "/version", "/v1/models")}
    found["/v1/completions"] = httpx.post(f"{URL}/v1/completions", json=ask, timeout=120)
    found["/v1/completions of no model"] = httpx.post(
        f"{URL}/v1/completions", json=ask | {"model": "x"}, timeout=120
    )
    kept = {
        name: {"status": answer.status_code, "headers": dict(answer.headers), "body": answer.text}
        for name, answer in found.items()
    }
    (HERE / "vllm-0.32-answers.json").write_text(json.dumps(kept, indent=1).replace(f"{folder}/", "") + "\n")


def main(folder: Path) -> None:
    server = start(folder)
    try:
        scrape("idle")
        answers(folder)
        with ThreadPoolExecutor(40) as clients:
            load = [clients.submit(complete, index) for index in range(90)]
            for name, finished in (("busy-1", 15), ("busy-2", 45)):
                while sum(each.done() for each in load) < finished:
                    time.sleep(0.1)
                scrape(name)
        scrape("after")
        stop(server)
        server = start(folder)
        with ThreadPoolExecutor(8) as clients:
            load = [clients.submit(complete, index) for index in range(24)]
            while sum(each.done() for each in load) < 10:
                time.sleep(0.1)
            scrape("restarted")
    finally:
        stop(server)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
