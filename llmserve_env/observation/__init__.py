"""What an agent sees of a window: as a vector of named features, and in the words of the schema."""

from __future__ import annotations

from llmserve_env.observation.description import describe
from llmserve_env.observation.features import (
    FEATURES,
    TENANT_SLOTS,
    Feature,
    feature_names,
    features,
)
from llmserve_env.observation.observer import Observer, Reader

__all__ = [
    "FEATURES",
    "TENANT_SLOTS",
    "Feature",
    "Observer",
    "Reader",
    "describe",
    "feature_names",
    "features",
]
