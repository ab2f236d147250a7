"""Runs in vLLM's venv: `LiveScheduler` under asynchronous scheduling, which vLLM turns off on CPUs.

The scheduler, its cache manager and its configuration are vLLM's; only the tokens that a model would have
sampled are made up, for there is no engine. Two iterations are always under way, as on a GPU. Prints a JSON
object: why another version of vLLM is refused, the class, and by phase its iterations as [requests, blocks
held, most drafts of a request].

    python async_scheduling.py MODEL CONTROL
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import KVCacheConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from llmserve_env.live.servers.engine_settings import EngineSettings, read_statuses, write_settings

if TYPE_CHECKING:
    from llmserve_env.live.vllm_scheduler import LiveScheduler

BLOCKS, BLOCK_TOKENS = 64, 16
PHASES = {
    "start": EngineSettings(),
    "cap": EngineSettings(batch_cap=3, speculation_depth=2),
    "budget": EngineSettings(kv_budget_fraction=0.25, speculation_depth=0),
    "end": EngineSettings(),
}


def refusal() -> str | None:
    """Why the scheduler cannot be used with a version that it does not know."""
    known, vllm.__version__ = vllm.__version__, "0.33.1"
    try:
        import llmserve_env.live.vllm_scheduler  # noqa: F401
    except ImportError as error:
        return str(error)
    finally:
        vllm.__version__ = known
    return None


def live_scheduler(model: str, control: str) -> LiveScheduler:
    """With n-gram drafts, which asynchronous scheduling takes from GPUs only: the schedulers do not care."""
    from llmserve_env.live.vllm_scheduler import LiveScheduler

    config = EngineArgs(
        model=model,
        max_model_len=1024,
        max_num_seqs=16,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=False,
        enforce_eager=True,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
            "num_speculative_tokens_per_batch_size": [[1, 16, 4]],
        },
        additional_config={"llmserve_control": control},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = BLOCKS + 1
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    return LiveScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(BLOCKS + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
        log_stats=True,
    )


def sampled(output) -> ModelRunnerOutput:
    """One token for each request that has its prompt, and no draft accepted."""
    ids = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={name: index for index, name in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )


def main() -> None:
    model, control = sys.argv[1:]
    refused = refusal()
    scheduler = live_scheduler(model, control)
    sent = 0
    under_way: deque = deque()
    phases: dict[str, list] = {}
    for phase, settings in PHASES.items():
        write_settings(control, settings)
        while read_statuses(control)[0].asked != settings:
            time.sleep(0.01)
        steps = phases[phase] = []
        for _ in range(60):
            while len(scheduler.requests) < 20:  # 2 blocks of prompt, 1 more for the answer and its drafts
                params = SamplingParams(max_tokens=6, ignore_eos=True)
                params.update_from_generation_config({}, 2)
                scheduler.add_request(Request(str(sent), [5] * 30, params, None))
                sent += 1
            output = scheduler.schedule()
            under_way.append(output)
            held = BLOCKS - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            drafts = max(map(len, output.scheduled_spec_decode_tokens.values()), default=0)
            steps.append([len(scheduler.running), held, drafts])
            if len(under_way) == 2:
                done = under_way.popleft()
                scheduler.update_from_output(done, sampled(done))
    scheduler.shutdown()
    print(json.dumps({"refusal": refused, "class": type(scheduler).__name__, "phases": phases}))


if __name__ == "__main__":
    main()
