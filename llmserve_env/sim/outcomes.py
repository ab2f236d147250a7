"""What became of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.sim.state import CANCELLED, COMPLETED, FAILED, PS_PER_S, STATUS_NAMES

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcomes:
    """What became of every request, in order of arrival.

    Attributes:
        arrival_s: float64[n] (s).
        ttft_s: float64[n], from arrival to first token (s; nan without one).
        tpot_s: float64[n], mean time between output tokens (s; nan with fewer than two).
        worst_gap_s: float64[n], longest time between two of its tokens (s; nan with fewer than two).
        e2e_s: float64[n], from arrival to last token (s; nan if not completed).
        finish_s: float64[n], time of the last token, or of failing (s; nan while in flight).
        preemptions: uint16[n].
        retries: int8[n], attempts after the first that were sent or will be.
        status_code: int8[n], index into sim.state.STATUS_NAMES.
    """

    arrival_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    worst_gap_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    preemptions: NDArray[np.uint16]
    retries: NDArray[np.int8]
    status_code: NDArray[np.int8]

    @property
    def status(self) -> NDArray[np.str_]:
        """str[n], one of sim.state.STATUS_NAMES."""
        return np.array(STATUS_NAMES)[self.status_code]


def outcomes_of(requests: NDArray[np.void], outcomes: NDArray[np.void]) -> Outcomes:
    """What REQUEST[n] and OUTCOME[n] say."""
    arrival_ps, first_ps = requests["arrival_ps"], outcomes["first_ps"]
    status = outcomes["status"]
    completed = status == COMPLETED
    over = np.isin(status, (COMPLETED, FAILED, CANCELLED))
    gaps = requests["output_tokens"] - 1
    ttft_s = np.where(first_ps > 0, (first_ps - arrival_ps) / PS_PER_S, np.nan)
    finish_ps = outcomes["finish_ps"]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot_s = np.where(completed & (gaps > 0), (finish_ps - first_ps) / gaps / PS_PER_S, np.nan)
    return Outcomes(
        arrival_s=arrival_ps / PS_PER_S,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        worst_gap_s=np.where(np.isnan(tpot_s), np.nan, outcomes["worst_gap_ps"] / PS_PER_S),
        e2e_s=np.where(completed, (finish_ps - arrival_ps) / PS_PER_S, np.nan),
        finish_s=np.where(over, finish_ps / PS_PER_S, np.nan),
        preemptions=outcomes["preemptions"].copy(),
        retries=outcomes["retries"].copy(),
        status_code=status.copy(),
    )
