"""The shield: fixed rules that override an agent where it would do harm."""

from __future__ import annotations

from llmserve_env.agents.shield.filter import RULES, Filtered, ShieldFilter, ShieldState
from llmserve_env.agents.shield.settings import ShieldSettings, shield_settings
from llmserve_env.agents.shield.shield import Shield

__all__ = [
    "RULES",
    "Filtered",
    "Shield",
    "ShieldFilter",
    "ShieldSettings",
    "ShieldState",
    "shield_settings",
]
