"""Two worlds' scores of the same agents on the same seeds: do they rank them alike?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from llmserve_env.report.figures import BLUE, GREY, INK, ORANGE, picture_file
from llmserve_env.report.stats import Interval, interval, iqm, paired_difference

RESAMPLES = 1000


@dataclass(frozen=True)
class Pair:
    """Two agents on the same seeds.

    Attributes:
        first: label.
        second: label.
        simulated: mean of first − second in the simulator, seed by seed.
        live: the same on the server.
    """

    first: str
    second: str
    simulated: Interval
    live: Interval

    @property
    def decided(self) -> bool:
        """Whether the live episodes tell who is better: the interval does not hold 0."""
        return self.live.low > 0 or self.live.high < 0

    @property
    def agrees(self) -> bool:
        """Whether the simulator has the same one ahead."""
        return self.live.estimate * self.simulated.estimate > 0


class Compared:
    """Scores of agents in the simulator and, where they were played, live.

    Args:
        simulated: float[seeds] by label.
        live: the same seeds in the same order; None if none were played.
    """

    def __init__(
        self, simulated: Mapping[str, npt.ArrayLike], live: Mapping[str, npt.ArrayLike] | None
    ) -> None:
        self.labels = list(simulated)
        self.simulated = np.array([simulated[label] for label in self.labels], float)
        self.live = None if live is None else np.array([live[label] for label in self.labels], float)

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs, the better one in the simulator first."""
        assert self.live is not None
        order = np.argsort(-self.simulated.mean(axis=1), kind="stable")
        return [
            Pair(
                self.labels[i],
                self.labels[j],
                paired_difference(self.simulated[i], self.simulated[j]),
                paired_difference(self.live[i], self.live[j]),
            )
            for i, j in combinations(order.tolist(), 2)
        ]

    @property
    def same(self) -> bool:
        """Whether the simulator has every pair that the live episodes decide as they do."""
        return all(pair.agrees for pair in self.pairs if pair.decided)

    @cached_property
    def correlations(self) -> dict[str, Interval]:
        """Rank correlations of the interquartile means, with intervals over resampled seeds.

        A resample draws seeds, the same ones for all agents in both worlds. Where all agents of a world score
        alike, it is 0.
        """
        assert self.live is not None
        seeds = self.live.shape[1]
        drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
        means = [
            (iqm(self.simulated[:, rows], 1), iqm(self.live[:, rows], 1))
            for rows in (np.arange(seeds), *drawn)
        ]
        found = {}
        for name, correlate in (("Spearman's rho", stats.spearmanr), ("Kendall's tau", stats.kendalltau)):
            values = [
                float(correlate(*both).statistic) if all(np.ptp(world) for world in both) else 0.0
                for both in means
            ]
            low, high = np.percentile(values[1:], (2.5, 97.5))
            found[name] = Interval(values[0], float(low), float(high))
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        assert self.live is not None
        scores = {
            label: {"simulated": sim.tolist(), "live": live.tolist()}
            for label, sim, live in zip(self.labels, self.simulated, self.live, strict=True)
        }
        pairs = [
            {
                "first": pair.first,
                "second": pair.second,
                "simulated": _ends(pair.simulated),
                "live": _ends(pair.live),
                "decided": pair.decided,
                "agrees": pair.agrees,
            }
            for pair in self.pairs
        ]
        correlations = {name: _ends(value) for name, value in self.correlations.items()}
        return {"scores": scores, "pairs": pairs, "correlations": correlations, "same_ranking": self.same}


def table(compared: Compared, *, official: bool) -> str:
    """The comparison as Markdown."""
    labels, simulated, live = compared.labels, compared.simulated, compared.live
    count = simulated.shape[1]
    note = "" if official else "\n**These are not seeds of evaluation: no results to report.**\n"
    about = (
        f"Interquartile means over {count} seeds with 95% intervals; differences are means of pairs.\n{note}"
    )
    if live is None:
        rows = [f"| {label} | {interval(scores)} |" for label, scores in zip(labels, simulated, strict=True)]
        return "\n".join(["| agent | simulated |", "|---|---:|", *rows, "", about])
    lines = ["| agent | simulated | live | live − simulated |", "|---|---:|---:|---:|"]
    for label, sim, real in zip(labels, simulated, live, strict=True):
        lines.append(f"| {label} | {interval(sim)} | {interval(real)} | {paired_difference(real, sim)} |")
    lines += ["", "| pair | simulated | live | |", "|---|---:|---:|---|"]
    for pair in compared.pairs:
        said = "a tie live" if not pair.decided else "the same" if pair.agrees else "**the other way round**"
        lines.append(f"| {pair.first} − {pair.second} | {pair.simulated} | {pair.live} | {said} |")
    decided = [pair for pair in compared.pairs if pair.decided]
    agreed = sum(pair.agrees for pair in decided)
    lines += ["", *(f"{name}: {value}" + "  " for name, value in compared.correlations.items())]
    lines += [
        f"Of {len(compared.pairs)} pairs the live episodes decide {len(decided)}, "
        f"and the simulator has {agreed} of them the same way round.",
        "",
        about,
    ]
    return "\n".join(lines)


def draw(path: Path, compared: Compared) -> None:
    """Scores in both worlds, agent by agent and against each other."""
    assert compared.live is not None
    intervals = [[interval(scores) for scores in world] for world in (compared.simulated, compared.live)]
    with picture_file(path, (9.0, 3.8)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        places = np.arange(len(compared.labels))[::-1]
        for world, name, colour, shift in zip(
            intervals, ("simulated", "live"), (BLUE, ORANGE), (0.13, -0.13), strict=True
        ):
            middle = [each.estimate for each in world]
            left.errorbar(
                middle, places + shift, xerr=_arms(world), fmt="o", color=colour, label=name, capsize=2, ms=5
            )
        numbered = [f"{label}  {number}" for number, label in enumerate(compared.labels, 1)]
        left.set_yticks(places, numbered, color=INK)
        left.set_xlabel("score")
        left.set_title("Scores with 95% intervals")
        left.set_xlim(left=0.0)
        left.legend(loc="upper right")
        across, up = intervals
        right.errorbar(
            [each.estimate for each in across],
            [each.estimate for each in up],
            xerr=_arms(across),
            yerr=_arms(up),
            fmt="o",
            color=INK,
            ecolor=GREY,
            ms=4,
            lw=1,
        )
        ends = [0.0, 1.05 * max(each.high for world in intervals for each in world)]
        right.plot(ends, ends, color=GREY, lw=1, ls=":")
        for number, (x, y) in enumerate(zip(across, up, strict=True), 1):
            place, below = (x.estimate, y.estimate), number % 2 == 1  # so that neighbours stay apart
            away = (6, -12) if below else (-10, 5)
            right.annotate(str(number), place, xytext=away, textcoords="offset points", color=INK)
        right.set(xlabel="simulated", ylabel="live", xlim=ends, ylim=ends)
        rho = compared.correlations["Spearman's rho"]
        right.set_title(f"Rank correlation {rho.estimate:.2f}")


def _arms(world: Sequence[Interval]) -> npt.NDArray[np.float64]:
    """float64[2, agents], how far intervals reach down and up."""
    return np.array(
        [[each.estimate - each.low for each in world], [each.high - each.estimate for each in world]]
    )


def _ends(value: Interval) -> list[float]:
    return [value.estimate, value.low, value.high]
