"""What every task has: whoever counts these counts none of the extra groups, in which more may come."""

from __future__ import annotations

from llmserve_env.controls import SPECS
from llmserve_env.observation import features
from llmserve_env.schema import GROUPS

CONTROLS = tuple(name for name, spec in SPECS.items() if spec.declared.group in GROUPS)
FEATURES = features(GROUPS)
