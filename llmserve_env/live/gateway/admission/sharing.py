"""Who gives way where tenants share a room that is full: the gateway's queue, its memory."""

from __future__ import annotations

from collections.abc import Sequence


def gives_way(held: Sequence[int], ranks: Sequence[int], newcomer: int) -> int:
    """The tenant that loses the newest of what it holds.

    The least urgent of those that hold anything, and among these the one that holds most ("longest queue
    drop"). So nobody gives way to less urgent ones, and among equals no tenant loses anything while it holds
    no more than the room divided by their number.

    Args:
        held: what each tenant holds, with what the newcomer brings.
        ranks: rank of each tenant; lower is more urgent, all alike without priority routing.
        newcomer: tenant that brings something: of several that hold as much, it gives way itself.
    """
    holders = [tenant for tenant, amount in enumerate(held) if amount > 0]
    return max(holders, key=lambda tenant: (ranks[tenant], held[tenant], tenant == newcomer))
