"""Any agent by what a command line calls it: a name, or the folder of a trained policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmserve_env.agents import TRAINED, Shield, load_agent
from llmserve_env.agents.continuous_policy import (
    ContinuousPolicyAgent,
    is_continuous,
    load_continuous_policy,
)
from llmserve_env.agents.llm import LLM, LLMAgent, llm_settings
from llmserve_env.agents.policy import CONFIG, PolicyAgent, load_policy
from llmserve_env.agents.trained import trained_folder

if TYPE_CHECKING:
    from llmserve_env.agents import Agent
    from llmserve_env.tasks import Task


SHIELDED = "shielded:"


def policy_folder(name: str, task: Task) -> Path | None:
    """The folder of the policy that a name means for a task, None where it means no policy.

    Raises:
        InputError: it is the name of policies that come with the package, and there is none for the task.
    """
    name = name.removeprefix(SHIELDED).replace("{task}", task.id)
    if name in TRAINED:
        return trained_folder(name, task.id)
    folder = Path(name)
    if (folder / CONFIG).exists() or (":" not in name and len(folder.parts) > 1):
        return folder
    return None


def find_agent(name: str, task: Task) -> Agent:
    """An agent.

    Args:
        name: a name as `load_agent` takes it; or the folder of a policy, in which "{task}" is the task's id;
            or llm:MODEL@URL, a language model, as `llm_settings` takes it; each after shielded: for one in a
            `Shield`.
        task: what it will play.

    Raises:
        InputError: there is no such agent, or its files cannot be used; names them.
    """
    if name.removeprefix(SHIELDED).startswith(LLM):
        model = LLMAgent(llm_settings(name.removeprefix(SHIELDED)))
        return Shield(model) if name.startswith(SHIELDED) else model
    folder = policy_folder(name, task)
    if folder is None or name.removeprefix(SHIELDED) in TRAINED:
        return load_agent(name, task)
    agent: Agent
    if is_continuous(folder):
        agent = ContinuousPolicyAgent(load_continuous_policy(folder), folder.name)
    else:
        agent = PolicyAgent(load_policy(folder), folder.name)
    return Shield(agent) if name.startswith(SHIELDED) else agent
