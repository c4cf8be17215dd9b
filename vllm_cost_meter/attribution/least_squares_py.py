"""Least squares with no negative coefficient, in Python: the twin of `csrc/least_squares.pxd`.

Both agree bit for bit, so a change to one must be made in the other.

Invariant: what is found is finite, has no negative coefficient, and no coefficient could change
alone and fit better.
"""

import math
from collections.abc import Sequence

# Relative noise of a step's time, for the strength of a ridge.
NOISE = 0.03
# A term that a prior lacks may make up about this part of a step.
UNKNOWN_PART = 0.05
# With less weight than this many steps there is as good as none.
EMPTY = 8.0
PIVOT_MIN = 1e-12
_GAIN_MIN = 1e-9


def solve_scaled(matrix: list[list[float]], vector: list[float], count: int) -> float | None:
    """Solve the first `count` equations in place, by elimination; `vector` has the unknowns then.

    Return the error that they explain, None if an equation follows from the others. The matrix is
    symmetric, and its diagonal 1 or near it.
    """
    gain = 0.0
    for i in range(count):
        if matrix[i][i] < PIVOT_MIN:
            return None
        # After the elimination the error explained is the sum of pivot times unknown squared.
        gain += vector[i] * vector[i] / matrix[i][i]
        for k in range(i + 1, count):
            factor = matrix[k][i] / matrix[i][i]
            vector[k] -= factor * vector[i]
            for j in range(i + 1, count):
                matrix[k][j] -= factor * matrix[i][j]
    for i in range(count - 1, -1, -1):
        value = vector[i]
        for j in range(i + 1, count):
            value -= matrix[i][j] * vector[j]
        vector[i] = value / matrix[i][i]
    return gain


def nonnegative(
    moments: Sequence[Sequence[float]], right: Sequence[float], before: Sequence[float] = ()
) -> list[float]:
    """Return x >= 0 with the least x'Mx - 2r'x (Lawson and Hanson 1974, on normal equations).

    `moments` are M, symmetric. A term that the others determine stays 0. What was found `before`,
    for similar equations, tells which terms to begin with.
    """
    count = len(right)
    scales = [1.0 / math.sqrt(moments[i][i]) if moments[i][i] > 0.0 else 0.0 for i in range(count)]
    found = [0.0] * count
    barred = [scale == 0.0 for scale in scales]
    free = [i for i, value in enumerate(before) if value > 0.0 and not barred[i]]
    _begin(moments, right, scales, free, found)
    for _ in range(3 * count):
        entering = _steepest(moments, right, scales, free, barred, found)
        if entering < 0:
            break
        free.append(entering)
        free.sort()
        while free:
            tried = _solved(moments, right, scales, free)
            if tried is None:
                free.remove(entering)
                barred[entering] = True
                break
            if min(tried) > 0.0:
                for i, value in zip(free, tried, strict=True):
                    found[i] = value
                break
            _step_back(found, free, tried)
    return found


def _begin(
    moments: Sequence[Sequence[float]],
    right: Sequence[float],
    scales: Sequence[float],
    free: list[int],
    found: list[float],
) -> None:
    """Begin with the terms that are free, as far as they are positive together."""
    while free:
        tried = _solved(moments, right, scales, free)
        if tried is None:
            free.clear()
        elif min(tried) > 0.0:
            for i, value in zip(free, tried, strict=True):
                found[i] = value
            return
        else:
            free[:] = [i for i, value in zip(free, tried, strict=True) if value > 0.0]


def _steepest(
    moments: Sequence[Sequence[float]],
    right: Sequence[float],
    scales: Sequence[float],
    free: Sequence[int],
    barred: Sequence[bool],
    found: Sequence[float],
) -> int:
    """Return the term that would gain most by growing from 0; -1 if none would."""
    entering, steepest = -1, _GAIN_MIN
    for i in range(len(right)):
        if barred[i] or i in free:
            continue
        gain = right[i]
        for j in free:
            gain -= moments[i][j] * found[j]
        if gain * scales[i] > steepest:
            entering, steepest = i, gain * scales[i]
    return entering


def _step_back(found: list[float], free: list[int], tried: Sequence[float]) -> None:
    """Go towards what was tried until the first coefficient is 0, which is free no more."""
    part, first = 1.0, -1
    for i, value in zip(free, tried, strict=True):
        if value <= 0.0:
            reach = found[i] / (found[i] - value) if found[i] > 0.0 else 0.0
            if first < 0 or reach < part:
                part, first = reach, i
    for i, value in zip(list(free), tried, strict=True):
        found[i] += part * (value - found[i])
        if i == first or found[i] <= 0.0:
            found[i] = 0.0
            free.remove(i)


def _solved(
    moments: Sequence[Sequence[float]],
    right: Sequence[float],
    scales: Sequence[float],
    free: Sequence[int],
) -> list[float] | None:
    """Solve for the free terms by scaled elimination; None if they determine one another."""
    matrix = [[moments[i][j] * scales[i] * scales[j] for j in free] for i in free]
    vector = [right[i] * scales[i] for i in free]
    if solve_scaled(matrix, vector, len(free)) is None:
        return None
    return [value * scales[i] for i, value in zip(free, vector, strict=True)]
