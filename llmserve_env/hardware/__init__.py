"""What the engine runs on: profiles of a GPU with a model, and the times and memory that follow from them.

`profile` holds the schema, `latency` and `memory` turn a profile into what the simulator reads, `calibrate`
makes one from measured kernel times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmserve_env.hardware.profile import Profile, list_profiles, load_profile

__all__ = ["Profile", "list_profiles", "load_profile"]


def __getattr__(name: str) -> Any:
    """Import the profile module, and pydantic with it, when something of it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmserve_env.hardware import profile

    return getattr(profile, name)
