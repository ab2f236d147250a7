"""Least-squares fit of a table of knots to scattered measurements, in any number of dimensions.

The table is read by linear interpolation along every axis; the fit finds the knot values for which that
reading is closest to the measurements. Knots that no measurement touches go on smoothly from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]

_RIDGE = 1e-6
"""Weight of smoothness beside the measurements': it decides only what they leave open."""

_TILE = 128
"""Tokens in a tile of the attention kernels: below it, lengths cost about the same."""


def fit_table(points: Array, values: Array, weights: Array, knots: Sequence[Array]) -> Array:
    """Fit knot values.

    Args:
        points: [m, d] coordinates, within the knots' range.
        values: [m] measurements.
        weights: [m], what each residual is multiplied by.
        knots: d ascending arrays, two numbers or more each.

    Returns:
        The values at the knots, one axis for each dimension; none is negative.
    """
    reading = _reading(points, knots)
    weighted = sparse.diags_array(weights) @ reading
    normal = (weighted.T @ weighted).toarray()
    normal += _RIDGE * normal.diagonal().mean() * _smoothness(knots)
    solution = np.linalg.solve(normal, weighted.T @ (weights * values))
    return np.maximum(0.0, solution).reshape([len(axis) for axis in knots])


def read_table(points: Array, table: Array, knots: Sequence[Array]) -> Array:
    """[m] values of a table at points [m, d], linear between knots and, along outer segments, beyond them."""
    result: Array = _reading(points, knots) @ table.ravel()
    return result


def rising(table: Array, axes: Sequence[int]) -> Array:
    """The table without falls along the axes: halfway between the running maximum and the minimum to come."""
    for axis in axes:
        to_come = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
        table = (np.maximum.accumulate(table, axis) + to_come) / 2
    return table


def spread_knots(values: Array, limit: int) -> Array:
    """At most `limit` of the values, the smallest and largest among them, spread over orders of magnitude."""
    values = np.unique(values)
    if len(values) <= limit:
        return values
    place = np.log2(_TILE + values)
    kept = [0, len(values) - 1]
    while len(kept) < limit:
        distance = np.abs(place[:, None] - place[kept]).min(axis=1)
        kept.append(int(distance.argmax()))
    return values[sorted(kept)]


def curve_knots(x: Array, y: Array, limit: int, median: float, worst: float) -> Array:
    """Knots for a curve with steps: the point of largest error is added until the errors are small.

    Args:
        x: [m] places, of which the knots are chosen.
        y: [m] values > 0.
        limit: most knots.
        median: median relative error to reach.
        worst: largest relative error to reach.
    """
    kept = {float(x.min()), float(x.max())}
    while True:
        knots = np.array(sorted(kept))
        error = np.abs(read_table(x[:, None], fit_table(x[:, None], y, 1 / y, [knots]), [knots]) / y - 1)
        if len(kept) >= limit or (np.median(error) <= median and error.max() <= worst):
            return knots
        kept.add(float(x[np.where(np.isin(x, knots), -1.0, error).argmax()]))


def _reading(points: Array, knots: Sequence[Array]) -> sparse.csr_array:
    """[m, number of knots] matrix that interpolates linearly along each axis."""
    shape = [len(axis) for axis in knots]
    sides = []
    for coordinate, axis in zip(points.T, knots, strict=True):
        low = np.clip(np.searchsorted(axis, coordinate, side="right") - 1, 0, len(axis) - 2)
        share = (coordinate - axis[low]) / (axis[low + 1] - axis[low])
        sides.append(((low, 1 - share), (low + 1, share)))
    row = np.arange(len(points))
    rows, columns, entries = [], [], []
    for corner in product(*sides):
        rows.append(row)
        columns.append(np.ravel_multi_index([index for index, _ in corner], shape))
        entries.append(np.prod([share for _, share in corner], axis=0))
    cells = (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(cells, shape=(len(points), int(np.prod(shape))))


def _smoothness(knots: Sequence[Array]) -> Array:
    """Normal matrix of the bends along every axis and, fainter, of the steps, so that a constant is free."""
    sizes = [len(axis) for axis in knots]
    total = np.zeros((np.prod(sizes), np.prod(sizes)))
    for axis, x in enumerate(knots):
        gaps = np.diff(x)[:, None]
        steps = np.diff(np.eye(len(x)), axis=0)
        bends = np.diff(steps / gaps, axis=0) * gaps[1:] * gaps[:-1] / (gaps[1:] + gaps[:-1])
        along = bends.T @ bends + 1e-4 * steps.T @ steps
        before, after = (
            np.eye(np.prod(sizes[:axis], dtype=int)),
            np.eye(np.prod(sizes[axis + 1 :], dtype=int)),
        )
        total += np.kron(np.kron(before, along), after)
    return total
