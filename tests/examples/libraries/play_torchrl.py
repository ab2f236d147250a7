"""TorchRL: the vector environment in the mode DISABLED, in which TorchRL resets episodes itself."""

from __future__ import annotations

import gymnasium as gym
import torch
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, GymWrapper, SerialEnv, check_env_specs

import llmserve_env  # noqa: F401 - registers the ids

WINDOWS = 5
TASK = {"task_id": "bursty_workload", "horizon_s": 50.0}


def read_score(info, tensors):
    """TorchRL's own reader takes no plain numbers."""
    return tensors.set("score", torch.as_tensor(info["score"]))


def main() -> None:
    for name in ("LLMServe-v0", "LLMServeContinuous-v0"):
        env = GymWrapper(gym.make_vec(name, num_envs=2, autoreset_mode="Disabled", **TASK))
        check_env_specs(env)
        env.set_seed(7)
        played = env.rollout(WINDOWS + 2, break_when_any_done=False)
        assert played["next", "truncated"].squeeze(-1).nonzero().tolist() == [[0, 4], [1, 4]]
        for row, seed in enumerate((7, 8)):
            alone = gym.make(name, **TASK)
            alone.reset(seed=seed)
            for step in range(WINDOWS + 2):
                if step % WINDOWS == 0:
                    seen, _ = alone.reset()
                assert seen.tolist() == played["observation"][row, step].tolist()
                seen, reward, *_ = alone.step(played["action"][row, step].numpy())
                assert seen.tolist() == played["next", "observation"][row, step].tolist()
                assert torch.tensor(reward).float() == played["next", "reward"][row, step]

    scored = env.set_info_dict_reader(read_score).rollout(WINDOWS)
    mean = scored["next", "reward"].squeeze(-1).mean(dim=1)
    assert torch.allclose(scored["next", "score"][:, -1].float(), mean)

    for batch in Collector(env, None, frames_per_batch=4 * WINDOWS, total_frames=4 * WINDOWS):
        assert batch["next", "done"].sum() == 4

    singles = SerialEnv(2, lambda: GymEnv("llmserve_env:LLMServe-v0", **TASK))
    assert singles.rollout(WINDOWS + 2, break_when_any_done=False)["next", "truncated"].sum() == 2


if __name__ == "__main__":
    main()
