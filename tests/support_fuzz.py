"""Fuzzing's common parts: how many cases, what any JSON value is, and the rule that all keep to."""

import functools
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("PETOOL_LITE_FUZZ", "1"))
SECONDS, GROWTH_KIB = 5.0, 600_000  # no case may take longer, or let the process grow by more

nasty = st.sampled_from(
    ["", "\x00", "\ud800", "\u2028", "<|im_end|>", "{{ 7 * 7 }}", "%s", "../../etc/passwd", '"', "\\", "}}", "]"]
    + ["[" * 300, '{"a":' * 300, "9" * 5000, "a" * 3000, "NaN", "日本 👋", "null", "__class__", "\x7f", "\n", "'"]
    + ["1e999"]
)
text = st.one_of(st.text(max_size=30), nasty)
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)


def some(**optional: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Objects that have some of these keys."""
    return st.fixed_dictionaries({}, optional=optional)


def deep(levels: int) -> Any:
    """Lists and objects around each other."""
    found: Any = 1
    for level in range(levels):
        found = [found] if level % 2 else {"a": found}
    return found


def cases(quick: int) -> Callable[[Any], Any]:
    """Run a @given test on `quick` cases, the same every time, or on FACTOR times as many, others each time."""

    def decorate(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> None:
            started, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            inner(*args, **kwargs)
            assert time.process_time() - started < SECONDS, "it takes too long"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < GROWTH_KIB, "it takes too much memory"

        test.hypothesis.inner_test = counted
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]
        own = {"deadline": None, "database": None, "derandomize": FACTOR == 1, "suppress_health_check": checks}
        return settings(max_examples=quick * FACTOR, **own)(test)

    return decorate
