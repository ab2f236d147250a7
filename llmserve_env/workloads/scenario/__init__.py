"""Scenarios: tenants whose traffic changes regime within an episode."""

from __future__ import annotations

from llmserve_env.workloads.scenario.parse import parse_scenario
from llmserve_env.workloads.scenario.regimes import Regime, Spikes
from llmserve_env.workloads.scenario.scenario import Scenario
from llmserve_env.workloads.scenario.traffic import Conversing, Independent, Traffic

__all__ = ["Conversing", "Independent", "Regime", "Scenario", "Spikes", "Traffic", "parse_scenario"]
