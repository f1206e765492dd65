"""Statistics of scores."""

from math import sqrt

_Z = 1.959964  # 97.5 % point of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent (Wilson 1927); (0, 100) without observations."""
    if n == 0:
        return 0.0, 100.0
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return round(100 * max(0.0, centre - half), 2), round(100 * min(1.0, centre + half), 2)
