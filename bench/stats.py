"""Statistics of scores: intervals, paired tests, quantiles. Plain Python, exact where that is cheap."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, sqrt

_Z = 1.959964  # 97.5 % point of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent (Wilson 1927); (0, 100) without observations."""
    if n == 0:
        return 0.0, 100.0
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return round(100 * max(0.0, centre - half), 4), round(100 * min(1.0, centre + half), 4)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact McNemar test: is a coin fair that fell this way in the discordant pairs? (McNemar 1947).

    Twice the smaller binomial tail, at most 1; 1 without discordant pairs.
    """
    n, smaller = first_only + second_only, min(first_only, second_only)
    term = tail = 1  # C(n, 0), in whole numbers: exact for any n
    for index in range(smaller):
        term = term * (n - index) // (index + 1)
        tail += term
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def paired_interval(first_only: int, second_only: int, n: int) -> tuple[float, float]:
    """95 % interval of second minus first, paired proportions, in points; from Agresti & Min 2005.

    Each of the four cells is raised by 1/2, which keeps the interval honest for few discordant pairs.
    """
    if n == 0:
        return -100.0, 100.0
    size = n + 2
    centre = (second_only - first_only) / size
    spread = sqrt(max(0.0, (first_only + second_only + 1) - size * centre**2)) / size
    return round(100 * max(-1.0, centre - _Z * spread), 4), round(100 * min(1.0, centre + _Z * spread), 4)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that at least `share` of `values` do not exceed (nearest rank); None without values."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None
