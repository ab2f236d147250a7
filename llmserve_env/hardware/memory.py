"""How many KV blocks an engine has."""

from __future__ import annotations

from llmserve_env.errors import InputError
from llmserve_env.hardware.profile import Profile, TierName


def kv_blocks(profile: Profile, tier: TierName = "FP16") -> int:
    """Blocks that requests can hold: what the engine allocates less the null block that vLLM keeps.

    The engine allocates what its share of the memory leaves beside weights and workspace, or, with bf16
    weights, as many blocks as the profile's measured figure says.

    Args:
        profile: the GPUs and the model.
        tier: precision of the weights.

    Raises:
        InputError: the profile lacks the tier, or its weights leave no room.
    """
    figures, gpu, engine = profile.tier(tier), profile.gpu, profile.engine
    if figures is None:
        raise InputError(
            f"profile '{profile.name}' has no {tier} weights, only {', '.join(profile.tier_names)}"
        )
    if tier == "FP16" and engine.kv_blocks is not None:
        allocated = engine.kv_blocks
    else:
        share = gpu.memory_bytes * engine.gpu_memory_utilization - engine.reserved_bytes_per_gpu
        block_bytes = profile.model.kv_bytes_per_token * engine.block_tokens
        allocated = int((share * gpu.count - figures.weight_bytes) // block_bytes)
    if allocated < 2:
        raise InputError(
            f"profile '{profile.name}': {gpu.count} x {gpu.memory_bytes / 1e9:.1f} GB leave no KV cache "
            f"beside {figures.weight_bytes / 1e9:.1f} GB of {tier} weights"
        )
    return allocated - 1
