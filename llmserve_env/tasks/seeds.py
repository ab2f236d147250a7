"""Which seeds are for what: those of evaluation lie apart from all others."""

from __future__ import annotations

TRAINING_SEEDS = range(2**31)
"""Seeds of training, tuning and exploration; an environment that is reset without a seed draws from them."""

EVALUATION_SEEDS = range(2**31, 2**32)
"""Seeds of reported results. Nothing is ever fitted, tuned or selected on them."""
