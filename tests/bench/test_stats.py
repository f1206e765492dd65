"""Intervals and tests against brute force and figures worked out by hand."""

from itertools import product

import pytest
from petool_lite.bench.stats import mcnemar, paired_interval, quantile, wilson


def test_the_interval_is_wilsons() -> None:
    # 787 of 1,000: computed by hand from the formula
    assert wilson(787, 1000) == pytest.approx((76.06, 81.13), abs=0.02)
    assert wilson(0, 0) == (0.0, 100.0)
    assert wilson(10, 10)[1] == 100.0
    assert wilson(0, 10)[0] == 0.0


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (2, 9), (5, 5), (0, 11), (7, 6)])
def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven(lost, won) -> None:
    n = lost + won
    uneven = sum(abs(2 * sum(throw) - n) >= abs(won - lost) for throw in product((0, 1), repeat=n))
    assert mcnemar(lost, won) == pytest.approx(uneven / 2**n)


def test_mcnemar_of_thousands_of_pairs_is_no_zero_by_underflow() -> None:
    assert mcnemar(1500, 1500) == 1.0
    assert 0 < mcnemar(1000, 1300) < 1e-9


def test_the_paired_interval_holds_its_difference_and_is_symmetric() -> None:
    low, high = paired_interval(20, 50, 500)
    assert low < 6.0 < high
    assert low > 0  # 20 against 50 is no chance: p < 0.001
    assert paired_interval(50, 20, 500) == pytest.approx((-high, -low))
    # by hand: centre 30/502, spread sqrt(71 - 900/502)/502
    assert (low, high) == pytest.approx((2.73, 9.22), abs=0.02)
    assert paired_interval(0, 0, 0) == (-100.0, 100.0)


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2, 3, 4], 0.5) == 2
    assert quantile(list(range(1, 101)), 0.95) == 95
