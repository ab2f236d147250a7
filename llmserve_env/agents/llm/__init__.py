"""Language models as agents: how one is asked, what it is shown, and what of its answers can be used."""

from __future__ import annotations

from llmserve_env.agents.llm.agent import LLMAgent, LLMUsage
from llmserve_env.agents.llm.settings import LLM, LLMSettings, llm_label, llm_settings

__all__ = ["LLM", "LLMAgent", "LLMSettings", "LLMUsage", "llm_label", "llm_settings"]
